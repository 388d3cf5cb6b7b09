"""A rank's part of a batch, and what it weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from bilevel.game.data import Batch
from bilevel.tree import leaves, map_leaves

Examples = Callable[[Batch], Any]
"""From a batch to how many examples it holds, in whatever unit a loss is a mean over."""


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's part of a batch.

    Args:
        batch: its examples; where there are fewer than ranks one of them, so that there is something to evaluate.
        weight: how many they are; 0 where they count for nothing.
    """

    batch: Batch
    weight: float


def part_of(player: str, batch: Batch, rank: int, size: int, *, sharded: bool, examples: Examples | None) -> Part:
    """The part of a batch that a rank of `size` takes: of a whole batch its share of the rows, in order."""
    if batch is None:
        return Part(None, 1.0)
    if sharded:
        return Part(batch, weight(player, batch, examples))
    count = rows_in(player, batch)
    begin, end = rank * count // size, (rank + 1) * count // size
    if begin == end:
        return Part(rows(batch, [0]), 0.0)
    own = rows(batch, slice(begin, end))
    return Part(own, weight(player, own, examples))


def weight(player: str, batch: Batch, examples: Examples | None) -> float:
    """How many examples a batch holds: its rows, or as `examples` counts them."""
    if examples is None:
        return float(rows_in(player, batch))
    found = float(examples(batch))
    if not 0.0 <= found < float("inf"):
        raise ValueError(f"DataParallel: examples= counted {found} in a batch of player {player!r}; expected >= 0.")
    return found


def rows_in(player: str, batch: Batch) -> int:
    """The leading dimension that all tensors of a batch share; those of no dimension are everybody's.

    Raises:
        ValueError: Where they share none.
    """
    sizes = list(dict.fromkeys(leaf.shape[0] for leaf in _stacked(batch)))
    if len(sizes) == 1 and sizes[0] > 0:
        return int(sizes[0])
    came = f"tensors with leading dimensions {sizes}" if sizes else "no tensor with a dimension"
    raise ValueError(
        f"DataParallel: the batches of player {player!r} hold {came}; expected one leading dimension, the examples, "
        "which are dealt out to the ranks. What all examples share is a constant of the loss; batches of another form "
        "can be made by each rank for itself: DataParallel(sharded=True, examples=lambda batch: ...)."
    )


def rows(batch: Batch, which: slice | Sequence[int]) -> Batch:
    """Some rows of a batch."""
    return map_leaves(lambda leaf: leaf[which] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch)


def is_sharded(data: Any) -> bool:
    """Whether data are dealt out to the ranks by a DistributedSampler."""
    return sampler_of(data) is not None


def sampler_of(data: Any) -> DistributedSampler[Any] | None:
    """The DistributedSampler of a DataLoader; None without one."""
    if not isinstance(data, DataLoader):
        return None
    batches = data.batch_sampler
    within = [data.sampler, batches, batches.sampler if isinstance(batches, torch.utils.data.BatchSampler) else None]
    return next((sampler for sampler in within if isinstance(sampler, DistributedSampler)), None)


def _stacked(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
