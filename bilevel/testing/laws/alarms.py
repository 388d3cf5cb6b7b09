"""Laws of alarms: games on which an answer is worth nothing, which must raise or warn and never be silent."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from bilevel.errors import BilevelError, BilevelWarning
from bilevel.game import Game, Player
from bilevel.responses import Response
from bilevel.solving import solve
from bilevel.testing.changes import Changed, ScaledFollower
from bilevel.testing.families import Quadratic
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import NotOffered, ResponseSubject, Subject

# The least curvature may be as small as it likes: who is far off along it is what these laws ask for.
_PLAIN = Quadratic(curvatures=(1.0, 0.5), coupling=((1.0,), (0.5,)), at=(0.5,), target=(1.0, -1.0))


@dataclass(frozen=True)
class FarStart(Changed):
    """The same game, whose follower starts far off in its first entry: its gradient there is large."""

    away: float = 1e4

    @property
    def y0(self) -> Tensor:
        """The inner game's start, `away` further along the first entry."""
        start = self.inner.y0.clone()
        start[0] += self.away
        return start


@dataclass(frozen=True)
class Saddle(KnownGame):
    """A follower that rests on a saddle: f = y_0^2 / 2 - x y_0 - y_1^2 / 2, which no inner solver leaves exactly."""

    radius: float = 0.0

    @property
    def x0(self) -> Tensor:
        """1."""
        return torch.ones(1, dtype=torch.float64)

    @property
    def y0(self) -> Tensor:
        """0 in both: the second entry stands still there."""
        return torch.zeros(2, dtype=torch.float64)

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """What the leader sees is along the second entry for the most part."""
        return 0.1 * y[0] + 2.0 * y[1] + 0.5 * (x @ x)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """Curved up in the first entry and down in the second."""
        return 0.5 * y[0] ** 2 - x[0] * y[0] - 0.5 * y[1] ** 2

    def best_response(self, x: Tensor) -> Tensor:
        """The saddle."""
        return torch.cat([x, torch.zeros_like(x)])


