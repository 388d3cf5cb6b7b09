"""Directions of which a batch tells a part, corrected by what other batches told before: less variance a step."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, cast, final

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bilevel.errors import require_kinds
from bilevel.tree import leaves, version

_MOST = 10_000  # batches of a first pass without a length, after which it is held to be endless

__all__ = ["SAGA", "SARAH", "BatchMean", "VarianceReduction"]

Memory = dict[str, Any]
"""What is remembered from step to step: tensors, numbers and strings; {} before the first step."""


class BatchMean(Protocol):
    """A mean over the batches of a pass, `[n]`, of which a step sees one batch.

    Attributes:
        owner: Whose data they are, for errors.
        batch: The present one; None without data.
        epoch: The pass that it is of; None where that is not known.
        length: How many batches a pass has; None where the data do not say.
    """

    owner: str
    batch: Any
    epoch: int | None
    length: int | None

    @property
    def point(self) -> Tensor:
        """Where the step is, `[p]`."""

    def here(self) -> Tensor:
        """What the present batch says at the present point."""

    def at(self, point: Tensor) -> Tensor:
        """What the present batch says at another point, with the same random numbers."""

    def everywhere(self) -> Tensor:
        """The mean over all the batches of a pass at the present point."""


class VarianceReduction(ABC):
    """Makes a step's direction from what its batch says and what it remembers; a configuration without state."""

    @abstractmethod
    def direction(self, mean: BatchMean, memory: Memory) -> tuple[Tensor, Memory]:
        """The direction `[n]`, and a new memory; the old one stays as it is."""


@final
@dataclass(frozen=True)
class SAGA(VarianceReduction):
    r"""What the batch says, less what it said when it last came, plus the mean of what all have said last:

    $$
    d = s_i(p) - J_i + \frac1N \sum_j J_j, \qquad J_i \leftarrow s_i(p)
    $$

    With constant steps it converges linearly on strongly convex problems. The first pass, which fills the table, is as
    without it.

    Batches are known by their content, and may come in another order in each pass: data that put other examples
    together in each pass (a shuffled `DataLoader`) have no table. Costs the table in memory, one direction for each
    batch, and a digest of the batch a step; tensors that come again, and that torch has not written to, are only
    glanced at.

    Raises:
        ValueError: When a pass has a batch that the first one had not, or the same one twice; and when the first has
            not ended after 10,000 batches, nor has a length above that.

    Source: Defazio et al. 2014 (arXiv 1407.0202); for bilevel problems, SABA, Dagréou et al. 2022 (arXiv 2201.13409).

    Examples:
        >>> SAGA()
        SAGA()
    """

    def direction(self, mean: BatchMean, memory: Memory) -> tuple[Tensor, Memory]:
        """Corrected by the table."""
        table: dict[str, Tensor] = dict(memory.get("table", {}))
        seen: dict[str, int] = dict(memory.get("seen", {}))
        key, count = digest(mean.batch), int(memory.get("count", 0))
        now, before = mean.here(), table.get(key)
        first = memory.get("first", mean.epoch)
        if before is None and (count > len(table) or (mean.epoch is not None and mean.epoch != first)):
            raise ValueError(
                f"SAGA keeps an entry for each batch, and the data of player {mean.owner!r} gave a batch that was not "
                "in the first pass. Make the batches once, data=list(loader); their order may change from pass to pass."
            )
        if before is not None and mean.epoch is not None and seen.get(key) == mean.epoch:
            raise ValueError(
                f"SAGA keeps an entry for each batch, and the data of player {mean.owner!r} gave the same one twice in "
                "a pass. Leave it out of the list, or make larger batches."
            )
        if before is None and len(table) >= max(_MOST, mean.length or 0):
            raise ValueError(
                f"SAGA keeps an entry for each batch, and the data of player {mean.owner!r} have given {len(table):,} "
                "in their first pass and have not ended. Use SARAH(period) on data that end, or make the batches "
                "once, data=list(loader)."
            )
        table[key], seen[key] = now, -1 if mean.epoch is None else mean.epoch
        old = memory.get("mean")
        if before is None:
            # Of a batch that never came nothing is subtracted: its step is a plain one.
            told, average = now, now if old is None else old + (now - old) / len(table)
        else:
            assert old is not None
            told, average = now - before + old, old + (now - before) / len(table)
        if count % len(table) == len(table) - 1:  # once a pass anew: sums of differences drift
            average = sum(table.values(), now.new_zeros(())) / len(table)
        return told, {"table": table, "seen": seen, "mean": average, "count": count + 1, "first": first}


@final
@dataclass(frozen=True)
class SARAH(VarianceReduction):
    r"""The last direction, and how what the batch says has changed since: all of the data at the start of each period.

    $$
    d_t = \frac1N \sum_j s_j(p_t) \;\text{ if } t \bmod \text{period} = 0, \qquad
    d_t = d_{t-1} + s_i(p_t) - s_i(p_{t-1}) \;\text{ else}
    $$

    With constant steps it converges linearly on strongly convex problems. Any data will do. Costs two evaluations a
    step, a pass a period, and memory for one direction and one point.

    Args:
        period: Steps between two passes over the data; about half the number of the batches of both players is the
            setting of the paper's experiments.

    Raises:
        ValueError: For a period below 1.
        DataError: When a pass has not ended after 10,000 batches of data without a length.

    Source: Nguyen et al. 2017 (arXiv 1703.00102); for bilevel problems, SRBA, Dagréou et al. 2024 (arXiv 2302.08766).

    Examples:
        >>> SARAH(period=16).period
        16
    """

    period: int

    def __post_init__(self) -> None:
        require_kinds(self)
        if not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"SARAH: period={self.period!r}; expected a whole number of steps, at least 1.")

    def direction(self, mean: BatchMean, memory: Memory) -> tuple[Tensor, Memory]:
        """Anew, or the last one moved on."""
        taken = int(memory.get("taken", 0))
        if taken % self.period == 0:
            found = mean.everywhere()
        else:
            found = memory["direction"] + mean.here() - mean.at(memory["point"])
        return found, {"direction": found, "point": mean.point.clone(), "taken": (taken + 1) % self.period}


def digest(batch: Any) -> str:
    """What a batch is known by: equal tensors, equal digest."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in leaves(batch):
        found.update(_tensor_digest(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
    return found.hexdigest()


# To read a batch of 32 x 600 numbers takes a quarter of such a step's own work, and mostly the same tensors come again.
_READ: Any = WeakTensorKeyDictionary()
"""Tensor -> what it was known by when it was read, and its digest; of tensors that are still there."""
_GLANCED = 64
"""Entries that are looked at again: torch's count of writes does not have those through a NumPy array."""


def _tensor_digest(tensor: Tensor) -> bytes:
    now, known = (version(tensor), _glance(tensor)), cast("tuple[Any, bytes] | None", _READ.get(tensor))
    if known is not None and known[0] == now and now[0] >= 0:  # what inference mode made has no version
        return known[1]
    content = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content.update(flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    _READ[tensor] = now, content.digest()
    return content.digest()


def _glance(tensor: Tensor) -> list[Any]:
    """Some entries, evenly spaced; none of what no NumPy array can write to."""
    if tensor.device.type != "cpu":
        return []
    flat = tensor.detach().reshape(-1)
    found: list[Any] = flat[:: max(1, len(flat) // _GLANCED)].tolist()
    return found
