r"""A sum over ranks as a part of the derivatives, of any order, in two functions that are each other's transpose.

A rank computes its own share $f_r$ of a loss $f = \sum_r f_r$ from variables y that all ranks hold alike. `entered(y)`
is where y goes into the share, and `summed(f_r)` where the share becomes the whole:

$$
\text{entered}: v \mapsto v, \quad \text{its transpose } \textstyle\sum_r; \qquad
\text{summed}: v_r \mapsto \textstyle\sum_r v_r, \quad \text{its transpose } v \mapsto v
$$

So the transpose of each is the other: a gradient ends in one sum over ranks, and is then held alike by all; a product
with its Hessian, a mixed product, and derivatives of those end in one more each. Nothing that differentiates a loss
knows of it. (Between parts of one network the pair is that of Shoeybi et al. 2019, arXiv 1909.08053.)

Ranks must take part in the same sums in the same order. So what a sum is made of is told to autograd as depending on
all that entered, even where this rank's share happens not to: a batch without a single label, say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.parallel.ranks import Ranks


def entered(ranks: Ranks, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, which all ranks hold alike, as a rank's own share uses them."""
    return list(_Entered.apply(ranks, *tensors)) if tensors else []  # type: ignore[no-untyped-call]


def summed(ranks: Ranks, share: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' shares, each a function of what has `entered`, `inputs`."""
    return _Summed.apply(ranks, share, *inputs)  # type: ignore[no-any-return, no-untyped-call]


def weighted_mean(ranks: Ranks, share: Tensor, weight: float, inputs: Sequence[Tensor]) -> Tensor:
    """The mean of the ranks' losses, weighted; each a function of what has `entered`, `inputs`."""
    # The weights travel with the losses: ranks that know only their own part need no other message.
    wide = share if share.element_size() >= 4 else share.float()
    weighed = torch.stack([wide * weight, torch.full_like(wide.detach(), weight)])
    total = summed(ranks, weighed, inputs)
    return (total[0] / total[1]).to(share.dtype)


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.ranks = inputs[0]
        # The outputs: a derivative of the gradient comes back here through them.
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        own = ctx.saved_tensors
        result: list[Tensor | None] = [None] * len(cotangents)
        flat = torch.cat([cotangents[index].reshape(-1) for index in wanted])
        whole = summed(ctx.ranks, flat, own)
        parts = torch.split(whole, [own[index].numel() for index in wanted])
        for index, part in zip(wanted, parts, strict=True):
            result[index] = part.reshape(own[index].shape)
        return (None, *result)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(entered(ctx.ranks, tangents))

    @staticmethod
    def vmap(info: Any, in_dims: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Any, Any]:
        return _Entered.apply(ranks, *tensors), in_dims[1:]  # type: ignore[no-untyped-call]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ranks: Ranks, share: Tensor, *inputs: Tensor) -> Tensor:
        return ranks.total(share)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.ranks, _, *rest = inputs
        ctx.count = len(rest)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        (given,) = entered(ctx.ranks, [cotangent])
        return (None, given, *([None] * ctx.count))

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *rest: Any) -> Tensor:
        return summed(ctx.ranks, tangent, [])

    @staticmethod
    def vmap(info: Any, in_dims: Any, ranks: Ranks, share: Tensor, *inputs: Tensor) -> tuple[Tensor, Any]:
        return summed(ranks, share, inputs), in_dims[1]
