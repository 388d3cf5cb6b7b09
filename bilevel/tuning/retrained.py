"""What fresh trainings say of hyperparameters: at those found, at the start's, and with nothing tuned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import nn

from bilevel._printed import printed
from bilevel.tree import Variables

_CLOSE = 0.02
"""A difference of fewer than so many of a validation loss is not told from the noise of one training."""

_OTHERS = "They had different batches, for the data keep a state, and differ by that too."
_VERDICT = {"found": "the values found", "start": "the start's values", "plain": "nothing tuned, {}"}
TOLD = {"found": "at the values found", "start": "at the start's", "plain": "with nothing tuned"}


@final
@dataclass(frozen=True, eq=False)
class Retrained:
    """Fresh trainings at the hyperparameters found, and at those at the start.

    Attributes:
        found: The validation loss of each seed at the values found.
        start: The same at the start's, the same seeds.
        models: The trained models of the first, one a seed; of `tune`'s own check none.
        plain: The same losses of the training loss as it is, with nothing around it; empty unless asked for.
        values: What was trained at, by the three names; of "plain" {}.
        steps: Of each training.
        speed: How many times the optimiser's own rate it had.
        alike: Whether the trainings of each seed had the same batches; not where the data keep a state that cannot be
            put back, such as a generator in a function's closure.
    """

    found: tuple[float, ...]
    start: tuple[float, ...]
    models: tuple[nn.Module, ...] = field(repr=False)
    plain: tuple[float, ...] = ()
    values: Mapping[str, Mapping[str, Variables]] = field(repr=False, kw_only=True)
    steps: int = field(kw_only=True)
    speed: float = field(kw_only=True, default=1.0)
    alike: bool = field(kw_only=True, default=True)

    @property
    def means(self) -> dict[str, float]:
        """The mean over the seeds by the three names, of those that were trained at; infinite for what is no number."""
        losses = {"found": self.found, "start": self.start, "plain": self.plain}
        means = {which: statistics.fmean(found) for which, found in losses.items() if found}
        return {which: mean if math.isfinite(mean) else math.inf for which, mean in means.items()}

    @property
    def better(self) -> bool:
        """Whether the mean over the seeds is lower at the values found than of all that they were compared with."""
        means = self.means
        return means.pop("found") < min(means.values())

    @property
    def decided(self) -> bool:
        """Whether it says anything: not where a training ends at no number, and has a larger rate than it should."""
        return self.speed == 1.0 or math.inf not in self.means.values()

    @property
    def best(self) -> str:
        """Where a fresh training does best: "found", unless "start" or "plain" is lower by a fiftieth or more."""
        means = self.means
        least = min(means, key=lambda which: means[which])
        close = means["found"] - means[least] < _CLOSE * abs(means[least])
        return least if self.decided and not close else "found"

    @property
    def advised(self) -> Mapping[str, Variables]:
        """The values of the best; {} is nothing tuned, for `tuning.loss_at` too."""
        return self.values[self.best]

    def told(self) -> str:
        """In two sentences, or three."""
        rate = "" if self.speed == 1.0 else f" at {self.speed:.3g} times the rate"
        losses = [f"{mean:.4g} {TOLD[which]}" for which, mean in self.means.items()]
        ends = f"{', '.join(losses[:-1])} and {losses[-1]}"
        close = ", within 2 % of the lowest" if self.means[self.best] > min(self.means.values()) else ""
        verdict = f"Advised: {_VERDICT[self.best]}{close}." if self.decided else "That is no verdict."
        others = "" if self.alike else f" {_OTHERS}"
        return (
            f"A fresh training of {self.steps:,} steps{rate} ends with a validation loss of {ends}.{others} {verdict}"
        )

    def __str__(self) -> str:
        """A table, a row a seed."""
        from rich.table import Table  # noqa: PLC0415

        table = Table(title="Validation loss of fresh trainings")
        columns = {TOLD["plain"]: self.plain, TOLD["start"]: self.start, TOLD["found"]: self.found}
        columns = {name: losses for name, losses in columns.items() if losses}
        for name in ("seed", *columns):
            table.add_column(name, justify="right")
        for seed, losses in enumerate(zip(*columns.values(), strict=True)):
            table.add_row(str(seed), *(f"{loss:.4g}" for loss in losses))
        table.add_row("mean", *(f"{statistics.fmean(losses):.4g}" for losses in columns.values()))
        return printed(table, *([] if self.alike else [_OTHERS]))
