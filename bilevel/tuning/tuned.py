"""What a run of tuning gives: the model, its hyperparameters, and how they came there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from torch import nn

from bilevel._printed import printed
from bilevel.hyper import Tuning
from bilevel.inner.torch_optim import OptimizerFactory, SchedulerFactory
from bilevel.solving import Solution
from bilevel.tree import Variables
from bilevel.tuning.retrained import Retrained
from bilevel.tuning.rule import Plan
from bilevel.tuning.values import numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@final
@dataclass(frozen=True, eq=False)
class Tuned:
    """The end of a run of `tune`.

    Attributes:
        model: A trained copy of the model, in the mode that the given one is in.
        hyper: The hyperparameters found, by name: natural values.
        start: What they were at the start.
        solution: The whole run: values, warnings, work.
        plan: Which response was used, and how many steps were taken.
        tuning: The game's parts; `tuning.loss_at(tuned.hyper)` is the training loss at the values found.
        optimizer: That the model was trained with, for `retrain`.
        scheduler: Likewise, if there was one.
        clip_norm: Likewise.
        retrained: Fresh trainings at the values found, at the start's and, where all is declared, with nothing tuned;
            None if `check=0`.
        unchecked: Why the check that was asked for has no result: it was stopped, or failed; else None.
    """

    model: nn.Module
    hyper: Mapping[str, Variables]
    start: Mapping[str, Variables]
    solution: Solution = field(repr=False)
    plan: Plan = field(repr=False)
    tuning: Tuning = field(repr=False)
    optimizer: OptimizerFactory = field(repr=False)
    scheduler: SchedulerFactory | None = field(repr=False, default=None)
    clip_norm: float | None = field(repr=False, default=None)
    retrained: Retrained | None = None
    unchecked: str | None = None

    @property
    def advised(self) -> Mapping[str, Variables]:
        """The values for a fresh training, at which it did best: those found, the start's, or {}: nothing tuned."""
        return self.hyper if self.retrained is None else self.retrained.advised

    @property
    def history(self) -> list[dict[str, float]]:
        """One record for each step of the hyperparameters: losses under the names of the two players, and each
        hyperparameter as it was after it, under `hyper.name`.
        """
        return self.solution.history

    @property
    def numbers(self) -> dict[str, float]:
        """What was found as plain numbers by name, `{"decay": 1e-3, "dropout.7": 0.2}`; of a large tensor quartiles."""
        return {name.removeprefix("."): value for name, value in numbers("", self.hyper).items()}

    def to_frame(self) -> DataFrame:
        """The history as a data frame of pandas, a row a step."""
        try:
            import pandas  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ImportError("Tuned.to_frame needs pandas: pip install pandas, or bilevel[data].") from error
        return pandas.DataFrame(self.history).set_index("step")

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The losses, and every hyperparameter over training; written to `path` in the format that its suffix names."""
        from bilevel.tuning.plot import figure  # noqa: PLC0415 - matplotlib is an extra

        drawn = figure(self.history, self.plan, self.tuning)
        if path is not None:
            drawn.savefig(path, dpi=150)
        return drawn

    def __str__(self) -> str:
        """A table of the hyperparameters, which of them to use in a fresh training and why, then the solution's own."""
        from rich.table import Table  # noqa: PLC0415

        table = Table(title="Hyperparameters")
        for column in ("name", "start", "found"):
            table.add_column(column, justify="left" if column == "name" else "right")
        before, after = numbers("", self.start), numbers("", self.hyper)
        for name, value in after.items():
            table.add_row(name.removeprefix("."), f"{before[name]:.4g}", f"{value:.4g}")
        told = self.unchecked if self.retrained is None else self.retrained.told()
        return f"{printed(table, f'{self.plan} {told}' if told else str(self.plan))}\n{self.solution}"
