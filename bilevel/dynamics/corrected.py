"""Rules that correct the field by products with its Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as option
from typing import final

import torch
from torch import Tensor

from bilevel.dynamics.base import Dynamics, State
from bilevel.dynamics.field import Field
from bilevel.linear import GMRES, LinearOperator, LinearSolver


def _positive(rule: Dynamics, name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{type(rule).__name__}: {name}={value}; expected a positive finite number.")


@final
@dataclass(frozen=True)
class Consensus(Dynamics):
    r"""Descend the field's own length as well: xi + weight J'xi.

    One gradient of each player and one transposed product a step. It turns every stationary point that is not too
    unstable into an attractor, bad ones too. Source: Mescheder et al. 2017 (arXiv 1705.10461).
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "weight", self.weight)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """xi + weight J'xi."""
        jacobian = field.linearised()
        return field.split(jacobian.value + self.weight * jacobian.transposed(jacobian.value)), state


@final
@dataclass(frozen=True)
class SymplecticAdjustment(Dynamics):
    r"""Turn the field against its rotation: xi + lambda A'xi, A the antisymmetric part of J.

    `weight` is |lambda|. With `aligned` the sign is that of <xi, J'xi> (<A'xi, J'xi> / n + epsilon), which is drawn to
    stable fixed points and away from unstable ones. One gradient of each player and two products a step. A potential
    game (A = 0) is left alone. Source: Balduzzi et al. 2018 (arXiv 1802.05642).
    """

    weight: float = 1.0
    aligned: bool = True
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "weight", self.weight)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """xi + lambda A'xi."""
        jacobian = field.linearised()
        xi = jacobian.value
        pulled = jacobian.transposed(xi)  # the gradient of |xi|^2 / 2
        turned = 0.5 * (pulled - jacobian.matvec(xi))
        sign = 1.0
        if self.aligned:
            score = float(xi @ pulled) * float(turned @ pulled) / xi.numel() + self.epsilon
            sign = 1.0 if score >= 0.0 else -1.0
        return field.split(xi + sign * self.weight * turned), state


@final
@dataclass(frozen=True)
class LookAhead(Dynamics):
    r"""Everybody assumes that the others take one gradient step, and does not try to shape it: (I - step_size J_o) xi.

    One gradient of each player and two products a step. It converges on the bilinear game.
    Source: Zhang and Lesser 2010; Letcher et al. 2019 (arXiv 1811.08469).
    """

    step_size: float

    def __post_init__(self) -> None:
        _positive(self, "step_size", self.step_size)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """xi - step_size J_o xi."""
        jacobian = field.linearised()
        return field.split(jacobian.value - self.step_size * jacobian.off_diagonal(jacobian.value)), state


@final
@dataclass(frozen=True)
class Competitive(Dynamics):
    r"""The Nash equilibrium of the local bilinear game, step after step: (I + step_size J_o)^-1 xi.

    `step_size` is the optimiser's own. `linear_solver` solves a non-symmetric system, each product of which costs a
    gradient of all and a backward pass or two. On the bilinear game, with a = lr sigma, it contracts by
    1 / sqrt(1 + a^2) a step, whatever the step size. Source: Schaefer and Anandkumar 2019 (arXiv 1905.12103).
    """

    step_size: float
    linear_solver: LinearSolver = option(default_factory=lambda: GMRES(rtol=1e-6))

    def __post_init__(self) -> None:
        _positive(self, "step_size", self.step_size)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The solution of (I + step_size J_o) d = xi."""
        jacobian = field.linearised()
        operator = LinearOperator(lambda v: v + self.step_size * jacobian.off_diagonal(v))
        with torch.no_grad():
            return field.split(self.linear_solver.solve(operator, jacobian.value).solution), state
