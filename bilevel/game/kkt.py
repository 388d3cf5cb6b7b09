r"""A follower with functions as constraints rests where the Karush-Kuhn-Tucker conditions hold.

Its unknowns are z = (y, l, m): the variables, and the multipliers of the inequalities and of the equalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import gradient, jacobian
from bilevel.constraints.active_set import KKTPoint, optimum, reached
from bilevel.constraints.functions import EQUALITY, INEQUALITY, Labels, Linearised, entry_names
from bilevel.constraints.regularity import kink, require_feasible, require_regular
from bilevel.game.data import Batch
from bilevel.game.residual import Buffers, Found, OwnGradient, PlayedGame, Present, Residual, Rest
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
        inequality: c, elementwise <= 0; None without inequalities.
        equality: e, elementwise = 0; None without equalities.
    """

    inequality: Callable[..., Variables] | None
    equality: Callable[..., Variables] | None
    symmetric = True
    definite = False
    minimises = False
    differentiates_loss = False

    @property
    def functions(self) -> dict[str, Callable[..., Variables]]:
        """The constraints by what they are called."""
        both = {INEQUALITY: self.inequality, EQUALITY: self.equality}
        return {what: function for what, function in both.items() if function is not None}

    def __call__(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> Found:
        """The loss and its own gradient, which an inner solver asks for; the constraints come by `programme`."""
        return OwnGradient()(game, player, y, others, batch, buffers)

    def flat(
        self,
        game: PlayedGame,
        player: str,
        y: Tensor,
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> tuple[Tensor, Tensor]:
        """F at `z: [n + m + p]`, and the Lagrangian, which at a solution is the loss."""
        form = game.structure(player)

        def lagrangian(z: Tensor) -> Tensor:
            variables = {**others, player: form.unflatten(z[: form.size])}
            total, rest = game.total(game.evaluate(player, variables, batch, buffers)[0]), z[form.size :]
            for what, function in self.functions.items():
                value = flatten(game.call(player, function, variables, batch, buffers, {})[0])
                multipliers, rest = rest[: len(value)], rest[len(value) :]
                if what == INEQUALITY:
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
        found = FollowerProgramme(follower, self).values(flatten(follower.game.initial(follower.name)))
        return {"multipliers": {what: map_leaves(torch.zeros_like, value) for what, value in found.items()}}

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
            return Rest(_unknowns(point, point.l, like))  # how far it is from rest is measured, and told
        require_regular(programme, point)
        bent = kink(point, programme.labels, programme.epsilon)
        if bent is None:
            return Rest(_unknowns(point, point.l, like))
        return Rest(_unknowns(point, point.l, like), bent.story, _unknowns(point, bent.l, like))


def _unknowns(point: KKTPoint, l: Tensor, like: Tensor) -> Tensor:
    return torch.cat([point.y, l, point.m]).to(like)


class FollowerProgramme:
    """A follower's programme in flat float64 vectors on the CPU, on its present batch, buffers and random numbers."""

    def __init__(self, follower: Present, rests: KKT) -> None:
        self._follower, self._rests, self._random = follower, rests, random_state(follower.game.device)
        self._others = follower.others
        known = follower.multipliers or follower.game.initial(follower.name)
        self._dtype: torch.dtype = leaves(known)[0].dtype

    @property
    def epsilon(self) -> float:
        """The rounding of the follower's dtype."""
        return torch.finfo(self._dtype).eps

    @property
    def labels(self) -> Labels:
        """What its constraints are called."""
        shapes = self._follower.multipliers
        names = {what: entry_names(what, shapes[what]) for what in self._rests.functions}
        return Labels(self._follower.name, names.get(INEQUALITY, ()), names.get(EQUALITY, ()))

    def values(self, y: Tensor) -> dict[str, Variables]:
        """What the constraints return at a flat y of the follower's own dtype."""
        with torch.no_grad():
            return {what: self._call(function, y) for what, function in self._rests.functions.items()}

    def loss_and_gradient(self, y: Tensor) -> tuple[float, Tensor]:
        """f and its gradient `[n]`."""
        follower = self._follower
        with torch.no_grad():
            value, (slope,) = gradient(self._loss, self._own(y))
        follower.count(1)
        return float(value), _plain(slope)

    def linearised(self, y: Tensor) -> Linearised:
        """The constraints and their Jacobians."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for what in (INEQUALITY, EQUALITY):
            function = self._rests.functions.get(what)
            if function is None:
                found[what] = y.new_zeros(0), y.new_zeros(0, len(y))
                continue
            value, rows = jacobian(lambda y, function=function: flatten(self._call(function, y)), self._own(y))  # type: ignore[misc]
            found[what] = _plain(value), _plain(rows)
        (c, A), (e, E) = found[INEQUALITY], found[EQUALITY]
        return Linearised(c, e, A, E)

    def hessian(self, y: Tensor, inequality: Tensor, equality: Tensor) -> Tensor:
        """The Lagrangian's Hessian in y `[n, n]`."""
        weights = {INEQUALITY: inequality, EQUALITY: equality}

        def lagrangian(y: Tensor) -> Tensor:
            total = self._loss(y)
            for what, function in self._rests.functions.items():
                total = total + (weights[what].to(y) * flatten(self._call(function, y))).sum()
            return total

        with torch.enable_grad():
            _, rows = jacobian(lambda y: gradient(lagrangian, y)[1][0], self._own(y))
        return _plain(0.5 * (rows + rows.T))

    def _own(self, y: Tensor) -> Tensor:
        return y.to(device=self._follower.game.device, dtype=self._dtype)

    def _loss(self, y: Tensor) -> Tensor:
        follower = self._follower
        with random_kept(follower.game.device, start=self._random):
            return follower.game.loss(follower.name, self._at(y), follower.batch, follower.buffers)

    def _call(self, function: Callable[..., Variables], y: Tensor) -> Variables:
        follower = self._follower
        with random_kept(follower.game.device, start=self._random):
            return follower.game.call(follower.name, function, self._at(y), follower.batch, follower.buffers, {})[0]

    def _at(self, y: Tensor) -> dict[str, Variables]:
        return {**self._others, self._follower.name: self._follower.form.unflatten(y)}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
