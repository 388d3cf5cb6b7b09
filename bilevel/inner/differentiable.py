"""Steps of unmodified torch.optim optimisers that autograd can differentiate.

The optimiser's own code runs. Before each step it is handed fresh clones of parameters and state, so that its
in-place updates write to tensors of this step alone, and the graph of all steps stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, optim
from torch.overrides import TorchFunctionMode

from bilevel.inner.options import tensor_options
from bilevel.inner.own import OWN, DifferentiableOptimizer
from bilevel.inner.refusals import known_base, refuse_hooks, refuse_undifferentiable
from bilevel.inner.schedule import Changes, applied
from bilevel.inner.seeds import SEEDS
from bilevel.inner.torch_optim import Memory, remember
from bilevel.tree import map_leaves

_DIVIDING = (optim.Adam, optim.AdamW)  # by their learning rates
_WITHOUT_ROOTS = (optim.SGD, optim.ASGD, optim.Adamax)


class Stepper:
    """One optimiser over the leaves of a follower, stepped functionally: tensors in, tensors out."""

    def __init__(self, optimizer: optim.Optimizer, parameters: Sequence[Tensor], memory: Memory | None) -> None:
        refuse_hooks(optimizer)
        refuse_undifferentiable(optimizer)
        self.optimizer = optimizer
        """The user's, as it was built over `parameters`."""
        self.kind = known_base(optimizer)
        """The optimiser of torch's whose steps it takes; None for one of the user's own."""
        self.memory: Memory | None = _preset(optimizer, parameters) if memory is None else memory
        self._originals = [dict(group) for group in optimizer.param_groups]
        optimizer.defaults["differentiable"] = True
        places = {id(p): index for index, p in enumerate(parameters)}
        self._groups: list[list[int]] = []
        for group in optimizer.param_groups:
            group["differentiable"] = True
            group["foreach"] = False
            if "fused" in group:
                group["fused"] = False
            self._groups.append([places[id(p)] for p in group["params"]])

    def step(self, leaves: Sequence[Tensor], slopes: Sequence[Tensor], changes: Changes | None = None) -> list[Tensor]:
        """The leaves after one step along the gradients `slopes`; differentiable in both and in the memory.

        `changes` are the options that a schedule sets for this step.
        """
        self._set(changes, leaves[0].dtype)
        if isinstance(self.optimizer, DifferentiableOptimizer):
            return self._updated(self.optimizer, [leaf.clone() for leaf in leaves], slopes)
        self._seed(leaves, slopes)
        return self._moved([leaf.clone() for leaf in leaves], slopes, torch.clone)

    def step_in_place(
        self, leaves: Sequence[Tensor], slopes: Sequence[Tensor], changes: Changes | None = None
    ) -> list[Tensor]:
        """The same numbers, written over the leaves and the memory, neither of which has a graph."""
        if isinstance(self.optimizer, DifferentiableOptimizer):
            with torch.no_grad():
                return self.step(leaves, slopes, changes)
        self._set(changes, leaves[0].dtype)
        self._seed(leaves, slopes)
        self.optimizer.defaults["differentiable"] = False  # which is where torch looks whether to build a graph
        try:
            return self._moved(list(leaves), list(slopes), lambda tensor: tensor)
        finally:
            self.optimizer.defaults["differentiable"] = True

    def own_memory(self) -> None:
        """Copy the memory, so that steps in place write to nobody else's."""
        if self.memory is not None:
            self.memory = [
                map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, slot)
                for slot in self.memory
            ]

    def _set(self, changes: Changes | None, dtype: torch.dtype) -> None:
        """What a schedule says of this step."""
        for group, change in zip(self.optimizer.param_groups, applied(changes, self._originals), strict=True):
            group |= change
            if self.kind in _DIVIDING:
                # At a rate of 0, where many schedules begin or end, its quotients have no derivative.
                rate, least = change.get("lr", group["lr"]), min(1e-15, torch.finfo(dtype).tiny ** 0.4)
                # In this dtype: a truth value of a tensor times `least` is float32, where that is 0.
                zero = (rate == 0).to(dtype) if isinstance(rate, Tensor) else rate == 0
                group["lr"] = rate + least * zero

    def _updated(
        self, optimizer: DifferentiableOptimizer, leaves: Sequence[Tensor], slopes: Sequence[Tensor]
    ) -> list[Tensor]:
        """One step of the user's own, which changes nothing in place."""
        moved, memory = list(leaves), [dict(slot) for slot in self.memory or [{} for _ in leaves]]
        for group, indices in zip(optimizer.param_groups, self._groups, strict=True):
            for index in indices:
                remembered = optimizer.remembered(memory[index], leaves[index])
                moved[index], after = optimizer.update(leaves[index], slopes[index], remembered, group)
                memory[index] = {OWN: after}
        self.memory = memory
        return moved

    def _seed(self, leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        """What torch's optimiser would remember before its first step."""
        if self.memory is not None or self.kind is None:
            return
        self.memory = [{} for _ in leaves]
        for group, indices in zip(self.optimizer.param_groups, self._groups, strict=True):
            for index in indices:
                self.memory[index] = SEEDS[self.kind](leaves[index], slopes[index], group)

    def _moved(self, fresh: list[Tensor], slopes: Sequence[Tensor], kept: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Let the optimiser write to `fresh`, and to its memory as `kept` hands it over."""
        optimizer = self.optimizer
        optimizer.state.clear()
        for group, indices in zip(optimizer.param_groups, self._groups, strict=True):
            group["params"] = [fresh[index] for index in indices]
        for parameter, slope, remembered in zip(fresh, slopes, self.memory or (), strict=True):
            parameter.grad = slope
            optimizer.state[parameter] = {
                key: kept(value) if isinstance(value, Tensor) else value for key, value in remembered.items()
            }
        if self.kind is optim.NAdam and torch.get_default_dtype() != torch.float64:
            self._round_as_nadam(fresh)
        # Watching every operation costs as much as the step of a small network.
        roots = nullcontext() if self.kind in _WITHOUT_ROOTS else _SquareRootsAtZero()
        with tensor_options(optimizer), roots:
            optimizer.step()
        self.memory = [dict(optimizer.state[parameter]) for parameter in fresh]
        for parameter in fresh:
            parameter.grad = None
        return fresh

    def _round_as_nadam(self, fresh: Sequence[Tensor]) -> None:
        """Make NAdam's running product come out as torch rounds it, in float32, and its use exact in float64."""
        for group, indices in zip(self.optimizer.param_groups, self._groups, strict=True):
            for index in indices:
                state = self.optimizer.state[fresh[index]]
                decay = 0.96 ** ((float(state["step"]) + 1.0) * group["momentum_decay"])
                mu = group["betas"][0] * (1.0 - 0.5 * decay)
                single = mu.float() if isinstance(mu, Tensor) else mu
                state["mu_product"] = (state["mu_product"].float() * single).double() / mu


def _preset(optimizer: optim.Optimizer, parameters: Sequence[Tensor]) -> Memory | None:
    """What the user's factory gave its optimiser to remember, by `load_state_dict` say; None where it is new.

    Adagrad remembers something from the beginning on, which is no preset.
    """
    if isinstance(optimizer, optim.Adagrad) or not any(optimizer.state.get(p) for p in parameters):
        return None
    # Counts of steps in float64, as `SEEDS` has them.
    return [
        {key: value.double() if key == "step" and isinstance(value, Tensor) else value for key, value in slot.items()}
        for slot in remember(optimizer, parameters)
    ]


class _SquareRootsAtZero(TorchFunctionMode):
    r"""Gives square roots a derivative of 0 at exactly 0, where torch's is infinite and makes 0 * inf = NaN.

    An entry whose gradient was 0 since the start (a dead ReLU, an unused class) has v = 0, and Adam's step
    c g / (c' sqrt(v) + eps), v ~ g^2, has the derivative c / eps at g = 0: that of its numerator alone.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.sqrt, Tensor.sqrt) and not kwargs and args[0].requires_grad:
            zero = args[0] == 0
            return torch.where(zero, 0.0, torch.where(zero, 1.0, args[0]).sqrt())
        if func is Tensor.sqrt_ and not kwargs and args[0].requires_grad:
            return args[0].copy_(self.__torch_function__(Tensor.sqrt, types, (args[0].clone(),)))
        return func(*args, **(kwargs or {}))
