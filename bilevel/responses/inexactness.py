"""How much less than the accuracy asked for is enough while the leader is still far from its goal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from bilevel.errors import require_kinds


class Inexactness(ABC):
    """A factor on an `Implicit` response's tolerances, at least 1, that falls to 1 as the leader gets on.

    The follower's `tolerance`, the linear solver's `rtol` and its `stopping` are multiplied by it (never beyond 1/2).
    Hypergradients that are wrong by little beside the leader's next step take it the same way for less work; a sum of
    errors that stays finite leaves the limit where it is (Pedregosa 2016, arXiv 1602.02355). Warnings are issued
    against the loosened tolerances, so let the run go on until the factor is 1 before its end is trusted.
    """

    @abstractmethod
    def factor(self, calls: int, movement: float) -> float:
        """The factor for the call after `calls` others.

        `movement` is how far the leader moved since the last call, in units of its first move; 1 before there is one.
        """


@final
@dataclass(frozen=True)
class Geometric(Inexactness):
    """start * rate^calls: a schedule fixed beforehand.

    >>> Geometric(start=100.0, rate=0.5).factor(3, 1.0)
    12.5
    """

    start: float = 1e3
    rate: float = 0.8

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if not self.start >= 1.0 or not 0.0 < self.rate < 1.0:
            raise ValueError(f"{self}: expected a start of at least 1 and a rate between 0 and 1.")

    def factor(self, calls: int, movement: float) -> float:
        """The factor for the call after `calls` others."""
        return max(1.0, self.start * self.rate**calls)


@final
@dataclass(frozen=True)
class AsLeaderMoves(Inexactness):
    """start * movement^power: as exact as the leader's steps are small.

    It needs a leader whose steps shrink as it arrives, by plain gradients or a falling rate; Adam's at a constant rate
    do not.

    >>> AsLeaderMoves(start=100.0).factor(7, 0.05)
    5.0
    """

    start: float = 1e3
    power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if not self.start >= 1.0 or not self.power > 0.0:
            raise ValueError(f"{self}: expected a start of at least 1 and a power above 0.")

    def factor(self, calls: int, movement: float) -> float:
        """The factor for a leader that last moved this far."""
        return max(1.0, self.start * float(movement**self.power))
