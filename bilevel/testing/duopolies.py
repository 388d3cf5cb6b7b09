"""Duopolies, one firm moving first: families of leader-follower games with known answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from bilevel.testing.known import DOUBLE, KnownGame, Numbers, constant


@final
@dataclass(frozen=True)
class Cournot(KnownGame):
    """Two firms choose quantities, the leader first; losses are $-q_i (a - b (q_1 + q_2) - c_i)$, negative profits.

    The follower's curvature is $2 b$.

    Args:
        intercept: a.
        slope: b.
        costs: The leader's, the follower's.
        at: The leader's quantity `[1]`.
        radius: How far from its optimum the follower starts.
    """

    intercept: float
    slope: float
    costs: tuple[float, float]
    at: Numbers = (1.0,)
    radius: float = 1.0

    @property
    def x0(self) -> Tensor:
        """The leader's quantity."""
        return constant(self.at, DOUBLE)

    @property
    def quadratic(self) -> bool:
        """Yes."""
        return True

    def _loss(self, own: Tensor, other: Tensor, cost: float) -> Tensor:
        return (-own * (self.intercept - self.slope * (own + other) - cost)).sum()

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """The leader's negative profit."""
        return self._loss(x, y, self.costs[0])

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """The follower's negative profit."""
        return self._loss(y, x, self.costs[1])

    def best_response(self, x: Tensor) -> Tensor:
        """(a - c - b x) / 2b."""
        return (self.intercept - self.costs[1] - self.slope * x) / (2.0 * self.slope)

    def equilibrium(self) -> Tensor:
        """(a - 2 c_leader + c_follower) / 2b."""
        quantity = (self.intercept - 2.0 * self.costs[0] + self.costs[1]) / (2.0 * self.slope)
        return constant((quantity,), DOUBLE)

    def nash(self) -> tuple[Tensor, Tensor]:
        """Both quantities when they move together: (a - 2 c_i + c_j) / 3b."""
        first, second = self.costs
        pair = [
            (self.intercept - 2.0 * own + other) / (3.0 * self.slope)
            for own, other in ((first, second), (second, first))
        ]
        return constant((pair[0],), DOUBLE), constant((pair[1],), DOUBLE)


@final
@dataclass(frozen=True)
class Bertrand(KnownGame):
    r"""Two firms choose prices, the leader first; losses are $-(p_i - c) (\alpha - \beta p_i + \gamma p_j)$, negative
    profits.

    Demand is stable for $\gamma < \beta$. The follower's curvature is $2 \beta$.

    Args:
        alpha: Demand at prices of 0.
        beta: What an own price takes from it.
        gamma: What the other's price adds to it.
        cost: c of both.
        at: The leader's price `[1]`.
        radius: How far from its optimum the follower starts.
    """

    alpha: float
    beta: float
    gamma: float
    cost: float
    at: Numbers = (1.0,)
    radius: float = 1.0

    @property
    def x0(self) -> Tensor:
        """The leader's price."""
        return constant(self.at, DOUBLE)

    @property
    def quadratic(self) -> bool:
        """Yes."""
        return True

    def _loss(self, own: Tensor, other: Tensor) -> Tensor:
        return (-(own - self.cost) * (self.alpha - self.beta * own + self.gamma * other)).sum()

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """The leader's negative profit."""
        return self._loss(x, y)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """The follower's negative profit."""
        return self._loss(y, x)

    def best_response(self, x: Tensor) -> Tensor:
        """(alpha + gamma x + beta c) / 2 beta."""
        return (self.alpha + self.gamma * x + self.beta * self.cost) / (2.0 * self.beta)

    def nash(self) -> tuple[Tensor, Tensor]:
        """Both prices when they move together: (alpha + beta c) / (2 beta - gamma)."""
        price = constant(((self.alpha + self.beta * self.cost) / (2.0 * self.beta - self.gamma),), DOUBLE)
        return price, price
