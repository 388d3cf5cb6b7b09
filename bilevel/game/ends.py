"""Whether a pass over data ends: by what the data say, and, of those that say nothing, up to a limit."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sized
from typing import Any, Final

MOST: Final = 10_000
"""Batches after which a pass over data without a length is held to be endless, where somebody reads all of it."""

_NEVER = 10**9  # batches that nobody lives to see; whoever says sys.maxsize means that there is no end


def length_of(data: object) -> int | None:
    """How many batches a pass has, as far as the data say."""
    if isinstance(data, Sized):
        try:
            return len(data)
        except (TypeError, NotImplementedError, OverflowError):  # a loader over data, or a sampler, without a length
            pass
    return None


def never_ends(data: object, iterators: Iterator[Iterator[Any]]) -> str:
    """Why a pass is known to have no end, from the data and iterators that they gave; empty where it is not known."""
    length = length_of(data)
    if length is not None and length > _NEVER:
        return f"their length is {length:,}"
    for iterator in iterators:
        if isinstance(iterator, itertools.cycle | itertools.count):
            return f"their iterator is an itertools.{type(iterator).__name__}"
        if isinstance(iterator, itertools.repeat) and operator.length_hint(iterator, -1) < 0:
            return "their iterator is itertools.repeat(batch), without a number of times"
    return ""


def most_of(data: object) -> int:
    """How many batches of a pass are read before it is held to be endless."""
    length = length_of(data)
    # A loader over an IterableDataset with workers may give some more than it says.
    return MOST if length is None else max(MOST, 2 * length)