@dataclass(frozen=True)
class ShortSighted:
    """A decay whose right direction only a long horizon shows.

    f = h (y - 1)^2 / 2 + e^x y^2 / 2 from y = 0, and g = (y - 1/2)^2 / 2. At its optimum y is above 1/2, so that more
    decay is right; after a few steps from 0 it is below, so that less decay seems to be, to the edge.
    """

    curvature: float = 0.125
    spread: float | None = None
    """Of what the follower is fitted to, 1 in the mean, in batches of a shuffled `DataLoader`; None for no data."""

    def game(self) -> Game:
        """The leader at a decay far below the curvature."""
        zero = torch.zeros((), dtype=torch.float64)

        def lead(y: Tensor) -> Tensor:
            return 0.5 * (y - 0.5) ** 2

        def follow(x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * self.curvature * (y - 1.0) ** 2 + 0.5 * x.exp() * y**2

        def fit(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
            return 0.5 * self.curvature * (y - batch).square().mean() + 0.5 * x.exp() * y**2

        if self.spread is None:
            return Game(x=Player(lead, zero - 5.0), y=Player(follow, zero))
        rows: Any = 1.0 + self.spread * torch.linspace(-1.0, 1.0, 64, dtype=torch.float64)
        data: DataLoader[Tensor] = DataLoader(rows, batch_size=4, shuffle=True)
        return Game(x=Player(lead, zero - 5.0), y=Player(fit, zero, data=data))

    def best_response(self, x: Tensor) -> Tensor:
        """h / (h + e^x)."""
        return self.curvature / (self.curvature + x.exp())


_FAR_FROM_DONE = "The run ended while"
"""What `solve` says of a leader that needs more steps is no word of the follower."""


def of_the_response(subject: Subject) -> ResponseSubject:
    """The subject, where it is a response; raises `NotOffered`."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response warns.")
    return subject


def of_the_optimum(subject: Subject) -> ResponseSubject:
    """The same where it promises an optimum's derivative and warns of what falls short; raises `NotOffered`."""
    response = of_the_response(subject)
    if response.of_steps:
        raise NotOffered("It promises the derivative of its steps, which is right wherever they end.")
    if not response.response.behaviour.warns:
        raise NotOffered("It says that it does not warn.")
    if response.promise.stated_bias > 0.0:
        raise NotOffered("It states a bias, and for curvatures of 0.17 to 1: these are others.")
    return response


def nan_in_the_middle(subject: Subject, known: KnownGame) -> None:
    """A loss that is NaN in one of the steps raises, though its gradient is finite and the next step's loss too."""
    response = of_the_response(subject)
    if response.optimizer is None or isinstance(response._built(), torch.optim.LBFGS) or not response.adjustable:
        raise NotOffered("No torch.optim optimiser steps its follower: a search may turn a step down.")
    evaluations, armed = 0, False

    def follower(x: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        loss = known.follower(x, y)
        evaluations += armed
        return loss + torch.nan if armed and evaluations == 3 else loss

    game = Game(x=Player(known.leader, known.x0), y=Player(follower, known.y0))
    played = response.with_steps(8)
    state, x = played.init(game), known.x0.clone().requires_grad_()
    armed = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            y, _ = played(game, {"x": x}, state)
        except BilevelError:
            return
    if evaluations < 3:
        raise NotOffered("A call evaluates the follower's loss fewer than three times.")
    assert not bool(torch.isfinite(y).all()), "the follower's loss was NaN in its third evaluation, and nothing raises"


def worse_than_nothing(subject: Subject, known: KnownGame) -> None:
    """An implicit term that is no better than leaving it out comes with a warning.

    For a follower of one entry the error of its adjoint, relative to the adjoint, is the residual of its equation.
    """
    response = of_the_optimum(subject)
    found = response.evaluate(known, response.enough)
    direct = torch.func.grad(known.leader)(known.x0, known.best_response(known.x0))
    implicit = known.hypergradient(known.x0) - direct
    left = float((found.gradient - direct - implicit).norm() / implicit.norm())
    assert left < 1.0 or found.warnings, (
        f"its implicit term is wrong by {left:.3g} of its size, worse than 0 would be, and nothing warns"
    )


def far_start(subject: Subject, known: KnownGame) -> None:
    """A follower that starts far away, and is not at its optimum, is told, whatever its tolerance is relative to."""
    response = of_the_optimum(subject)
    wanted = known.hypergradient(known.x0)
    raised = []
    for steps in (32, 128):
        try:
            found = response.evaluate(known, steps)
        except BilevelError as refused:
            raised.append(refused)
            continue
        wrong = float((found.gradient - wanted).norm() / wanted.norm())
        assert wrong < 0.5 or found.warnings, (
            f"after {steps} steps from far away the hypergradient is wrong by {wrong:.0%}, and nothing warns"
        )
    if len(raised) == 2:
        raise raised[0]


def no_minimum(subject: Subject, known: KnownGame) -> None:
    """A follower that rests where its loss curves down is told of, or refused."""
    response = of_the_optimum(subject)
    if response.estimates:
        raise NotOffered("It estimates, and solves no equation in which the curvature would show.")
    found = response.evaluate(known, response.enough)
    if float(found.follower[1].abs()) > 1e-6:
        raise NotOffered("It left the saddle.")
    assert found.warnings, "its follower rests on a saddle, and nothing warns"


def short_horizon(subject: Subject, known: ShortSighted) -> None:
    """A run in which few steps lead a decay away from where it belongs warns."""
    response = of_the_response(subject)
    played: Response = response.with_steps(4)
    game, path = known.game(), []

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = solve(
            game,
            y=played,
            optimizer=sgd,
            steps=40,
            callbacks=[lambda step, record, variables: path.append(variables["x"].detach().clone())],
        )
    told = [str(entry.message) for entry in caught if issubclass(entry.category, BilevelWarning)]
    told += list(found.warnings)
    told = [text for text in told if not text.startswith(_FAR_FROM_DONE)]
    # In the first half a follower that goes on from call to call may still be on its way.
    before, after = path[19], path[-1]
    losses = [float((known.best_response(x) - 0.5) ** 2) for x in (before, after)]
    assert float(after) >= float(before) or told, (
        f"steps 20 to 40 of the leader move the decay from e^{float(before):.6g} to e^{float(after):.6g}, where its "
        f"loss at the follower's optimum goes from {losses[0]:.6g} up to {losses[1]:.6g}, and nothing warns; a "
        "response that looks only so far ahead says so by `farther`"
    )


def _one(*games: Any) -> Any:
    return lambda: st.sampled_from(games)


_NARROW = Quadratic(curvatures=(1.0,), coupling=((1.0,),), at=(0.5,), target=(1.0,))
_FLAT = Quadratic(curvatures=(1.0, 0.00390625), coupling=((1.0,), (0.00390625,)), at=(1.0,), target=(0.5, -1.0))

ALARMS = (
    Law("NaN in the middle", "a NaN in any step raises", _one(_PLAIN), nan_in_the_middle, 0.1),
    Law(
        "worse than nothing",
        "an adjoint worse than 0 warns",
        _one(ScaledFollower(_NARROW, 3.0)),
        worse_than_nothing,
        0.1,
    ),
    Law("far start", "whoever stops far from the optimum warns", _one(FarStart(_FLAT)), far_start, 0.1),
    Law("no minimum", "a saddle is told of", _one(Saddle()), no_minimum, 0.1),
    Law("short horizon", "few steps that lead astray are told of", _one(ShortSighted()), short_horizon, 0.1),
    Law(
        "short horizon, data",
        "few steps that lead astray are told of on minibatches",
        _one(ShortSighted(spread=1.0)),
        short_horizon,
        0.1,
    ),
)
