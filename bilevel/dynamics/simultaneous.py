"""Everybody assumes that the others stand still; together, or in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.dynamics.base import Dynamics, State
from bilevel.dynamics.field import Field


@final
@dataclass(frozen=True)
class Simultaneous(Dynamics):
    """Gradient play: each player descends its own gradient, xi(z). One gradient of each player a step.

    With one leading player it is plain gradient descent. With several it need not converge: on the bilinear game
    sigma x y its distance from equilibrium grows by sqrt(1 + lr^2 sigma^2) a step.
    """

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The field itself."""
        return field.here(), state


@final
@dataclass(frozen=True)
class Alternating(Dynamics):
    """Gradient play in turn: each player sees the moves of those before it. One gradient of each player a step.

    On the bilinear game it neither grows nor shrinks: the orbit is closed, with a mean factor of 1.
    Source: Bailey et al. 2019 (arXiv 1907.04392).
    """

    @property
    def alternates(self) -> bool:
        """Yes."""
        return True

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The field itself, for whoever is to move."""
        return field.here(), state
