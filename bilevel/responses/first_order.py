"""An answer whose backward pass a response computes by itself, on plain tensors, and which has no second derivative."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import below_transforms, row_by_row, transforms_active, with_signature
from bilevel.errors import BilevelError


class BackwardPass(ABC):
    """What the backward pass through an answer does; a class of its own, so that no pytree opens it."""

    asker: str
    """The response, in words."""
    refusal: str
    """What is said where a second derivative is asked for."""

    @abstractmethod
    def pulled(
        self,
        cotangent: Tensor,
        y: Tensor,
        xs: Sequence[Tensor],
        tensors: Sequence[Tensor] | None,
        wanted: Sequence[int],
    ) -> tuple[Tensor, ...]:
        """c' dy/dx for the wanted of xs, on plain tensors.

        `tensors` are those of the batch, below a transform that may have one for each task; None where there is none
        and the call's own batch stands.
        """


def attach(backward: BackwardPass, y: Tensor, xs: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """y `[n]`, which moves with xs as `backward` says; `nearest(answer, "backward_pass", ...)` finds it again."""
    return _Attached.apply(backward, len(xs), y, *xs, *tensors)  # type: ignore[no-any-return, no-untyped-call]


@with_signature
class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backward_pass: BackwardPass, count: int, y: Tensor, *inputs: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.backward_pass, ctx.count, y, *given = inputs
        ctx.save_for_backward(y, *given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = grads
        rows = row_by_row(lambda row: _Attached.backward(ctx, row), cotangent)
        if rows is not None:
            return rows  # type: ignore[no-any-return]
        backward_pass: BackwardPass = ctx.backward_pass
        count: int = ctx.count
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[3 : 3 + count]) if needed]
        plain = not transforms_active()

        def below(cotangent: Tensor, y: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            xs = [x.detach() for x in given[:count]]
            pulled: tuple[Tensor, ...] = backward_pass.pulled(
                cotangent, y, xs, None if plain else given[count:], wanted
            )
            return pulled

        found = below_transforms(below, [cotangent, *ctx.saved_tensors], backward_pass.refusal)
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for index, derivative in zip(wanted, found, strict=True):
            result[3 + index] = derivative
        return tuple(result)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise BilevelError(
            f"{ctx.backward_pass.asker} has its derivative by a backward pass alone, and one in forward mode was asked "
            "for (torch.func.jvp, jacfwd or hessian). Use torch.func.vjp or jacrev; or Implicit, which has both."
        )
