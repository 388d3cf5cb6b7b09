"""Variables that live in a range: losses see the natural value, a leader's optimiser moves one without bounds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.errors import require_kinds


class Coordinate(ABC):
    r"""A range with a smooth map from all numbers into it, in the place of a tensor in `Player(..., init=...)`.

    The loss, the callbacks and the solution have the natural value z. `solve` steps a leader along u with z = map(u): a
    step never leaves the range, and its size is that of u. A follower stays in the same range as in a `Box(low, high)`,
    and its solver moves z itself.

    The ends of the range are never reached, and near them u moves much for little: a variable whose best value may be
    an end is better kept by `domain=bl.Box(low, high)`.
    """

    start: float | Tensor | None

    @property
    @abstractmethod
    def range(self) -> tuple[float, float]:
        """The open range of z."""

    @abstractmethod
    def natural(self, u: Tensor) -> Tensor:
        """z; differentiable."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """u."""

    @property
    @abstractmethod
    def middle(self) -> float:
        """Where z starts when nothing is said."""

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """Where z starts; a plain number takes the dtype and device of `like`."""
        if isinstance(self.start, Tensor):
            return self.start.detach().clone()
        value = self.middle if self.start is None else self.start
        if like is None:
            return torch.tensor(value, dtype=torch.get_default_dtype())
        return torch.tensor(value, dtype=like.dtype, device=like.device)

    def _check(self) -> None:
        low, high = self.range
        name = type(self).__name__
        if not low < high:
            raise ValueError(f"{name}: the range is from {low} to {high}; expected low < high.")
        if not (self.start is None or isinstance(self.start, int | float | Tensor)) or isinstance(self.start, bool):
            raise TypeError(f"{name}: start is a {type(self.start).__name__}; expected a number or a tensor.")
        # In the precision that it is moved in: in float32 an end may be met sooner.
        start = self.tensor()
        if not bool(((start > low) & (start < high)).all()) or not bool(torch.isfinite(self.inverse(start)).all()):
            raise ValueError(
                f"{name}: start={self.start}; expected numbers between {low} and {high}, and neither of the two, which "
                "no finite coordinate reaches. A variable that may lie at an end has domain=bilevel.Box(low, high)."
            )


def _between(u: Tensor, low: float, high: float) -> Tensor:
    """From all numbers to (low, high), as exact near the one end as near the other."""
    return torch.where(u < 0.0, low + (high - low) * u.sigmoid(), high - (high - low) * (-u).sigmoid())


def _logit(z: Tensor, low: float, high: float) -> Tensor:
    return (z - low).log() - (high - z).log()


@final
@dataclass(frozen=True, eq=False)
class Interval(Coordinate):
    r"""A number between low and high, $z = \text{low} + (\text{high} - \text{low})\, \sigma(u)$.

    Args:
        low: A finite number.
        high: A larger one.
        start: A number or a tensor of them; default: the middle.

    Examples:
        >>> Interval(-1.0, 3.0).tensor()
        tensor(1.)
    """

    low: float
    high: float
    start: float | Tensor | None = None

    def __post_init__(self) -> None:
        require_kinds(self)
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"Interval: from {self.low} to {self.high}; expected finite ends, else use Positive().")
        self._check()

    @property
    def range(self) -> tuple[float, float]:
        """From low to high."""
        return self.low, self.high

    @property
    def middle(self) -> float:
        """The middle."""
        return 0.5 * (self.low + self.high)

    def natural(self, u: Tensor) -> Tensor:
        """z."""
        return _between(u, self.low, self.high)

    def inverse(self, z: Tensor) -> Tensor:
        """u."""
        return _logit(z, self.low, self.high)


@final
@dataclass(frozen=True, eq=False)
class Unit(Coordinate):
    r"""A share, $0 \le \text{low} < z < \text{high} \le 1$: a dropout rate, a smoothing; the map is `Interval`'s.

    Args:
        low: At least 0.
        high: At most 1.
        start: A number or a tensor of them; default: the middle.

    Examples:
        >>> Unit(0.0, 0.9, start=0.2).tensor()
        tensor(0.2000)
    """

    low: float = 0.0
    high: float = 1.0
    start: float | Tensor | None = None

    def __post_init__(self) -> None:
        require_kinds(self)
        if not (self.low >= 0.0 and self.high <= 1.0):
            raise ValueError(f"Unit: from {self.low} to {self.high}; expected a range within 0 and 1. Use Interval().")
        self._check()

    @property
    def range(self) -> tuple[float, float]:
        """From low to high."""
        return self.low, self.high

    @property
    def middle(self) -> float:
        """The middle."""
        return 0.5 * (self.low + self.high)

    def natural(self, u: Tensor) -> Tensor:
        """z."""
        return _between(u, self.low, self.high)

    def inverse(self, z: Tensor) -> Tensor:
        """u."""
        return _logit(z, self.low, self.high)


@final
@dataclass(frozen=True, eq=False)
class Log(Coordinate):
    r"""A positive number whose size is unknown, between low and high: $\log z$ is in an `Interval`.

    A step of u is a factor of z: from 1e-6 to 1e-5 is as far as from 1e-2 to 1e-1.

    Args:
        low: Above 0.
        high: A larger finite number.
        start: A number or a tensor of them; default: the geometric mean.

    Examples:
        >>> Log(1e-6, 1e-2).tensor()
        tensor(1.0000e-04)
    """

    low: float
    high: float
    start: float | Tensor | None = None

    def __post_init__(self) -> None:
        require_kinds(self)
        if not (self.low > 0.0 and math.isfinite(self.high)):
            raise ValueError(f"Log: from {self.low} to {self.high}; expected low > 0 and a finite high.")
        self._check()

    @property
    def range(self) -> tuple[float, float]:
        """From low to high."""
        return self.low, self.high

    @property
    def middle(self) -> float:
        """The geometric mean."""
        return math.sqrt(self.low) * math.sqrt(self.high)

    def natural(self, u: Tensor) -> Tensor:
        """z."""
        return _between(u, math.log(self.low), math.log(self.high)).exp()

    def inverse(self, z: Tensor) -> Tensor:
        """u."""
        return _logit(z.log(), math.log(self.low), math.log(self.high))


@final
@dataclass(frozen=True, eq=False)
class Positive(Coordinate):
    r"""A number above 0, $z = e^u$.

    Args:
        start: A number or a tensor of them; default 1.

    Examples:
        >>> Positive(2.0).tensor()
        tensor(2.)
    """

    start: float | Tensor | None = None

    def __post_init__(self) -> None:
        require_kinds(self)
        self._check()

    @property
    def range(self) -> tuple[float, float]:
        """From 0 to infinity."""
        return 0.0, math.inf

    @property
    def middle(self) -> float:
        """1."""
        return 1.0

    def natural(self, u: Tensor) -> Tensor:
        """z."""
        return u.exp()

    def inverse(self, z: Tensor) -> Tensor:
        """u."""
        return z.log()
