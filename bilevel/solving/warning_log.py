"""The responses' warnings over a run: logged with their steps, told once at its end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bilevel.errors import (
    BilevelWarning,
    FollowerNonConvergenceWarning,
    InfeasibleWarning,
    KinkWarning,
    LeaderNonConvergenceWarning,
    LinearNonConvergenceWarning,
    NonConvergenceWarning,
    UnreliableResponseWarning,
)

NOT_CONVERGED = (FollowerNonConvergenceWarning, LeaderNonConvergenceWarning, LinearNonConvergenceWarning)
_KINDS = (InfeasibleWarning, KinkWarning, NonConvergenceWarning, *NOT_CONVERGED, UnreliableResponseWarning)
_CATEGORIES = {kind.__name__: kind for kind in _KINDS}

Log = Mapping[str, Mapping[str, Any]]
"""Plain data, for a checkpoint: one entry for each solver that warns, whatever numbers its message gives."""


@dataclass(frozen=True)
class RunWarning:
    """A warning as the solution has it.

    Args:
        text: what it says, and in how many steps it was said.
        games: of many games, those that it spoke of in any step; None for all.
        category: as what it is issued, because it still holds at the end; None where it does not.
        holding: of many games, those of which it held at the end; None for all.
    """

    text: str
    games: frozenset[int] | None = None
    category: type[BilevelWarning] | None = None
    holding: frozenset[int] | None = None

    @property
    def not_converged(self) -> str:
        """What has not converged at the end, in the words of `NonConvergenceWarning.of`; empty where all has."""
        kind = self.category
        return kind.of if kind is not None and issubclass(kind, NonConvergenceWarning) else ""


def not_converged(told: Sequence[RunWarning]) -> tuple[str, ...]:
    """What had not converged where a run ended: of "follower", "leader" and "linear system"."""
    found = {warning.not_converged for warning in told}
    return tuple(kind.of for kind in NOT_CONVERGED if kind.of in found)


@contextmanager
def caught() -> Iterator[list[BilevelWarning]]:
    """Our warnings, in a list that is filled at the end; other libraries' pass through."""
    ours: list[BilevelWarning] = []
    with warnings.catch_warnings(record=True) as entries:
        warnings.simplefilter("always")
        yield ours
    for entry in entries:
        if isinstance(entry.message, BilevelWarning):
            ours.append(entry.message)
        else:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)


def logged(log: Log, new: Sequence[BilevelWarning], step: int, *, counted: bool = True) -> Log:
    """The log with the warnings of one more step, which `counted` says was one of the run's."""
    after = dict(log)
    for warning in new:
        kind, text = type(warning).__name__, str(warning)
        key = " ".join((kind, *text.split(maxsplit=2)[:2]))
        before = after.get(key, {"count": 0, "counted": -1, "games": [], "now": [], "last": step})
        spoken_of = _both(before["games"], warning.games)
        # What an earlier call measured still holds, and is no news; and several leaders may hear of it in one step.
        news = counted and not warning.repeated and before.get("counted") != step
        after[key] = {
            "count": before["count"] + news,
            "counted": step if news else before.get("counted"),
            "last": step,
            "text": text,
            "kind": kind,
            "games": spoken_of,
            "now": _both(before["now"] if before["last"] == step else [], warning.games),
        }
    return after


def as_run_warnings(log: Log, steps: int) -> list[RunWarning]:
    """All that was logged, after a run of so many steps."""
    found = []
    for entry in log.values():
        when = f"in {entry['count']} of {steps} steps, last in step {min(entry['last'], steps)}"
        when = when if entry["count"] else "in the answer to where the leaders ended"
        games, now = (None if entry[key] is None else frozenset(entry[key]) for key in ("games", "now"))
        category = _CATEGORIES.get(entry["kind"], BilevelWarning) if entry["last"] >= steps else None
        found.append(RunWarning(f"{entry['kind']} {when}: {entry['text']}", games, category, now))
    return found


def _both(some: Sequence[int] | None, others: Sequence[int] | None) -> list[int] | None:
    """The numbers of either; None, which is all of them, where either is."""
    return None if some is None or others is None else sorted({*some, *others})
