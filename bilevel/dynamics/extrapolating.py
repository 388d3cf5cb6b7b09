"""Rules that use gradients of two points: here and there, or now and before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.dynamics.base import Dynamics, State, require_positive
from bilevel.dynamics.field import Field
from bilevel.errors import require_kinds


@final
@dataclass(frozen=True)
class Extragradient(Dynamics):
    r"""The gradient where plain play would lead, $d = \xi(z - \eta\, \xi(z))$.

    On the bilinear game, with $a = \text{lr}\, \sigma$, it contracts by $\sqrt{1 - a^2 + a^4}$ a step.

    Costs two gradients of each player a step. Source: Korpelevich 1976; Gidel et al. 2019 (arXiv 1802.10551).

    Args:
        step_size: $\eta$, the length of the look ahead; usually the optimiser's own learning rate.

    Raises:
        ValueError: If `step_size` is not a positive finite number.

    Examples:
        >>> import torch, bilevel as bl
        >>> from functools import partial
        >>> x = bl.Player(lambda x, y: x * y, torch.tensor(1.0))
        >>> y = bl.Player(lambda x, y: -x * y, torch.tensor(1.0))
        >>> sgd = partial(torch.optim.SGD, lr=0.5)
        >>> play = partial(bl.solve, bl.Game(x=x, y=y), optimizer=sgd, steps=50)
        >>> bool(play(dynamics=Extragradient(0.5)).variables["x"].abs() < 0.1)
        True
    """

    step_size: float

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "step_size", self.step_size)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The field at the extrapolated point."""
        here = field.here()
        there = {
            name: [leaf - self.step_size * slope for leaf, slope in zip(field.point[name], here[name], strict=True)]
            for name in field.names
        }
        return field.at(there), state


@final
@dataclass(frozen=True)
class Optimistic(Dynamics):
    r"""The gradient, and its change since the last step once more: $d_t = 2 \xi_t - \xi_{t-1}$.

    On the bilinear game, with $a = \text{lr}\, \sigma \le 1/2$, it contracts by $\sqrt{(1 + \sqrt{1 - 4 a^2}) / 2}$ a
    step.

    Costs one gradient of each player a step, and keeps one in memory. Source: Popov 1980; Daskalakis et al. 2018
    (arXiv 1711.00141).
    """

    @property
    def rests_with_bounds(self) -> bool:
        """Yes."""
        return True

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """Twice the field less the one before; in the first step the field."""
        now = field.here()
        before = state.get("slopes", now)
        told = {
            name: [2.0 * new - old for new, old in zip(now[name], before[name], strict=True)] for name in field.names
        }
        return told, {"slopes": now}


@final
@dataclass(frozen=True)
class NegativeMomentum(Dynamics):
    r"""Momentum that pulls back, with players in turn: $d_t = \xi_t + \beta\, d_{t-1}$ with $\beta < 0$.

    On the bilinear game players who move at once still diverge by it; in turn they converge. It is a rule of its own
    because torch's SGD refuses a momentum below 0.

    Costs one gradient of each player a step, and keeps one direction in memory. Source: Gidel et al. 2019
    (arXiv 1807.04740).

    Args:
        momentum: $\beta$, between -1 and 0.

    Raises:
        ValueError: If `momentum` is not between -1 and 0.
    """

    momentum: float = -0.5

    def __post_init__(self) -> None:
        require_kinds(self)
        if not -1.0 < self.momentum < 0.0:
            raise ValueError(f"NegativeMomentum: momentum={self.momentum}; expected a number between -1 and 0.")

    @property
    def alternates(self) -> bool:
        """Yes."""
        return True

    @property
    def rests_with_bounds(self) -> bool:
        """Yes."""
        return True

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The field plus a negative share of the last direction."""
        now, last = field.here(), state.get("directions", {})
        told = {
            name: [new + self.momentum * old for new, old in zip(slopes, last[name], strict=True)]
            if name in last
            else slopes
            for name, slopes in now.items()
        }
        return told, {"directions": {**last, **told}}
