"""What solve() found in many games at once, and how far to trust each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel.many import Games, Tasks
from bilevel.solving.history import loss_key
from bilevel.solving.solution import End, Solution, ended
from bilevel.solving.warning_log import RunWarning, not_converged
from bilevel.tree import Variables, map_leaves


@final
@dataclass(frozen=True, eq=False)
class Solutions(End[Tensor]):
    """The end of a run of many games. `solutions[17]` is the `Solution` of one, `len(solutions)` how many there are.

    Attributes:
        variables: Player -> its variables, each leaf `[count, ...]`.
        values: Player -> its loss in each game `[count]`, on its last batch.
        history: One record a step, with the median over the games under each name, and the largest under "name.worst".
        stationarity: Follower -> |gradient of its own loss| in units of that at the start, `[count]`.
        residuals: Follower -> relative residual of its last linear solve, `[count]`.
        gradients: Gradients of the whole run, each of which was one for every game at once.
        products: Hessian-vector products of the whole run, likewise.
        seconds: Wall-clock seconds of the whole run.
        warnings: What to know before trusting it: how many games, and the worst.
        states: Follower -> its response's state.
        buffers: Player -> its module's buffers `[count, ...]`.
        warned: For each warning the games that it has spoken of in any step; None for all.
        multipliers: Follower with constraints -> "inequality", "equality" -> their multipliers `[count, ...]`.
        violations: Leader with functions -> their largest violation in each game `[count]`.
        not_converged: "follower", "leader", "linear system" -> which games had not converged in that at the end, bool
            `[count]`; what has in all games is left out.
    """

    warned: tuple[frozenset[int] | None, ...] = field(repr=False)
    multipliers: Mapping[str, Mapping[str, Variables]] = field(default_factory=dict)
    violations: Mapping[str, Tensor] = field(default_factory=dict)
    not_converged: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many games there are."""
        return len(next(iter(self.values.values())))

    def __iter__(self) -> Iterator[Solution]:
        """One game's solution after the other."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Solution:
        """One game's end.

        Its history has the whole run's counts and no losses, and it has no states to go on from. Its warnings are those
        that spoke of it in some step of the run, in the words that they had for all games.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no game {index} among {len(self)}.")
        kept = ("step", "gradients", "products", "seconds", "work")
        mine = [games is None or index % len(self) in games for games in self.warned]

        def numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
            return {name: float(tensor[index]) for name, tensor in tensors.items()}

        variables, buffers = map_leaves(lambda leaf: leaf[index].clone(), (dict(self.variables), dict(self.buffers)))
        return Solution(
            variables=variables,
            values=numbers(self.values),
            history=[{name: record[name] for name in kept} for record in self.history],
            stationarity=numbers(self.stationarity),
            residuals=numbers(self.residuals),
            gradients=self.gradients,
            products=self.products,
            seconds=self.seconds,
            warnings=tuple(text for text, own in zip(self.warnings, mine, strict=True) if own),
            states={},
            buffers=buffers,
            multipliers=map_leaves(lambda leaf: leaf[index].clone(), dict(self.multipliers)),
            violations=numbers(self.violations),
            not_converged=tuple(what for what, games in self.not_converged.items() if bool(games[index])),
        )

    def __str__(self) -> str:
        """A table of the players over all games, the work, and the warnings."""
        from rich.table import Table  # noqa: PLC0415 - only where something is printed

        table = Table(title=f"Solutions of {len(self):,} games after {len(self.history)} steps")
        right = ("median loss at start", "median loss", "worst loss", "in game", "worst stationarity", "worst residual")
        table.add_column("player")
        for column in right:
            table.add_column(column, justify="right")
        first = self.history[0] if self.history else {}
        for name, value in self.values.items():
            # A loss that is no number is the worst of all.
            worst = int(torch.where(value.isnan(), torch.inf, value).argmax())
            table.add_row(
                name,
                f"{first[loss_key(name)]:.4g}" if loss_key(name) in first else "",
                f"{float(value.median()):.4g}",
                f"{float(value[worst]):.4g}",
                f"{worst}",
                f"{float(self.stationarity[name].max()):.2e}" if name in self.stationarity else "",
                f"{float(self.residuals[name].max()):.2e}" if name in self.residuals else "",
            )
        return self._printed(table, each=", each of all games at once")


@ended.register
def _(
    game: Games, errors: Mapping[str, float], warned: Sequence[RunWarning], values: Mapping[str, Tensor], **found: Any
) -> Solutions:
    """Of many games, each warning with the games that it spoke of; how far a hypergradient is off is not estimated."""
    texts, spoken_of = tuple(warning.text for warning in warned), tuple(warning.games for warning in warned)
    count = len(next(iter(values.values())))
    left = {what: torch.zeros(count, dtype=torch.bool) for what in not_converged(warned)}
    for warning in [warning for warning in warned if warning.not_converged]:
        where = range(count) if warning.holding is None else sorted(warning.holding)
        left[warning.not_converged][list(where)] = True
    return Solutions(values=values, warnings=texts, warned=spoken_of, not_converged=left, **found)


@ended.register
def _(
    game: Tasks, errors: Mapping[str, float], warned: Sequence[RunWarning], values: Mapping[str, Tensor], **found: Any
) -> Solution:
    """Of one leader and its last tasks: mean losses, and of the rest the worst task's."""
    for told in ("stationarity", "residuals"):
        found[told] = {name: float(torch.as_tensor(number).max()) for name, number in found[told].items()}
    texts, numbers = tuple(warning.text for warning in warned), {n: float(value) for n, value in values.items()}
    return Solution(values=numbers, warnings=texts, errors=errors, not_converged=not_converged(warned), **found)
