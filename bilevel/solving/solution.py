"""What solve() found, how much work it took, and how far to trust it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from bilevel._printed import printed
from bilevel.game import Game
from bilevel.solving.history import loss_key
from bilevel.solving.loading import load_into
from bilevel.solving.spread import Spread
from bilevel.solving.warning_log import RunWarning, not_converged
from bilevel.tree import Variables, named_leaves

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

_SHOWN = 8

Number = TypeVar("Number")
"""A float, or of many games a tensor `[count]`."""


@dataclass(frozen=True, eq=False)
class End(ABC, Generic[Number]):
    """What the end of a run holds, of one game or of many."""

    variables: Mapping[str, Variables]
    values: Mapping[str, Number]
    history: list[dict[str, float]]
    stationarity: Mapping[str, Number]
    residuals: Mapping[str, Number]
    gradients: int
    products: int
    seconds: float
    warnings: tuple[str, ...]
    states: Mapping[str, Any] = field(repr=False)
    buffers: Mapping[str, Any] = field(repr=False)

    @abstractmethod
    def __str__(self) -> str:
        """A table of the players, the work, and the warnings."""

    def _printed(self, table: Table, each: str = "", told: Sequence[str] = ()) -> str:
        """A table with the work under it, of what `each` was, what else is told, and the warnings."""
        work = (
            f"{self.gradients:,} gradients{' and' if each else ','} {self.products:,} Hessian-vector products, {each}"
        )
        lines = [f"{work}{self.seconds:.1f} s"]
        if self.history and "gradient_norm" in self.history[0]:  # one among many games has none of its own
            norms = self.history[0]["gradient_norm"], self.history[-1]["gradient_norm"]
            share = f", {norms[1] / norms[0]:.2g} of that at the start" if norms[0] > 0.0 else ""
            lines.append(f"norm of the leaders' gradient in the last step: {norms[1]:.5g}{share}")
        return printed(table, *lines, *told, *(f"Warning: {warning}" for warning in self.warnings))


@final
@dataclass(frozen=True, eq=False)
class Solution(End[float]):
    """The end of a run of `solve`: where the players are, how much work it took, and how far to trust it.

    Attributes:
        variables: Player -> its variables, detached.
        values: Player -> its loss there, on its last batch.
        history: One record a step: the loss of each player under its name (a follower's as the last step of `Unrolled`
            saw it, else at its answer on the batch that comes next), each follower's "name.stationarity", "step",
            "gradient_norm" (of the leaders' hypergradient), and "gradients", "products", "work" (both) and "seconds" so
            far. The loss of a player who is named after one of these six is under "name.loss".
        stationarity: Follower -> |gradient of its own loss| in units of that at the start.
        residuals: Follower -> relative residual of the equation for its derivative: of its last linear solve, or of the
            learned slope. `Unrolled` has none.
        gradients: Gradients of the whole run.
        products: Hessian-vector products of the whole run.
        seconds: Wall-clock seconds of the whole run.
        warnings: What to know before trusting it.
        not_converged: What had not converged at the end, as its warnings say: of "follower", "leader" and
            "linear system". A response that asks for no accuracy, such as `Unrolled`, does not say.
        states: Follower -> its response's state.
        buffers: Player -> its module's buffers.
        errors: Follower -> the last hypergradient's relative error as `HypergradientTolerance` estimated it, where it
            did.
        multipliers: Follower with constraints -> "inequality", "equality" -> their multipliers, in the form of what the
            constraint returns: the loss's fall for each unit by which it is loosened. A leader's are there too.
        violations: Leader with functions -> their largest violation, in their own units. The history has it step by
            step as "name.violation".
        starts: What all starts came to, with `solve(starts=...)`.
    """

    errors: Mapping[str, float] = field(default_factory=dict)
    multipliers: Mapping[str, Mapping[str, Variables]] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)
    starts: Spread | None = None
    not_converged: tuple[str, ...] = ()

    def load_into(self, model: nn.Module, player: str) -> None:
        """Write a player's variables and its module's buffers into `model`, a module of the form of its init.

        Frozen parameters stay, tied ones are tied still, and parametrised ones get what they are made from. Not by
        `model.load_state_dict`, which asks for what is no variable: frozen, tied and registered tensors.

        Raises `ValueError` for a module of another form, and `TypeError` for a player that is no module.
        """
        if player not in self.variables:
            raise ValueError(f"load_into: there is no player {player!r}; players are {list(self.variables)}.")
        load_into(model, player, self.variables[player], self.buffers.get(player, {}))

    def __str__(self) -> str:
        """A table of the players, the work, and the warnings."""
        from rich.table import Table  # noqa: PLC0415 - only where something is printed

        table = Table(title=f"Solution after {len(self.history)} steps")
        columns = ("player", "loss at start", "loss", "stationarity", "derivative residual")
        for column in (*columns, *(["hypergradient error"] * bool(self.errors))):
            table.add_column(column, justify="left" if column == "player" else "right")
        first = self.history[0] if self.history else {}
        for name, value in self.values.items():
            table.add_row(
                name,
                f"{first[loss_key(name)]:.4g}" if loss_key(name) in first else "",
                f"{value:.4g}",
                f"{self.stationarity[name]:.2e}" if name in self.stationarity else "",
                f"{self.residuals[name]:.2e}" if name in self.residuals else "",
                *([f"{self.errors[name]:.0e}" if name in self.errors else ""] * bool(self.errors)),
            )
        broken = [f"Largest violation of {name}'s functions: {off:.2e}" for name, off in self.violations.items()]
        starts = [] if self.starts is None else [str(self.starts)]
        return self._printed(table, told=[*starts, *broken, *self._told_multipliers()])

    def _told_multipliers(self) -> Iterator[str]:
        for name, kinds in self.multipliers.items():
            for what, tree in kinds.items():
                for path, leaf in named_leaves(tree):
                    values = leaf.reshape(-1)
                    binding = int((values != 0.0).sum())
                    shown = ", ".join(f"{value:.4g}" for value in values[:_SHOWN].tolist())
                    more = ", ..." if len(values) > _SHOWN else ""
                    count = f" ({binding} of {len(values)} bind)" if what == "inequality" else ""
                    yield f"Multipliers of {name}'s {what}{path}{count}: {shown}{more}"


@singledispatch
def ended(
    game: Game, errors: Mapping[str, float], warned: Sequence[RunWarning], values: Mapping[str, Any], **found: Any
) -> End[Any]:
    """What a run of a game ended with, in the form that belongs to the game's kind.

    Args:
        game: what was played.
        errors: follower -> the estimated error of the last hypergradient, where there is an estimate.
        warned: what to know before trusting it.
        values: player -> its loss.
        found: the other fields of `End`.
    """
    texts, numbers = tuple(warning.text for warning in warned), {n: float(value) for n, value in values.items()}
    return Solution(values=numbers, warnings=texts, errors=errors, not_converged=not_converged(warned), **found)
