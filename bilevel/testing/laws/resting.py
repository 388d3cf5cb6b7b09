"""Laws of rest: where a follower's gradient vanishes and nobody is at an optimum, something is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.certificates import Certificate, Standing, certify, certify_nash
from bilevel.errors import BilevelWarning
from bilevel.game import Game, Player
from bilevel.responses import Response
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import NotOffered, ResponseSubject, Subject
from bilevel.tree import Variables, map_leaves

_ONE = torch.ones((), dtype=torch.float64)


def _of_a_solver(subject: Subject) -> Response:
    """The response, if it solves for the optimum's derivative and says how that went."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response warns.")
    if subject.of_steps:
        raise NotOffered("It promises the derivative of its steps, which is right wherever they end.")
    if not subject.response.behaviour.warns:
        raise NotOffered("It says that it does not warn.")
    if subject.estimates:
        raise NotOffered("It estimates, and solves no equation in which the curvature would show.")
    return subject.with_steps(subject.enough)


@dataclass(frozen=True)
class _Answered:
    """What a response made of a game: its answer, the leader's hypergradient, and what was told."""

    answer: Variables
    gradient: Tensor
    told: list[str]


def _answered(response: Response, game: Game) -> _Answered:
    leader, follower = game.names
    x = game.initial(leader).requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y, _ = response(game, {leader: x}, response.init(game))
        except TypeError as error:
            if len(game.members(follower)) == 1:
                raise
            raise NotOffered("It refuses several followers who answer together.") from error
        (gradient,) = torch.autograd.grad(game.loss(leader, {leader: x, follower: y}), x)
    told = [str(entry.message) for entry in caught if issubclass(entry.category, BilevelWarning)]
    return _Answered(map_leaves(Tensor.detach, y), gradient, told)


# Members ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two followers who answer together, p at a minimum of its own loss and q at none.

    `maximum`: f_p = p^2 / 2 - x p / 2 + 3 p q / 4 and f_q = -q^2 / 8 + x q / 2 - 3 p q / 4. The Jacobian of their
    gradients, [[1, 3/4], [-3/4, -1/4]], has the eigenvalues (3 +- i sqrt 11) / 8: steps of both settle there from
    everywhere, and the joint equation is as well posed as it looks. But q's own curvature is -1/4.

    Else f_q = q_0^2 / 2 - x q_0 - q_1^2 / 2 + p q_0 / 4, a saddle whose second entry stands still at 0.
    """

    maximum: bool

    def game(self) -> Game:
        """The leader x at 1, everybody else at 0."""
        zero = torch.zeros((), dtype=torch.float64)

        def lead(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
            return (p - 1.0) ** 2 + 2.0 * q.reshape(-1)[-1] + 0.5 * x**2

        def first(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
            return 0.5 * p**2 - 0.5 * x * p + 0.75 * p * q.reshape(-1)[0]

        def peak(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
            return -0.125 * q**2 + 0.5 * x * q - 0.75 * p * q

        def saddle(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
            return 0.5 * q[0] ** 2 - x * q[0] - 0.5 * q[1] ** 2 + 0.25 * p * q[0]

        second = Player(peak, zero) if self.maximum else Player(saddle, torch.zeros(2, dtype=torch.float64))
        return Game(x=Player(lead, _ONE), p=Player(first, zero), q=second).joined(pair=("p", "q"))

    def rest(self) -> dict[str, Any]:
        """Where all gradients of the pair vanish, the leader at 1, by hand."""
        if self.maximum:  # p + 3 q / 4 = 1/2 and 3 p / 4 + q / 4 = 1/2
            p, q = 0.8 * _ONE, -0.4 * _ONE
        else:  # p + 3 q_0 / 4 = 1/2 and p / 4 + q_0 = 1
            p, q = -4.0 / 13.0 * _ONE, torch.tensor([14.0 / 13.0, 0.0], dtype=torch.float64)
        return {"x": _ONE, "pair": {"p": p, "q": q}}


def members_at_minima(subject: Subject, pair: Pair) -> None:
    """Followers who answer together, one of them at a maximum or a saddle of its own loss, are told of, or refused."""
    found = _answered(_of_a_solver(subject), pair.game())
    if float(found.answer["q"].reshape(-1)[-1].abs()) > 1.0:
        raise NotOffered("It left the place where the gradients vanish.")
    assert found.told, (
        f"the joint gradient vanishes, player 'q' is at a {'maximum' if pair.maximum else 'saddle'} of its own loss, "
        "and nothing warns"
    )


# Demand that dies out --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DyingDemand:
    """Firms with a logit demand that set their prices together, or one of them alone, in answer to a leader's price.

    Firm i's profit (p_i - c_i) s_i has its gradient in p_i vanish at one optimum, p_i = c_i + 1 / (2 (1 - s_i)), and
    where no demand is left, which is where a search for a root may go from prices of 3.
    """

    firms: int

    def game(self) -> Game:
        """The leader at a price of 2, its followers at 3."""
        names = ("p1", "p2", "p3")[: self.firms + 1]

        def own(i: int) -> Callable[..., Tensor]:
            def one(p1: Tensor, p2: Tensor) -> Tensor:
                return -self._profit(torch.stack([p1, p2]), i)

            def two(p1: Tensor, p2: Tensor, p3: Tensor) -> Tensor:
                return -self._profit(torch.stack([p1, p2, p3]), i)

            return one if self.firms == 1 else two

        game = Game(**{name: Player(own(i), (3.0 if i else 2.0) * _ONE) for i, name in enumerate(names)})
        return game if self.firms == 1 else game.joined(rest=("p2", "p3"))

    @property
    def _costs(self) -> Tensor:
        return torch.tensor([1.0, 1.0, 0.8], dtype=torch.float64)[: self.firms + 1]

    def _shares(self, prices: Tensor) -> Tensor:
        worth = torch.tensor([3.0, 2.5, 2.0], dtype=torch.float64)[: self.firms + 1]
        return torch.softmax(torch.cat([torch.zeros(1, dtype=torch.float64), 2.0 * (worth - prices)]), 0)[1:]

    def _profit(self, prices: Tensor, firm: int) -> Tensor:
        return (prices[firm] - self._costs[firm]) * self._shares(prices)[firm]

    def demand(self, answer: Variables) -> float:
        """The least share that any of the followers sells at these prices, the leader at 2."""
        own = list(answer.values()) if isinstance(answer, Mapping) else [answer]
        return float(self._shares(torch.stack([2.0 * _ONE, *own]))[1:].min())

    def leader(self, price: float) -> float:
        """The leader's loss where its followers are at their optimum."""
        prices = torch.cat([torch.tensor([price], dtype=torch.float64), self._costs[1:] + 1.0])
        for _ in range(100):  # the map contracts by less than a half
            prices[1:] = self._costs[1:] + 0.5 / (1.0 - self._shares(prices)[1:])
        return -float(self._profit(prices, 0))

    def hypergradient(self) -> float:
        """At a price of 2, by central differences: to 1e-9."""
        step = 1e-4
        return (self.leader(2.0 + step) - self.leader(2.0 - step)) / (2.0 * step)


