"""What many starts of one game came to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

_CLOSE = 1e-6


@dataclass(frozen=True)
class Spread:
    """What many starts came to.

    Attributes:
        leader: Whose loss was compared.
        values: Its loss at the end of each; NaN where the run failed.
        violations: The largest violation of its functions at the end of each; 0 where it has none.
        not_converged: What had not converged at the end of each, as `Solution.not_converged`.
        best: The number of the start whose end is the solution.
        tolerance: The violation up to which an end counts as feasible.
        failures: Start -> the error that its run ended with.
        together: Whether they were played at once, as `Games`.
    """

    leader: str
    values: tuple[float, ...]
    violations: tuple[float, ...]
    not_converged: tuple[tuple[str, ...], ...]
    best: int
    tolerance: float
    failures: Mapping[int, str]
    together: bool

    def __str__(self) -> str:
        """In one line."""
        kept = self._feasible
        told = f"Best of {len(self.values)} starts: number {self.best}."
        if kept:
            low, high = min(kept), max(kept)
            near = sum(value - low <= _CLOSE * (1.0 + abs(low)) for value in kept)
            told += (
                f" The loss of {self.leader!r} ends between {low:.6g} and {high:.6g}, median "
                f"{statistics.median(kept):.6g}; {near} of {len(kept)} within {_CLOSE:g} of the best."
            )
        broken = len(self.values) - len(kept) - len(self.failures)
        told += f" {broken} broke its functions." if broken else ""
        short = {what: sum(what in left for left in self.not_converged) for left in self.not_converged for what in left}
        if short:
            counts = ", ".join(f"the {what} of {count}" for what, count in short.items())
            told += f" Not converged: {counts}."
            lower = [value for value in kept if value < self.values[self.best]]
            if lower:
                told += (
                    f" {len(lower)} ended lower, the lowest at {min(lower):.6g}, at a follower that stopped short, and "
                    f"{'is' if len(lower) == 1 else 'are'} passed over."
                )
        if self.failures:
            told += f" {len(self.failures)} failed, the first with: {next(iter(self.failures.values()))}"
        return told

    @property
    def _feasible(self) -> list[float]:
        pairs = zip(self.values, self.violations, strict=True)
        return [value for value, off in pairs if not math.isnan(value) and off <= self.tolerance]
