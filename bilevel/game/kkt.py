r"""A follower with functions as constraints rests where the Karush-Kuhn-Tucker conditions hold.

Its unknowns are z = (y, l, m): the variables, and the multipliers of the inequalities and of the equalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from bilevel.autodiff import gradient, jacobian
from bilevel.constraints.active_set import KKTPoint, optimum, reached
from bilevel.constraints.base import ConstraintSet
from bilevel.constraints.functions import (
    DOMAIN,
    DOMAIN_EQUALITY,
    EQUALITIES,
    EQUALITY,
    INEQUALITIES,
    INEQUALITY,
    Functions,
    Labels,
    Linearised,
    entry_names,
)
from bilevel.constraints.regularity import kink, require_feasible, require_regular
from bilevel.constraints.walls import Walls, walls
from bilevel.game.constrained import ConstrainedGradient
from bilevel.game.residual import Found, OwnGradient, Residual, Rest
from bilevel.game.situation import GameOfLosses, Present, Situation
from bilevel.randomness import random_kept, random_state
from bilevel.tree import Variables, flatten, join, leaves, map_leaves


@final
@dataclass(frozen=True)
class KKT(Residual):
    r"""The gradient in z = (y, l, m) of the Lagrangian, in which the inequalities that do not bind are left out.

    $$
    L(z) = f + \sum_{l_i > 0} l_i c_i + m^\top e + \tfrac12 \sum_{l_i \le 0} l_i^2
    $$

    F = (f_y + A'l + E'm; c_i where it binds, else l_i; e). Which inequalities bind is told by z itself, l_i > 0:
    `brought_to_rest` gives the others a multiplier of 0. So F is smooth at a solution, to any order, and dF/dz is
    symmetric; it is indefinite, as every saddle's is.

    Args:
        inequality: c, elementwise <= 0, a function or a dict or list of them; None without inequalities.
        equality: e, elementwise = 0, likewise; None without equalities.
        domain: A set whose walls are further constraints; None without one.
    """

    inequality: Functions | None
    equality: Functions | None
    domain: ConstraintSet | None = None
    symmetric = True
    definite = False
    minimises = False
    differentiates_loss = False

    def values(self, at: Situation, variables: Mapping[str, Variables]) -> dict[str, Variables]:
        """What the constraints are, by kind: the inequalities first, and then the equalities."""
        own = {INEQUALITY: self.inequality, EQUALITY: self.equality}
        found = {
            kind: map_leaves(lambda function: at.call(function, variables)[0], functions)
            for kind, functions in own.items()
            if functions is not None
        }
        if self.domain is not None:
            found[DOMAIN], found[DOMAIN_EQUALITY] = walls_of(at.game, at.player, self.domain, variables)
        return in_order(found)

    def require_valid(self, at: Situation) -> None:
        """Raise `ValueError` where the players have made the domain empty."""
        if self.domain is not None:
            ConstrainedGradient(self.domain, None).require_valid(at)

    def __call__(self, at: Situation, y: Sequence[Tensor]) -> Found:
        """The loss and its own gradient, which an inner solver asks for; the constraints come by `programme`."""
        return OwnGradient()(at, y)

    def flat(self, at: Situation, y: Tensor) -> tuple[Tensor, Tensor]:
        """F at `z: [n + m + p]`, and the Lagrangian, which at a solution is the loss."""
        size = at.form.size

        def lagrangian(z: Tensor) -> Tensor:
            variables, rest = at.at_flat(z[:size]), z[size:]
            total, _ = at.loss(variables)
            for kind, tree in self.values(at, variables).items():
                value = flatten(tree)
                multipliers, rest = rest[: len(value)], rest[len(value) :]
                if kind in INEQUALITIES:
                    binds = multipliers > 0.0
                    idle = torch.where(binds, 0.0, multipliers)
                    total = total + 0.5 * (idle * idle).sum()
                    multipliers = torch.where(binds, multipliers, 0.0)
                total = total + (multipliers * value).sum()
            return total

        value, (slope,) = gradient(lagrangian, y)
        return value, slope

    def first(self, follower: Present) -> dict[str, Any]:
        """Multipliers of 0, in the form of what the constraints return."""
        return {"multipliers": FollowerProgramme(follower, self).no_multipliers()}

    def programme(self, follower: Present) -> FollowerProgramme:
        """The follower's programme on its present batch."""
        return FollowerProgramme(follower, self)

    def brought_to_rest(self, follower: Present, y: Sequence[Tensor]) -> Rest:
        """The optimum near y with its multipliers; see `bilevel.constraints.active_set`.

        Raises `InfeasibleError`, `UnboundedError`, `DependentConstraintsError` or `CurvatureError` by name.
        """
        programme, like = FollowerProgramme(follower, self), join(list(y))
        point = optimum(programme, like.detach().to("cpu", torch.float64))
        require_feasible(point, programme.labels, programme.epsilon)
        if not reached(point, programme.epsilon):
            return Rest(unknowns_of(point, point.l, like))  # how far it is from rest is measured, and told
        require_regular(programme, point)
        return rest_of(programme, point, like)


class HasConstraints(Protocol):
    """A residual with constraints."""

    def values(self, at: Situation, variables: Mapping[str, Variables]) -> dict[str, Variables]:
        """What the constraints are, by kind: the inequalities first, and then the equalities."""


