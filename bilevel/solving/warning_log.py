"""The responses' warnings over a run: logged with their steps, told once at its end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bilevel.errors import (
    BilevelWarning,
    InfeasibleWarning,
    KinkWarning,
    NonConvergenceWarning,
    UnreliableResponseWarning,
)

_KINDS = (InfeasibleWarning, KinkWarning, NonConvergenceWarning, UnreliableResponseWarning)
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
    """

    text: str
    games: frozenset[int] | None = None
    category: type[BilevelWarning] | None = None


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
        before = after.get(key, {"count": 0, "counted": -1, "games": []})
        spoken_of = None
        if warning.games is not None and before["games"] is not None:
            spoken_of = sorted({*before["games"], *warning.games})
        # What an earlier call measured still holds, and is no news; and several leaders may hear of it in one step.
        news = counted and not warning.repeated and before.get("counted") != step
        after[key] = {
            "count": before["count"] + news,
            "counted": step if news else before.get("counted"),
            "last": step,
            "text": text,
            "kind": kind,
            "games": spoken_of,
        }
    return after


def as_run_warnings(log: Log, steps: int) -> list[RunWarning]:
    """All that was logged, after a run of so many steps."""
    found = []
    for entry in log.values():
        when = f"in {entry['count']} of {steps} steps, last in step {min(entry['last'], steps)}"
        when = when if entry["count"] else "in the answer to where the leaders ended"
        games = None if entry["games"] is None else frozenset(entry["games"])
        category = _CATEGORIES.get(entry["kind"], BilevelWarning) if entry["last"] >= steps else None
        found.append(RunWarning(f"{entry['kind']} {when}: {entry['text']}", games, category))
    return found
