"""Everybody assumes that the others stand still."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.dynamics.base import Dynamics, Field


@final
@dataclass(frozen=True)
class Simultaneous(Dynamics):
    """Gradient play: each player descends its own gradient, xi(z). One gradient of each player a step.

    With one leading player it is plain gradient descent. With several it need not converge: on the bilinear game
    sigma x y its distance from equilibrium grows by sqrt(1 + lr^2 sigma^2) a step.
    """

    def directions(self, field: Field, point: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """The field itself."""
        return field(point)
