"""Which part of a tensor each rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A tensor cut along one dimension, as `torch.chunk` cuts it: the first ranks' parts are as large as any.

    Args:
        shape: That of the whole; a number without a dimension is the first rank's.
        dim: The dimension that is cut.
        size: How many ranks there are.
    """

    shape: tuple[int, ...]
    dim: int
    size: int

    @property
    def stacked(self) -> tuple[int, ...]:
        """The shape of the whole, with a dimension to cut."""
        return self.shape or (1,)

    @property
    def entries(self) -> int:
        """How many the whole has."""
        return math.prod(self.shape)

    def rows(self, rank: int) -> tuple[int, int]:
        """Where a rank's part begins and ends."""
        count = self.stacked[self.dim]
        each = -(-count // self.size)
        return min(rank * each, count), min((rank + 1) * each, count)

    def part(self, rank: int) -> tuple[int, ...]:
        """The shape of a rank's part."""
        begin, end = self.rows(rank)
        return (*self.stacked[: self.dim], end - begin, *self.stacked[self.dim + 1 :])

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part, in memory of its own."""
        begin, end = self.rows(rank)
        return (
            whole.reshape(self.stacked)
            .narrow(self.dim, begin, end - begin)
            .clone(memory_format=torch.contiguous_format)
        )

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole, of all ranks' parts."""
        shaped = [part.reshape(self.part(rank)) for rank, part in enumerate(parts)]
        return torch.cat(shaped, dim=self.dim).reshape(self.shape)
