"""The door for optimisers of one's own: an update without side effects, which can be differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor


class DifferentiableOptimizer(torch.optim.Optimizer, ABC):
    r"""A torch.optim optimiser of your own, written as a function, so that `Unrolled` can differentiate its steps.

    Write `first_memory` and `update`, which treat one tensor and change nothing that they are given; `step()` is made
    from them, with torch's groups, step counts and schedulers as for any other optimiser. The same class serves
    `Unrolled`, `Implicit`, `solve(optimizer=...)` and plain training loops. An option may be a tensor that depends on a
    player: compute with it, and it has its derivative.

    Lion, in the smooth form that has one (its sign has the derivative zero):

    Examples:
        >>> class SoftLion(DifferentiableOptimizer):
        ...     def __init__(self, params, lr=1e-2, momentum=0.9):
        ...         super().__init__(params, {"lr": lr, "momentum": momentum})
        ...     def first_memory(self, y):
        ...         return {"mean": torch.zeros_like(y)}
        ...     def update(self, y, gradient, memory, options):
        ...         mean = torch.lerp(gradient, memory["mean"], options["momentum"])
        ...         return y - options["lr"] * torch.tanh(mean), {"mean": mean}
        >>> y = torch.tensor([2.0], requires_grad=True)
        >>> y.square().sum().backward()
        >>> SoftLion([y], lr=1.0).step()
        >>> y
        tensor([1.6201], requires_grad=True)
    """

    @abstractmethod
    def first_memory(self, y: Tensor) -> Any:
        """What is remembered of a tensor before its first step: a nest of dicts, lists, tensors and numbers."""

    @abstractmethod
    def update(self, y: Tensor, gradient: Tensor, memory: Any, options: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The tensor after one step along its gradient, and the memory after it.

        Args:
            y: The tensor before the step; do not write to it, nor to the others.
            gradient: Shaped like `y`.
            memory: What `first_memory` or the last step gave.
            options: Those of the tensor's group, `options["lr"]` among them, as a schedule has set them.
        """

    @final
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step in place, as every torch.optim optimiser takes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    memory = self.remembered(self.state[parameter], parameter)
                    moved, after = self.update(parameter, parameter.grad, memory, group)
                    parameter.copy_(moved)
                    self.state[parameter] = {OWN: after}
        return loss

    @final
    def remembered(self, slot: Mapping[str, Any], y: Tensor) -> Any:
        """The memory in an optimiser's state of one tensor, made where there is none yet."""
        return slot[OWN] if OWN in slot else self.first_memory(y)


OWN = "own"
"""The key of the optimiser's own memory in the state that torch keeps of each parameter."""
