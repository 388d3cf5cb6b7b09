"""Batches for ever, from any iterable, with the place in it as plain numbers.

A position is `{"seed": s, "epoch": e, "index": i}`: the next batch is number i of pass e. (A joint player's is a dict
of its members'.) Two draws at the same
position give the same batch, so that a saved position resumes bit for bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from bilevel.errors import ExhaustedDataError
from bilevel.randomness import random_kept

Batch = Any
Position = dict[str, Any]

_LIVE_ITERATORS = 4  # a few consumers may read one stream in turn; each re-reads its epoch if it is pushed out


class Stream:
    """The batches of one player, re-iterated for ever.

    The order within a pass is made from the position's seed and epoch: while a pass begins, PyTorch's global
    generator (and a DataLoader's own) is seeded from them, and the global one is then put back. Live iterators are
    only a cache: any position can be reached again, at the price of skipping to it.
    """

    def __init__(self, owner: str, data: Iterable[Batch]) -> None:
        self.owner = owner
        self.data = data
        self._live: OrderedDict[tuple[int, int, int], Iterator[Batch]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the data. Live iterators cannot travel, and are made again."""
        return {"owner": self.owner, "data": self.data, "_live": OrderedDict()}

    @staticmethod
    def start(seed: int = 0) -> Position:
        """The position of the first batch."""
        return {"seed": seed, "epoch": 0, "index": 0}

    def draw(self, position: Position) -> tuple[Batch, Position]:
        """The batch at a position, and the position after it.

        Raises `ExhaustedDataError` when a pass over the data gives nothing at all.
        """
        seed, epoch, index = position["seed"], position["epoch"], position["index"]
        iterator = self._live.pop((seed, epoch, index), None)
        try:
            if iterator is None:
                iterator, batch = self._skip_to(seed, epoch, index)
            else:
                batch = next(iterator)
        except StopIteration:
            if index == 0:
                raise ExhaustedDataError(
                    f"The data of player {self.owner!r} gave no batch in pass {epoch + 1}. Data must be an iterable "
                    "that can be iterated again and again, such as a list of batches or a DataLoader."
                ) from None
            return self.draw({"seed": seed, "epoch": epoch + 1, "index": 0})
        self._live[(seed, epoch, index + 1)] = iterator
        while len(self._live) > _LIVE_ITERATORS:
            self._live.popitem(last=False)
        return batch, {"seed": seed, "epoch": epoch, "index": index + 1}

    def _skip_to(self, seed: int, epoch: int, index: int) -> tuple[Iterator[Batch], Batch]:
        order = (seed * 1_000_003 + epoch) % 2**63
        with random_kept(start=order):
            if isinstance(self.data, DataLoader) and self.data.generator is not None:
                self.data.generator.manual_seed(order)
            iterator = iter(self.data)
            for _ in range(index + 1):
                batch = next(iterator)
        return iterator, batch