def demand_is_alive(subject: Subject, known: DyingDemand) -> None:
    """A follower that a search has led to where its demand has died out, and every derivative with it, is told of."""
    found, wanted = _answered(_of_a_solver(subject), known.game()), known.hypergradient()
    if known.demand(found.answer) > 1e-3:
        raise NotOffered("It ended where there is demand.")
    wrong = abs(float(found.gradient) - wanted) / abs(wanted)
    assert wrong < 0.5 or found.told, (
        f"its gradient vanishes at prices of {_numbers(found.answer)}, where nobody buys: the hypergradient is wrong "
        f"by {wrong:.0%}, and nothing warns"
    )


def _numbers(answer: Variables) -> str:
    every = answer.values() if isinstance(answer, Mapping) else [answer]
    return ", ".join(f"{float(one):.4g}" for one in every)


# Certificates ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stationary:
    """A point at which every player's own gradient vanishes, and one of them is at no minimum.

    `kind`: "maximum" and "saddle" are those of `Pair`, "alone" a follower at a maximum, "nash" two who move together.
    """

    kind: str

    def certificate(self, response: Response) -> Certificate:
        """What is certified of it."""
        if self.kind in ("maximum", "saddle"):
            pair = Pair(self.kind == "maximum")
            return certify(pair.game(), pair.rest(), response=response)
        zero = torch.zeros((), dtype=torch.float64)

        def lead(x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * x**2 + x * y + y**2

        def peak(x: Tensor, y: Tensor) -> Tensor:
            return x * y - 0.5 * y**2

        game = Game(x=Player(lead, _ONE), y=Player(peak, zero))
        point = {"x": zero, "y": zero}
        return certify_nash(game, point) if self.kind == "nash" else certify(game, point, response=response)


def minima_are_certified(subject: Subject, point: Stationary) -> None:
    """A point that is stationary for all, and no optimum for one player, is refuted, with any response."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response is certified.")
    found = point.certificate(subject.response)
    assert found.standing is Standing.REFUTED, (
        f"a player is at a maximum or saddle of its own loss, and the certificate is {found.standing.value}"
    )


# -----------------------------------------------------------------------------------------------------------------


def _pairs() -> st.SearchStrategy[Pair]:
    return st.sampled_from((Pair(maximum=True), Pair(maximum=False)))


def _demands() -> st.SearchStrategy[DyingDemand]:
    return st.sampled_from((DyingDemand(1), DyingDemand(2)))


def _points() -> st.SearchStrategy[Stationary]:
    return st.sampled_from([Stationary(kind) for kind in ("maximum", "saddle", "alone", "nash")])


RESTING = (
    Law("members", "each of a joint player is at a minimum of its own", _pairs, members_at_minima, 0.5),
    Law("dead demand", "a root that is no optimum is told of", _demands, demand_is_alive, 0.5),
    Law("certificates", "what is stationary and no optimum is refuted", _points, minima_are_certified, 1.0),
)
