"""Random numbers that a seed fixes, also inside `torch.func.vmap`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.sharding.tensor import ShardedTensor, part_of


class _Request:
    """What to draw; not a pytree, so that vmap hands it over whole."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape = shape
        self.seed = seed


class _Gaussian(torch.autograd.Function):
    @staticmethod
    def forward(like: Tensor, request: _Request) -> Tensor:
        generator = torch.Generator(device=like.device).manual_seed(request.seed)
        return torch.randn(request.shape, generator=generator, dtype=like.dtype, device=like.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, like: Tensor, request: _Request) -> tuple[Tensor, None]:
        # vmap refuses to draw unless told whether systems share numbers. They do: one more system in a batch must not
        # change the answers of the others.
        return gaussian(request.shape, like, request.seed), None


def gaussian(shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers `shape`, of the dtype and on the device of `like`, the same ones for the same seed.

    Beside a vector of which each rank holds a part, this rank's part of those that one process would draw.
    """
    if isinstance(like, ShardedTensor) and shape == tuple(like.shape):
        whole: Tensor = gaussian((like.entries,), like.local, seed)
        return part_of(whole, like)
    drawn: Tensor = _Gaussian.apply(like, _Request(shape, seed))  # type: ignore[no-untyped-call]
    return drawn