def in_order(found: Mapping[str, Variables]) -> dict[str, Variables]:
    """Values of constraints by kind, in the order in which multipliers are laid out; kinds without any left out."""
    return {kind: found[kind] for kind in (*INEQUALITIES, *EQUALITIES) if kind in found and leaves(found[kind])}


def stacked_values(found: Mapping[str, Variables], like: Tensor) -> Tensor:
    """Values of constraints as one vector `[m + p]`, of length 0 where there are none."""
    return flatten(list(found.values())) if found else like[:0]


def walls_of(game: GameOfLosses, player: str, domain: ConstraintSet, variables: Mapping[str, Variables]) -> Walls:
    """The walls of a player's domain where everybody is."""
    given, known = {name: game.value(name, variables) for name in domain.players}, not domain.players
    own = game.value(player, variables)
    return game.each(lambda y, given: walls(domain.settled(given), y, known=known), own, given)  # type: ignore[no-any-return]


def rest_of(programme: FollowerProgramme, point: KKTPoint, like: Tensor) -> Rest:
    """A regular optimum as where a follower came to rest, with both sides of its kink if it is at one."""
    bent = kink(point, programme.labels, programme.epsilon)
    if bent is None:
        return Rest(unknowns_of(point, point.l, like))
    return Rest(unknowns_of(point, point.l, like), bent.story, unknowns_of(point, bent.l, like))


def unknowns_of(point: KKTPoint, l: Tensor, like: Tensor) -> Tensor:
    """(y, l, m) as one vector, in the dtype and on the device of another."""
    return torch.cat([point.y, l, point.m]).to(like)


class FollowerProgramme:
    """A follower's programme in flat float64 vectors on the CPU, on its present batch, buffers and random numbers."""

    minimises = True

    def __init__(self, follower: Present, rests: HasConstraints) -> None:
        self.follower, self._rests, self.random = follower, rests, random_state(follower.game.device)
        self._others, self._below = follower.others, 0
        known = follower.multipliers or follower.game.initial(follower.name)
        self._dtype: torch.dtype = leaves(known)[0].dtype

    @property
    def epsilon(self) -> float:
        """The rounding of the follower's dtype."""
        return torch.finfo(self._dtype).eps

    @property
    def labels(self) -> Labels:
        """What its constraints are called."""
        shapes = self.follower.multipliers
        above, level = (
            tuple(name for kind in kinds if kind in shapes for name in entry_names(kind, shapes[kind]))
            for kinds in (INEQUALITIES, EQUALITIES)
        )
        return Labels(self.follower.name, above, level)

    def values(self, y: Tensor) -> dict[str, Variables]:
        """What the constraints are at a flat y of the follower's own dtype, by kind."""
        with random_kept(self.follower.game.device, start=self.random):
            return self._rests.values(self.situation, self.at(y))

    def no_multipliers(self) -> dict[str, Variables]:
        """Multipliers of 0, in the form of what the constraints return."""
        with torch.no_grad():
            found = self.values(flatten(self.follower.game.initial(self.follower.name)))
        return {what: map_leaves(torch.zeros_like, value) for what, value in found.items()}

    def loss_and_gradient(self, y: Tensor) -> tuple[float, Tensor]:
        """f and its gradient `[n]`."""
        follower = self.follower
        with torch.no_grad():
            value, (slope,) = gradient(self._loss, self.own(y))
        follower.count(1)
        return float(value), plain(slope)

    def linearised(self, y: Tensor) -> Linearised:
        """The constraints and their Jacobians."""

        def stacked(y: Tensor) -> Tensor:
            found = self.values(y)
            self._below = sum(flatten(found[kind]).numel() for kind in INEQUALITIES if kind in found)
            return stacked_values(found, y)

        value, rows = (plain(part) for part in jacobian(stacked, self.own(y)))
        m = self._below
        return Linearised(value[:m], value[m:], rows[:m], rows[m:])

    def hessian(self, y: Tensor, inequality: Tensor, equality: Tensor) -> Tensor:
        """The Lagrangian's Hessian in y `[n, n]`."""
        weights = torch.cat([inequality, equality])

        def lagrangian(y: Tensor) -> Tensor:
            return self._loss(y) + (weights.to(y) * stacked_values(self.values(y), y)).sum()

        with torch.enable_grad():
            _, rows = jacobian(lambda y: gradient(lagrangian, y)[1][0], self.own(y))
        return plain(0.5 * (rows + rows.T))

    def own(self, y: Tensor) -> Tensor:
        """A flat y in the follower's own dtype, on its device."""
        return y.to(device=self.follower.game.device, dtype=self._dtype)

    def _loss(self, y: Tensor) -> Tensor:
        with random_kept(self.follower.game.device, start=self.random):
            return self.situation.loss(self.at(y))[0]

    @property
    def situation(self) -> Situation:
        """The follower's, the others where they were at first."""
        follower = self.follower
        return Situation(follower.game, follower.name, self._others, follower.batch, follower.buffers)

    def at(self, y: Tensor) -> dict[str, Variables]:
        """Everybody's variables, the follower's at a flat y."""
        return self.situation.at_flat(y)


def plain(tensor: Tensor) -> Tensor:
    """Detached, in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64)
