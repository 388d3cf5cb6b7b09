"""The responses' warnings over a run: kept with their steps, told once at its end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bilevel.errors import BilevelWarning, NonConvergenceWarning, UnreliableResponseWarning

_CATEGORIES = {kind.__name__: kind for kind in (NonConvergenceWarning, UnreliableResponseWarning)}


@dataclass(frozen=True)
class RunWarning:
    """A warning as the solution has it; of many games, those that it spoke of in any step (None for all).

    `category`: as what it is issued, because it still holds at the end; None where it does not.
    """

    text: str
    games: frozenset[int] | None = None
    category: type[BilevelWarning] | None = None


class Gathered:
    """One entry for each solver that speaks, whatever numbers it gives; `kept` is plain data, for a checkpoint."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    @contextmanager
    def gathering(self, step: int, *, counted: bool = True) -> Iterator[None]:
        """Keep what our warnings say in a step; other libraries' pass through."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for entry in caught:
            if isinstance(entry.message, BilevelWarning):
                # What an earlier call measured still holds, and is no news.
                self._keep(entry.message, step, counted and not entry.message.repeated)
            else:
                warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)

    def _keep(self, warning: BilevelWarning, step: int, counted: bool) -> None:
        kind, text = type(warning).__name__, str(warning)
        key = f"{kind} {text.split(maxsplit=1)[0]}"
        before = self.kept.get(key, {"count": 0, "games": []})
        spoken_of = None
        if warning.games is not None and before["games"] is not None:
            spoken_of = sorted({*before["games"], *warning.games})
        count = before["count"] + counted
        self.kept[key] = {"count": count, "last": step, "text": text, "kind": kind, "games": spoken_of}

    def told(self, steps: int) -> list[RunWarning]:
        """All of them, after a run of so many steps."""
        found = []
        for kept in self.kept.values():
            when = f"in {kept['count']} of {steps} steps, last in step {min(kept['last'], steps)}"
            when = when if kept["count"] else "in the answer to where the leaders ended"
            games = None if kept["games"] is None else frozenset(kept["games"])
            category = _CATEGORIES.get(kept["kind"], BilevelWarning) if kept["last"] >= steps else None
            found.append(RunWarning(f"{kept['kind']} {when}: {kept['text']}", games, category))
        return found
