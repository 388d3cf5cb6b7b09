"""Batches that a run has read, kept for somebody who looks at them once more: nothing is read twice for that."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilevel.game.passes import Place
from bilevel.tree import leaves

Found = tuple[Any, Place]
"""A batch, and the place after it."""


class HeldBatches:
    """Every batch that streams read from now on, by stream and place, up to a size.

    Args:
        most: bytes of tensors. Beyond it all batches are let go, and `full` says so.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._kept: dict[tuple[str, Place], Found] = {}
        self.full = False

    def keep(self, owner: str, place: Place, found: Found) -> None:
        """Keep what `owner`'s stream gave at a place."""
        if self.full or (owner, place) in self._kept:
            return
        self._kept[owner, place] = found
        self._bytes += sum(leaf.nbytes for leaf in leaves(found[0]) if isinstance(leaf, Tensor))
        if self._bytes > self._most:
            self.full = True
            self._kept.clear()

    def find(self, owner: str, place: Place) -> Found | None:
        """What was given at a place; None where it was not, or is gone."""
        return self._kept.get((owner, place))
