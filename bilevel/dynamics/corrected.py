"""Rules that correct the field by products with its Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as option
from typing import final

import torch
from torch import Tensor

from bilevel.dynamics.base import Dynamics, State, require_positive
from bilevel.dynamics.field import Field
from bilevel.errors import require_kinds
from bilevel.linear import GMRES, LinearOperator, LinearSolver
from bilevel.sharding.tensor import entries


@final
@dataclass(frozen=True)
class Consensus(Dynamics):
    r"""Descend the field's own length as well: $d = \xi + \gamma J^\top \xi$.

    It turns every stationary point that is not too unstable into an attractor, bad ones too.

    Costs one gradient of each player and one transposed product a step. Source: Mescheder et al. 2017
    (arXiv 1705.10461).

    Args:
        weight: $\gamma$; the paper's experiments use values around the default.

    Raises:
        ValueError: If `weight` is not a positive finite number.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "weight", self.weight)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """xi + weight J'xi."""
        jacobian = field.linearised()
        return field.split(jacobian.value + self.weight * jacobian.transposed(jacobian.value)), state


@final
@dataclass(frozen=True)
class SymplecticAdjustment(Dynamics):
    r"""Turn the field against its rotation: $d = \xi + \lambda A^\top \xi$, $A$ the antisymmetric part of $J$.

    A potential game ($A = 0$) is left alone.

    Costs one gradient of each player and two products a step. Source: Balduzzi et al. 2018 (arXiv 1802.05642).

    Args:
        weight: $|\lambda|$.
        aligned: Whether play is drawn to stable fixed points and away from unstable ones, by the sign of
            $\langle \xi, J^\top \xi \rangle \langle A^\top \xi, J^\top \xi \rangle / n + \epsilon$; else $\lambda > 0$.
        epsilon: Makes the sign positive where the products are near 0; the paper's value.

    Raises:
        ValueError: If `weight` is not a positive finite number.
    """

    weight: float = 1.0
    aligned: bool = True
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "weight", self.weight)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """xi + lambda A'xi."""
        jacobian = field.linearised()
        xi = jacobian.value
        pulled = jacobian.transposed(xi)  # the gradient of |xi|^2 / 2
        turned = 0.5 * (pulled - jacobian.matvec(xi))
        sign = 1.0
        if self.aligned:
            score = float(xi @ pulled) * float(turned @ pulled) / entries(xi) + self.epsilon
            sign = 1.0 if score >= 0.0 else -1.0
        return field.split(xi + sign * self.weight * turned), state


@final
@dataclass(frozen=True)
class LookAhead(Dynamics):
    r"""Assume that the others take one gradient step, and do not try to shape it: $d = (I - \eta J_o)\, \xi$.

    $J_o$ is what lies off the diagonal blocks of the Jacobian. It converges on the bilinear game.

    Costs one gradient of each player and two products a step. Source: Zhang and Lesser 2010; Letcher et al. 2019
    (arXiv 1811.08469).

    Args:
        step_size: $\eta$, the step that the others are assumed to take.

    Raises:
        ValueError: If `step_size` is not a positive finite number.
    """

    step_size: float

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "step_size", self.step_size)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """xi - step_size J_o xi."""
        jacobian = field.linearised()
        return field.split(jacobian.value - self.step_size * jacobian.off_diagonal(jacobian.value)), state


@final
@dataclass(frozen=True)
class Competitive(Dynamics):
    r"""The Nash equilibrium of the local bilinear game, step after step: $d = (I + \eta J_o)^{-1} \xi$.

    $J_o$ is what lies off the diagonal blocks of the Jacobian. On the bilinear game, with $a = \text{lr}\, \sigma$, it
    contracts by $1 / \sqrt{1 + a^2}$ a step, whatever the step size.

    Costs one gradient of each player and one linear solve a step; each product of the solve costs a backward pass or
    two through all gradients. Source: Schaefer and Anandkumar 2019 (arXiv 1905.12103).

    Args:
        step_size: $\eta$, the optimiser's own learning rate.
        linear_solver: Solves the system, which is not symmetric: hence GMRES.

    Raises:
        ValueError: If `step_size` is not a positive finite number.
    """

    step_size: float
    linear_solver: LinearSolver = option(default_factory=lambda: GMRES(rtol=1e-6))

    def __post_init__(self) -> None:
        require_kinds(self, linear_solver=LinearSolver)
        require_positive(self, "step_size", self.step_size)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The solution of (I + step_size J_o) d = xi."""
        jacobian = field.linearised()
        operator = LinearOperator(lambda v: v + self.step_size * jacobian.off_diagonal(v))
        with torch.no_grad():
            return field.split(self.linear_solver.solve(operator, jacobian.value).solution), state
