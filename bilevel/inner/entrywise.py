"""Gradient descent with a learning rate for each entry: what Meta-SGD learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from bilevel.inner.own import DifferentiableOptimizer
from bilevel.tree import Variables, leaves


@final
class EntrywiseSGD(DifferentiableOptimizer):
    r"""Gradient descent with a learning rate for each entry of each tensor, which a leader may learn.

    $$y_{k+1} = y_k - \alpha_k \odot \nabla_y f(y_k)$$

    The rates have gradients, negative ones included: `Unrolled` differentiates the steps in them.

        meta = Player(query_loss, {"init": ..., "rates": ...}, optimizer_hyper=True)
        Unrolled(lambda params, meta: EntrywiseSGD(params, meta["rates"]), steps=1)

    Args:
        params: The tensors, or (name, tensor) pairs, as a factory receives them.
        rates: A tensor for each of them, in the same order, that broadcasts to its shape: a list, or a nest such as a
            dict by name, which is read in its order.
        per_step: Whether each rate has a leading dimension for the steps, of which step k takes entry k.

    Raises:
        ValueError: For another number of rates than of tensors, and where there are more steps than rates.

    Source: Li et al. 2017 (arXiv 1707.09835).

    Examples:
        >>> import torch
        >>> y = torch.tensor([2.0, 2.0], requires_grad=True)
        >>> y.square().sum().backward()
        >>> EntrywiseSGD([y], [torch.tensor([0.25, 0.5])]).step()
        >>> y
        tensor([1., 0.], requires_grad=True)
    """

    def __init__(self, params: Sequence[Any], rates: Variables, per_step: bool = False) -> None:
        given, found = list(params), leaves(rates)
        if len(found) != len(given):
            raise ValueError(f"EntrywiseSGD: {len(found)} rates for {len(given)} tensors; expected one for each.")
        groups = [{"params": [entry], "lr": rate} for entry, rate in zip(given, found, strict=True)]
        super().__init__(groups, {"per_step": per_step})

    def first_memory(self, y: Tensor) -> Any:
        """How many steps were taken."""
        return {"taken": 0}

    def update(self, y: Tensor, gradient: Tensor, memory: Any, options: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """One step, each entry by its own rate."""
        rate, taken = options["lr"], memory["taken"]
        if options["per_step"]:
            if taken >= len(rate):
                raise ValueError(
                    f"EntrywiseSGD: step {taken + 1} has no rate, for there are rates for {len(rate)} steps. Take no "
                    "more steps, and begin every call anew: Unrolled(warm_start=False)."
                )
            rate = rate[taken]
        return y - rate * gradient, {"taken": taken + 1}
