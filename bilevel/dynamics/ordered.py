"""Rules of players who move in an order: leaders see how others would follow, by Jacobian products."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as option
from typing import final

import torch
from torch import Tensor

from bilevel.dynamics.base import Dynamics, State
from bilevel.dynamics.field import Field, Jacobian
from bilevel.errors import require_kinds
from bilevel.linear import GMRES, LinearOperator, LinearSolver


def _split(rule: Dynamics, field: Field, leaders: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not 1 <= leaders < len(field.names):
        raise ValueError(
            f"{type(rule).__name__}: leaders={leaders} of the players {list(field.names)}, who play at once; expected "
            "at least one to lead and one to follow. Players with a response have their order already."
        )
    return field.names[:leaders], field.names[leaders:]


@final
@dataclass(frozen=True)
class FollowTheRidge(Dynamics):
    r"""Followers make up for how the leaders' moves shift their optimum; leaders descend their own gradient.

    $$
    d_x = \xi_x, \qquad d_y = \xi_y - r\, J_{yy}^{-1} J_{yx}\, \xi_x
    $$

    The first `leaders` players lead, the others follow together. In zero-sum games its stable points are exactly the
    differential Stackelberg equilibria, the local minimax points.

    Costs one gradient of each player and one linear solve a step, two or three backward passes a product. Source: Wang
    et al. 2019 (arXiv 1910.07512).

    Args:
        ratio: $r$, the leaders' learning rate over the followers'.
        leaders: How many players lead, in order of play.
        linear_solver: Solves with $J_{yy}$, which is not symmetric where several players follow: hence GMRES.

    Raises:
        ValueError: If `ratio` is not a positive finite number or, in the first step, if nobody is left to follow.
    """

    ratio: float = 1.0
    leaders: int = 1
    linear_solver: LinearSolver = option(default_factory=lambda: GMRES(rtol=1e-6))

    def __post_init__(self) -> None:
        require_kinds(self, linear_solver=LinearSolver)
        if not 0.0 < self.ratio < float("inf"):
            raise ValueError(f"FollowTheRidge: ratio={self.ratio}; expected a positive finite number.")

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The field, and the followers' correction."""
        first, last = _split(self, field, self.leaders)
        jacobian = field.linearised()
        lead, follow = (jacobian.part(jacobian.value, names) for names in (first, last))
        pushed = jacobian.between(last, first, lead)
        operator = LinearOperator(lambda v: jacobian.between(last, last, v), symmetric=len(last) == 1)
        with torch.no_grad():
            moved = self.linear_solver.solve(operator, pushed).solution
        return field.split(torch.cat([lead, follow - self.ratio * moved])), state


@final
@dataclass(frozen=True)
class TotalGradient(Dynamics):
    r"""Leaders descend their total derivative, as if the followers' best response were followed; followers their own.

    $$
    d_x = \nabla_x f - J_{yx}^\top J_{yy}^{-\top} \nabla_y f, \qquad d_y = \xi_y,
    $$

    $f$ the leader's loss. The first `leaders` players lead, the others follow together. Where the followers are not at
    their optimum this is the gradient of no function; at equilibria it is the hypergradient of `Implicit`, and the
    stable points of zero-sum games are exactly the differential Stackelberg equilibria. Give the followers the larger
    learning rate.

    Costs a step: one gradient of each player, one of each leader's loss in the followers' variables, and one linear
    solve for each leader. Source: Fiez et al. 2020 (arXiv 1906.01217).

    Args:
        leaders: How many players lead, in order of play.
        linear_solver: Solves with $J_{yy}^\top$, which is not symmetric where several players follow: hence GMRES.

    Raises:
        ValueError: In the first step, if nobody is left to follow.
    """

    leaders: int = 1
    linear_solver: LinearSolver = option(default_factory=lambda: GMRES(rtol=1e-6))

    def __post_init__(self) -> None:
        require_kinds(self, linear_solver=LinearSolver)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The leaders' total derivatives, the followers' own gradients."""
        first, last = _split(self, field, self.leaders)
        jacobian = field.linearised()
        with torch.enable_grad():
            point = field.tracked()
            losses = field.losses(point)
        found = field.split(jacobian.value)
        for name in first:
            wanted = [leaf for other in last for leaf in point[other]]
            slopes = torch.autograd.grad(losses[name], wanted, retain_graph=True, materialize_grads=True)
            found[name] = self._total(jacobian, name, last, torch.cat([s.reshape(-1) for s in slopes]), found[name])
        return found, state

    def _total(
        self, jacobian: Jacobian, name: str, last: tuple[str, ...], crossed: Tensor, direct: list[Tensor]
    ) -> list[Tensor]:
        operator = LinearOperator(lambda v: jacobian.between_transposed(last, last, v), symmetric=len(last) == 1)
        with torch.no_grad():
            adjoint = self.linear_solver.solve(operator, crossed).solution
        indirect = jacobian.between_transposed(last, (name,), adjoint)
        parts = torch.split(indirect, [leaf.numel() for leaf in direct])
        return [leaf - part.reshape(leaf.shape) for leaf, part in zip(direct, parts, strict=True)]
