"""All that a comparison measured, as plain data: what figures, tables and pages are made of."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bilevel.comparison.rows import Reference, Row, Summary, summarise

Laws = Mapping[str, Sequence[tuple[str, str, str]]]
"""For each response (law, verdict, note): a verdict is "passed", "failed" or another word."""


@dataclass(frozen=True, eq=False)
class Measurements(ABC):
    """The data of a `Comparison`, below the modules that show it."""

    rows: tuple[Row, ...]
    references: tuple[Reference, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    laws: Laws = field(default_factory=dict)

    @property
    def games(self) -> tuple[str, ...]:
        """The games, in their order."""
        return tuple(dict.fromkeys(row.game for row in self.rows))

    @property
    def responses(self) -> tuple[str, ...]:
        """The responses, in their order."""
        return tuple(dict.fromkeys(row.response for row in self.rows))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in their order."""
        return tuple(dict.fromkeys(row.seed for row in self.rows))

    @property
    def summaries(self) -> list[Summary]:
        """Medians and ranges over the seeds, one for each game and response."""
        return summarise(self.rows, self.references)

    @property
    def warnings(self) -> list[str]:
        """Every failure, then every warning, with the runs that it is of; the same words are told once a run."""
        failures, rest = [], []
        for row in self.rows:
            who = f"{row.response} on {row.game}"
            if row.failure is not None:
                failures.append(f"{who}: failed with seed {row.seed}: {row.failure}")
            rest += [f"{who}, seed {row.seed}: {text}" for text in row.warnings]
        for reference in self.references:
            if reference.failure is not None:
                failures.append(f"reference of {reference.game}, seed {reference.seed}: {reference.failure}")
        return failures + rest
