"""What an exploitability says: each player's gain from moving alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bilevel._printed import printed
from bilevel.tree import Variables


@dataclass(frozen=True, eq=False)
class Exploitability:
    """How much each player gains by moving alone, at a point of a game.

    Attributes:
        gains: By player, its loss at the point less the lowest that was found: a *lower bound* of what its best
            response would gain, never below 0; infinite where the search ran off.
        upper: The same from above; infinite but for players whose strong convexity was given.
        losses: By player, its loss at the point.
        starts: By player, how many of its searches ended within 1 % of the best one's gain: one of many is a reason to
            search more.
        deviations: By player, the best move found.
        gradients: Gradients that it cost.
    """

    gains: Mapping[str, float]
    upper: Mapping[str, float]
    losses: Mapping[str, float]
    starts: Mapping[str, str]
    deviations: Mapping[str, Variables] = field(repr=False, default_factory=dict)
    gradients: int = 0

    @property
    def nash_conv(self) -> float:
        """The sum of all players' gains, from below: 0 at a Nash equilibrium."""
        return sum(self.gains.values())

    @property
    def exploitability(self) -> float:
        """NashConv over the number of players, from below."""
        return self.nash_conv / len(self.gains)

    @property
    def duality_gap(self) -> float:
        r"""Of two players in a zero-sum game, $\max_b f(a^*, b) - \min_a f(a, b^*)$; it is their NashConv.

        Raises:
            ValueError: If there are not two players, or their losses at the point do not sum to 0.
        """
        total, size = sum(self.losses.values()), sum(abs(loss) for loss in self.losses.values())
        if len(self.losses) != 2 or abs(total) > 1e-5 * size:
            raise ValueError(
                f"duality_gap is of two players whose losses sum to 0; they are {dict(self.losses)}. Use nash_conv."
            )
        return self.nash_conv

    def __str__(self) -> str:
        """A table of the gains."""
        from rich.table import Table  # noqa: PLC0415

        table = Table(
            title=f"NashConv >= {self.nash_conv:.4g}, exploitability >= {self.exploitability:.4g}",
            caption="gain: by the best move found, so at least this much; at most: from the strong convexity given.",
        )
        for column in ("player", "loss", "gain", "at most", "searches that agree"):
            table.add_column(column, justify="left" if column == "player" else "right")
        for name, gain in self.gains.items():
            highest = f"{self.upper[name]:.4g}" if math.isfinite(self.upper[name]) else "not known"
            table.add_row(name, f"{self.losses[name]:.4g}", f"{gain:.4g}", highest, self.starts[name])
        return printed(table)
