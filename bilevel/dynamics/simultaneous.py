"""Everybody assumes that the others stand still; together, or in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import final

from torch import Tensor

from bilevel.dynamics.base import Dynamics, State
from bilevel.dynamics.field import Field
from bilevel.errors import require_kinds


@final
@dataclass(frozen=True)
class Simultaneous(Dynamics):
    r"""Gradient play: each player descends its own gradient, $d = \xi(z)$.

    With one leading player it is plain gradient descent. With several it need not converge: on the bilinear game
    $\sigma x y$ its distance from equilibrium grows by $\sqrt{1 + \text{lr}^2 \sigma^2}$ a step.

    Costs one gradient of each player a step.
    """

    @property
    def rests_with_bounds(self) -> bool:
        """Yes."""
        return True

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The field itself."""
        return field.here(), state


@final
@dataclass(frozen=True)
class Alternating(Dynamics):
    """Gradient play in turn: each player sees the moves of those before it.

    On the bilinear game it neither grows nor shrinks: the orbit is closed, with a mean factor of 1.

    Costs one gradient of each player a step. Source: Bailey et al. 2019 (arXiv 1907.04392).
    """

    @property
    def alternates(self) -> bool:
        """Yes."""
        return True

    @property
    def rests_with_bounds(self) -> bool:
        """Yes."""
        return True

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The field itself, for whoever is to move."""
        return field.here(), state


@final
@dataclass(frozen=True)
class TwoTimescale(Dynamics):
    r"""Gradient play at different speeds, $d_i = r_i\, \xi_i(z)$.

    A follower much faster than its leader is nearly at its best response whenever the leader moves. With an optimiser
    that normalises (Adam) a ratio has no effect: give `solve(optimizer={"x": ..., "y": ...})` different rates instead,
    which do the same for SGD.

    Costs one gradient of each player a step. Source: Heusel et al. 2017 (arXiv 1706.08500).

    Args:
        ratios: $r_i$ by player; a player that is not named moves at 1.

    Raises:
        ValueError: If a ratio is not a positive finite number or, in the first step, if it names nobody who plays at
            once.
    """

    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        require_kinds(self, ratios=Mapping)
        for name, ratio in self.ratios.items():
            if isinstance(ratio, bool) or not isinstance(ratio, Real):
                raise TypeError(f"TwoTimescale: the ratio of {name!r} is {ratio!r}; expected a number.")
            if not 0.0 < ratio < float("inf"):
                raise ValueError(f"TwoTimescale: the ratio of {name!r} is {ratio}; expected a positive finite number.")

    @property
    def rests_with_bounds(self) -> bool:
        """Yes."""
        return True

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """Each player's share of the field, scaled."""
        unknown = sorted(set(self.ratios) - set(field.names))
        if unknown:
            raise ValueError(f"TwoTimescale: ratios names {unknown}; those who play at once are {list(field.names)}.")
        slopes = field.here()
        return {name: [self.ratios.get(name, 1.0) * leaf for leaf in slopes[name]] for name in slopes}, state
