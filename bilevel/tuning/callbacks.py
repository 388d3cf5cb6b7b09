"""Callbacks of a run of tuning, or of `solve`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bilevel.errors import StopRun
from bilevel.solving.history import Record


class EarlyStopping:
    """Ends a run once a number of its history has not fallen for a while; the run gives its solution all the same.

    Args:
        patience: So many steps of the hyperparameters without a new least value.
        key: Which number: by default the leader's loss, on the validation data.
        least: What counts as a fall: by more than this share of the least value so far.

    Raises:
        ValueError: For a patience below 1; in the run, for a key that the history does not have.
    """

    def __init__(self, patience: int, *, key: str = "hyper", least: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience={patience}; expected at least 1 step.")
        self.patience, self.key, self.least = patience, key, least
        self.best, self.at = math.inf, 0

    def __call__(self, step: int, record: Record, variables: Mapping[str, Any]) -> None:
        """Look at a step."""
        if self.key not in record:
            raise ValueError(f"EarlyStopping: the history has no {self.key!r}; it has {sorted(record)}.")
        if record[self.key] < self.best - self.least * abs(self.best if math.isfinite(self.best) else 0.0):
            self.best, self.at = record[self.key], step
        elif self.at == 0:
            self.at = step  # it goes on from a checkpoint, or the first value is no number
        if step - self.at >= self.patience:
            raise StopRun
