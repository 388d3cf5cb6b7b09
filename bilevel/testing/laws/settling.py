"""Laws of settling: a follower that starts at its optimum, and horizons of many games, tasks and SciPy's leaders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.errors import FollowerNonConvergenceWarning
from bilevel.game import Game, Player
from bilevel.inner import Scipy
from bilevel.many import Games, Tasks
from bilevel.solving import solve
from bilevel.testing.changes import Changed, ScaledFollower
from bilevel.testing.families import Quadratic
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.alarms import of_the_optimum, of_the_response
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import NotOffered, Subject


@dataclass(frozen=True)
class AtRest(Changed):
    """The same game, whose follower starts at its optimum, up to rounding."""

    @property
    def y0(self) -> Tensor:
        """The best response to where the leader starts."""
        return self.inner.best_response(self.inner.x0)


def starts_at_rest(subject: Subject, known: KnownGame) -> None:
    """Who starts at its optimum is not told of there; once the leader has moved, it has followed or is told of."""
    response = of_the_optimum(subject)
    played = response.with_steps(response.enough)
    game = Game(x=Player(known.leader, known.x0), y=Player(known.follower, known.y0))
    state, told = played.init(game), []
    for place, x in enumerate((known.x0, known.x0 + 0.5)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y, state = played(game, {"x": x.clone().requires_grad_()}, state)
        told = [str(entry.message) for entry in caught if issubclass(entry.category, FollowerNonConvergenceWarning)]
        assert place or not told, f"its follower starts at its optimum, up to rounding, and is told of: {told[0]}"
    moved = float((known.best_response(known.x0 + 0.5) - known.y0).norm())
    left = float((y.detach() - known.best_response(known.x0 + 0.5)).norm())
    assert left <= 0.5 * moved or told, (
        f"its follower started at its optimum; the leader has moved that by {moved:.3g}, the answer is {left:.3g} from "
        "it, and nothing warns"
    )


@dataclass(frozen=True)
class Horizons:
    """Decays whose right direction only a long horizon shows, `of` some kind, and what moves the leader.

    "games": two at once, in the second of which the follower is slow. "tasks": two that share the leader. "SciPy": one
    that its minimiser moves, in fewer evaluations than the steps of a first look.
    """

    of: str
    curvature: float = 0.125

    @property
    def optimizer(self) -> Any:
        """The leader's."""
        return Scipy("L-BFGS-B") if self.of == "SciPy" else lambda parameters: torch.optim.SGD(parameters, lr=0.1)

    def game(self) -> Game:
        """The leader at a decay far below the curvature, or in SciPy's reach of it."""
        zero = torch.zeros((), dtype=torch.float64)

        def lead(y: Tensor) -> Tensor:
            return 0.5 * (y - 0.5) ** 2

        def follow(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
            return 0.5 * batch * (y - 1.0) ** 2 + 0.5 * x.exp() * y**2

        slow = torch.full((2,), self.curvature, dtype=torch.float64)
        if self.of == "tasks":
            leader = Player(lambda y, batch: lead(y) + 0.0 * batch, zero - 5.0)
            return Tasks(x=leader, y=Player(follow, zero), data=[{"support": slow, "query": slow}])
        one = Game(x=Player(lead, zero - (3.0 if self.of == "SciPy" else 5.0)), y=Player(follow, zero, data=[slow[0]]))
        fast = torch.tensor([1.0, self.curvature], dtype=torch.float64)
        return one if self.of == "SciPy" else Games(one, 2, data={"y": [fast]})

    def best_response(self, x: Tensor) -> Tensor:
        """h / (h + e^x) of the slow one."""
        return self.curvature / (self.curvature + x.exp())


def horizons(subject: Subject, known: Horizons) -> None:
    """A run in which few steps lead a slow one's decay away from where it belongs warns, and says of which."""
    response = of_the_response(subject)
    if response.estimates:
        raise NotOffered("It says that it estimates, and how far it looks is not what it is wrong by.")
    if known.of == "SciPy" and response.response.behaviour.warm:
        raise NotOffered("It goes on from call to call, and what SciPy moves by is to be a function of the leader.")
    played = response.with_steps(4)
    path: list[Tensor] = []

    def note(step: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        path.append(variables["x"].detach().reshape(-1)[-1].clone())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = solve(known.game(), y=played, optimizer=known.optimizer, steps=40, callbacks=[note])
        except TypeError as refused:
            raise NotOffered(str(refused)) from refused
    one: Any = found[1] if known.of == "games" else found  # type: ignore[index]
    end = found.variables["x"].reshape(-1)[-1]
    before = path[19] if len(path) > 19 else path[0]
    told = [text for text in one.warnings if "The run ended while" not in text and not text.startswith("SciPy's")]
    assert float(end) >= float(before) or told, (
        f"the leader's steps move the decay of a slow follower from e^{float(before):.4g} to e^{float(end):.4g}, where "
        f"its loss at the follower's optimum goes from {float((known.best_response(before) - 0.5) ** 2):.4g} up to "
        f"{float((known.best_response(end) - 0.5) ** 2):.4g}, and nothing warns"
    )


def _one(*games: Any) -> Callable[[], Any]:
    return lambda: st.sampled_from(games)


_PLAIN = Quadratic(curvatures=(1.0, 0.3), coupling=((0.1,), (0.7,)), at=(0.7,), target=(1.0, -1.0))

SETTLING = (
    Law(
        "at rest",
        "who starts at its optimum follows, and is not told of before it moves",
        _one(AtRest(_PLAIN), AtRest(ScaledFollower(_PLAIN, 0.01))),
        starts_at_rest,
        0.2,
    ),
    *(
        Law(f"short horizon, {of}", "few steps that lead astray are told of", _one(Horizons(of)), horizons, 0.1)
        for of in ("games", "tasks", "SciPy")
    ),
)
