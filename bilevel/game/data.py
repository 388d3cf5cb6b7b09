"""Batches for ever, from any iterable, with the place in it as plain numbers.

A position is `{"seed": s, "epoch": e, "index": i}`: the next batch is number i of pass e. (A joint player's is a dict
of its members'.) Two draws at the same
position give the same batch, so that a saved position resumes bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from bilevel.errors import ExhaustedDataError
from bilevel.randomness import random_kept

Batch = Any
Position = dict[str, Any]
_Place = tuple[int, int, int]

_LIVE_ITERATORS = 4  # a few consumers may read one stream in turn; each re-reads its epoch if it is pushed out


class Stream:
    """The batches of one player, re-iterated for ever.

    The order within a pass is made from the position's seed and epoch, and each batch's own random numbers (an
    augmentation's) from its place in the pass too: while a batch is drawn, PyTorch's global generator (and a
    DataLoader's own) is seeded from them, and the global one is then put back. Live iterators are only a
    cache: any position can be reached again, at the price of skipping to it. Random numbers from elsewhere, NumPy's or
    Python's, are the user's to keep.
    """

    def __init__(self, owner: str, data: Iterable[Batch]) -> None:
        self.owner = owner
        self.data = data
        self._live: OrderedDict[_Place, Iterator[Batch]] = OrderedDict()
        self._latest: tuple[_Place, Batch, Position] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the data. Live iterators cannot travel, and are made again."""
        return {"owner": self.owner, "data": self.data, "_live": OrderedDict(), "_latest": None}

    @staticmethod
    def start(seed: int = 0) -> Position:
        """The position of the first batch."""
        return {"seed": seed, "epoch": 0, "index": 0}

    def draw(self, position: Position) -> tuple[Batch, Position]:
        """The batch at a position, and the position after it.

        Raises `ExhaustedDataError` when a pass over the data gives nothing at all.
        """
        seed, epoch, index = position["seed"], position["epoch"], position["index"]
        # What was only looked at is drawn once more: a second read would begin the pass anew, to skip to it.
        if self._latest is not None and self._latest[0] == (seed, epoch, index):
            return self._latest[1], dict(self._latest[2])
        iterator = self._live.pop((seed, epoch, index), None)
        try:
            if iterator is None:
                iterator, batch = self._skip_to(seed, epoch, index)
            else:
                with self._drawing(seed, epoch, index):
                    batch = next(iterator)
        except StopIteration:
            if index == 0:
                raise ExhaustedDataError(
                    f"The data of player {self.owner!r} gave no batch in pass {epoch + 1}. Data must be an iterable "
                    "that can be iterated again and again, such as a list of batches or a DataLoader."
                ) from None
            found = self.draw({"seed": seed, "epoch": epoch + 1, "index": 0})
            self._latest = (seed, epoch, index), *found
            return found
        self._live[(seed, epoch, index + 1)] = iterator
        while len(self._live) > _LIVE_ITERATORS:
            self._live.popitem(last=False)
        after = {"seed": seed, "epoch": epoch, "index": index + 1}
        self._latest = (seed, epoch, index), batch, after
        return batch, dict(after)

    def _skip_to(self, seed: int, epoch: int, index: int) -> tuple[Iterator[Batch], Batch]:
        with self._drawing(seed, epoch, 0):
            iterator = iter(self.data)
            batch = next(iterator)
        for place in range(1, index + 1):
            with self._drawing(seed, epoch, place):
                batch = next(iterator)
        return iterator, batch

    @contextmanager
    def _drawing(self, seed: int, epoch: int, index: int) -> Iterator[None]:
        """Random numbers that depend on the position alone."""
        own = (seed * 1_000_003 + epoch + index * 0x9E3779B97F4A7C15) % 2**63
        with random_kept(start=own):
            if isinstance(self.data, DataLoader) and self.data.generator is not None:
                self.data.generator.manual_seed(own)
            yield
