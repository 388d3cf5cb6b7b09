"""Variables that are one of several options, which a search tries out and nothing differentiates."""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from torch import Tensor

from bilevel.errors import require_kinds


def _is_number(option: object) -> bool:
    return isinstance(option, int | float) and not isinstance(option, bool)


@final
@dataclass(frozen=True, eq=False)
class Choice:
    r"""One of several options: integers, numbers or categories, which `bilevel.search` tries without a derivative.

    Integers are a `range`: `Choice(range(1, 9))` is 1 to 8. Numbers are ordered, whatever order they are given in, and
    neighbours are taken to be alike; the search rounds to the nearest. Anything else, a bool too, is a category: any
    two options are as unlike as any other two.

    A player and a training run that tunes itself refuse it: there is no derivative, and a relaxed value between two
    options is none of them. Search it around the training.

    Args:
        options: Two or more that differ: a `range`, numbers, strings, functions, anything that can be hashed.
        ordered: False takes numbers for categories. Default: as above.
        log: Numbers above 0 are placed by their logarithm: from 16 to 32 is as far as from 32 to 64.
        start: The option that is tried first; default: the middle one of numbers, the first category.

    Raises:
        TypeError, ValueError: For options that are equal, that cannot be hashed, or that `log` has no place for.

    Examples:
        >>> Choice([64, 16, 32], log=True).first, Choice(["sgd", "adam"]).first
        (32, 'sgd')
    """

    options: Sequence[Any]
    ordered: bool | None = None
    log: bool = False
    start: Any = None

    def __post_init__(self) -> None:
        require_kinds(self)
        options = self.options
        if isinstance(options, str) or not isinstance(options, Sequence):
            raise TypeError(
                f"Choice: options is {options!r}; expected a list of options, or a range of integers: "
                "Choice(range(1, 9))."
            )
        if len(options) < 2:
            raise ValueError(f"Choice: {len(options)} options, {options!r}; expected two or more.")
        if not isinstance(options, range):
            self._check_options(options)
        if self.ordered and not self._numbers:
            raise TypeError(f"Choice: ordered=True for {list(options)!r}; expected finite numbers.")
        if self.log and not (self.is_ordered and self.ranked[0] > 0):
            raise ValueError(f"Choice: log=True for {options!r}; expected numbers above 0, with an order.")
        if self.start is not None and self.start not in options:
            raise ValueError(f"Choice: start={self.start!r} is none of the options, {options!r}.")

    @staticmethod
    def _check_options(options: Sequence[Any]) -> None:
        for option in options:
            if not isinstance(option, Hashable) or isinstance(option, Tensor):
                raise TypeError(
                    f"Choice: the option {option!r} is a {type(option).__name__}; expected numbers, strings, functions "
                    "or tuples of them. Choose among names, and look the thing up by its name."
                )
        if len(set(options)) < len(options):
            raise ValueError(f"Choice: some of {list(options)!r} are equal; each option once.")
        if any(isinstance(option, float) and not math.isfinite(option) for option in options):
            raise ValueError(f"Choice: {list(options)!r}; expected finite numbers.")

    @cached_property
    def _numbers(self) -> bool:
        return isinstance(self.options, range) or all(map(_is_number, self.options))

    @property
    def is_ordered(self) -> bool:
        """Whether neighbours are alike."""
        return self._numbers if self.ordered is None else self.ordered

    @cached_property
    def ranked(self) -> Sequence[Any]:
        """The options by rank: numbers ascend, categories stay as they were given."""
        if isinstance(self.options, range):
            return self.options if self.options.step > 0 else self.options[::-1]
        return sorted(self.options) if self.is_ordered else tuple(self.options)

    @property
    def first(self) -> Any:
        """The option that is tried first."""
        if self.start is not None:
            return self.start
        return self.ranked[self.rank_at(0.5)] if self.is_ordered else self.options[0]

    def rank(self, option: Any) -> int:
        """The rank of an option. Raises `ValueError` for one that is none."""
        if option not in self.ranked:
            raise ValueError(f"{option!r} is none of the options, {self.options!r}.")
        return self.ranked.index(option)

    def place(self, rank: int) -> float:
        """Where a number is between the least, 0, and the largest, 1."""
        low, z, high = (float(self.ranked[i]) for i in (0, rank, -1))
        return math.log(z / low) / math.log(high / low) if self.log else (z - low) / (high - low)

    def rank_at(self, place: float) -> int:
        """The rank of the number nearest to a place; of two that are as near, the lower."""
        above = bisect.bisect_left(range(len(self.ranked)), place, key=self.place)
        if above == len(self.ranked):
            return above - 1
        # A midpoint is known to a rounding.
        if above == 0 or self.place(above) - place < place - self.place(above - 1) - 1e-12:
            return above
        return above - 1
