"""Families of leader-follower games with known answers. All followers have curvatures of at most about 1.

So any gradient method with a step size of up to 1 converges on each of them, and how fast is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.testing.known import KnownGame, Matrix, Numbers, constant, polished, reflection


@final
@dataclass(frozen=True)
class Quadratic(KnownGame):
    r"""A quadratic follower and a quadratic leader.

    $$
    f = \tfrac12 y^\top H y - y^\top B x, \qquad
    g = \tfrac12 |y - t|^2 + y^\top D x + \tfrac{a}{2} |x|^2, \qquad y^* = H^{-1} B x
    $$

    With $D = -B$ the game is potential: its Jacobian is symmetric.

    Args:
        curvatures: The eigenvalues of H `[m]`.
        coupling: B `[m, n]`.
        at: Where the leader stands `[n]`.
        axis: The eigenvectors of H are the unit vectors reflected along this `[m]`; default: not at all.
        target: t `[m]`; default 0.
        cross: D `[m, n]`; default 0.
        ridge: a.
        radius: How far from its optimum the follower starts.
    """

    curvatures: Numbers
    coupling: Matrix
    at: Numbers
    axis: Numbers = ()
    target: Numbers = ()
    cross: Matrix = ()
    ridge: float = 1.0
    radius: float = 1.0

    @property
    def x0(self) -> Tensor:
        """Where the leader stands."""
        return constant(self.at, _DOUBLE)

    @property
    def quadratic(self) -> bool:
        """Yes."""
        return True

    def _curved(self, like: Tensor) -> Tensor:
        values = constant(self.curvatures, like)
        turn = reflection(self.axis or (0.0,) * len(self.curvatures), like)
        curved: Tensor = turn @ (values[:, None] * turn.T)
        return curved

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        away = y - constant(self.target, x) if self.target else y
        loss = 0.5 * (away @ away) + 0.5 * self.ridge * (x @ x)
        return loss + y @ (constant(self.cross, x) @ x) if self.cross else loss

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return 0.5 * (y @ (self._curved(x) @ y)) - y @ (constant(self.coupling, x) @ x)

    def best_response(self, x: Tensor) -> Tensor:
        """H^-1 B x."""
        answer: Tensor = torch.linalg.solve(self._curved(x), constant(self.coupling, x) @ x)
        return answer


@final
@dataclass(frozen=True)
class Ridge(KnownGame):
    r"""Ridge regression with one penalty a weight, tuned on other examples.

    $$
    f = \tfrac12 \operatorname{mean} (A w - b)^2 + \tfrac12 \sum_i e^{x_i} w_i^2, \qquad
    g = \tfrac12 \operatorname{mean} (C w - d)^2
    $$

    A is scaled so that the largest eigenvalue of $A^\top A / \text{rows}$ is 1/2; penalties in x of up to $\log
    \tfrac12$ keep the curvature below 1.

    Args:
        train: (A, b) as rows $(a_1, \dots, a_n, b)$ `[rows, n + 1]`.
        valid: (C, d) in the same form.
        at: Where the leader stands `[n]`: log penalties.
        radius: How far from its optimum the follower starts.
    """

    train: Matrix
    valid: Matrix
    at: Numbers
    radius: float = 1.0

    @property
    def x0(self) -> Tensor:
        """Where the leader stands: log penalties."""
        return constant(self.at, _DOUBLE)

    def _data(self, rows: Matrix, like: Tensor) -> tuple[Tensor, Tensor]:
        table = constant(rows, like)
        inputs, outputs = table[:, :-1], table[:, -1]
        reach = torch.linalg.matrix_norm(inputs, 2) * (2.0 / len(rows)) ** 0.5
        return inputs / reach.clamp_min(1e-12), outputs

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        inputs, outputs = self._data(self.valid, x)
        loss: Tensor = 0.5 * (inputs @ y - outputs).square().mean()
        return loss

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        inputs, outputs = self._data(self.train, x)
        return 0.5 * (inputs @ y - outputs).square().mean() + 0.5 * (x.exp() * y.square()).sum()

    def best_response(self, x: Tensor) -> Tensor:
        """(A'A / rows + diag exp x)^-1 A'b / rows."""
        inputs, outputs = self._data(self.train, x)
        gram = inputs.T @ inputs / len(self.train) + torch.diag(x.exp())
        answer: Tensor = torch.linalg.solve(gram, inputs.T @ outputs / len(self.train))
        return answer


@final
@dataclass(frozen=True)
class Logistic(KnownGame):
    r"""Logistic regression with one penalty a weight, tuned on other examples.

    $$
    f = \operatorname{mean} \log(1 + e^{-b A w}) + \tfrac12 \sum_i e^{x_i} w_i^2, \qquad
    g = \operatorname{mean} \log(1 + e^{-d C w})
    $$

    A is scaled as in `Ridge`. The best response is found by Newton's method to rounding.

    Args:
        train: (A, b) as rows $(a_1, \dots, a_n, b)$ `[rows, n + 1]`, with b -1 or 1.
        valid: (C, d) in the same form.
        at: Where the leader stands `[n]`: log penalties.
        radius: How far from its optimum the follower starts.
    """

    train: Matrix
    valid: Matrix
    at: Numbers
    radius: float = 1.0

    @property
    def x0(self) -> Tensor:
        """Where the leader stands: log penalties."""
        return constant(self.at, _DOUBLE)

    def _signed(self, rows: Matrix, like: Tensor) -> Tensor:
        """The inputs, each row times its label."""
        table = constant(rows, like)
        inputs = table[:, :-1]
        reach = torch.linalg.matrix_norm(inputs, 2) * (0.5 / len(rows)) ** 0.5
        signed: Tensor = table[:, -1:] * inputs / reach.clamp_min(1e-12)
        return signed

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        return softplus(-(self._signed(self.valid, x) @ y)).mean()

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return softplus(-(self._signed(self.train, x) @ y)).mean() + 0.5 * (x.exp() * y.square()).sum()

    def best_response(self, x: Tensor) -> Tensor:
        """argmin f, by Newton's method."""
        inputs, count = self._signed(self.train, x), len(self.train)

        def slope(x: Tensor, y: Tensor) -> Tensor:
            return -inputs.T @ torch.sigmoid(-(inputs @ y)) / count + x.exp() * y

        def hessian(x: Tensor, y: Tensor) -> Tensor:
            share = torch.sigmoid(inputs @ y)
            return inputs.T @ ((share * (1.0 - share))[:, None] * inputs) / count + torch.diag(x.exp())

        return polished(x, torch.zeros(len(self.at), dtype=x.dtype, device=x.device), slope, hessian)


@final
@dataclass(frozen=True)
class Exponential(KnownGame):
    r"""A follower regularised by an exponential.

    $$
    f = \sum_i e^{y_i} - u_i(x)\, y_i, \qquad u = \text{least} + (\text{most} - \text{least})\, \sigma(B x), \qquad
    y^* = \log u
    $$

    The leader's loss is $g = \tfrac12 |y - t|^2 + \tfrac12 |x|^2$. The curvature at the best response is u: from
    `least` to `most` whatever is drawn.

    Args:
        coupling: B `[m, n]`.
        at: Where the leader stands `[n]`.
        target: t `[m]`.
        least: Of the curvature.
        most: Of the curvature.
        radius: How far from its optimum the follower starts.
    """

    coupling: Matrix
    at: Numbers
    target: Numbers
    least: float = 0.2
    most: float = 0.7
    radius: float = 0.3

    @property
    def x0(self) -> Tensor:
        """Where the leader stands."""
        return constant(self.at, _DOUBLE)

    def _supply(self, x: Tensor) -> Tensor:
        return self.least + (self.most - self.least) * torch.sigmoid(constant(self.coupling, x) @ x)

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        return _near(x, y, self.target)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return (y.exp() - self._supply(x) * y).sum()

    def best_response(self, x: Tensor) -> Tensor:
        """log u."""
        return self._supply(x).log()


@final
@dataclass(frozen=True)
class LogBarrier(KnownGame):
    r"""A follower kept positive by a logarithmic barrier.

    $$
    f = \tfrac12 \sum_i \tfrac18 y_i^2 + p_i(x)\, y_i - \tfrac14 \log y_i, \qquad p = \tfrac12 \sigma(B x), \qquad
    y^* = 2 \Big(\sqrt{p^2 + \tfrac14} - p\Big)
    $$

    The leader's loss is $g = \tfrac12 |y - t|^2 + \tfrac12 |x|^2$. Curvatures lie between 1/4 and 1; the follower
    starts above its best response, where gradient steps stay positive.

    Args:
        coupling: B `[m, n]`.
        at: Where the leader stands `[n]`.
        target: t `[m]`.
        radius: How far from its optimum the follower starts.
    """

    coupling: Matrix
    at: Numbers
    target: Numbers
    radius: float = 0.3

    @property
    def x0(self) -> Tensor:
        """Where the leader stands."""
        return constant(self.at, _DOUBLE)

    def _price(self, x: Tensor) -> Tensor:
        return 0.5 * torch.sigmoid(constant(self.coupling, x) @ x)

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        return _near(x, y, self.target)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return 0.5 * (0.125 * y.square() + self._price(x) * y - 0.25 * y.log()).sum()

    def best_response(self, x: Tensor) -> Tensor:
        """The positive root of y / 4 + p - 1 / (4 y) = 0."""
        price = self._price(x)
        return 2.0 * ((price.square() + 0.25).sqrt() - price)


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
        return constant(self.at, _DOUBLE)

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
        return constant((quantity,), _DOUBLE)

    def nash(self) -> tuple[Tensor, Tensor]:
        """Both quantities when they move together: (a - 2 c_i + c_j) / 3b."""
        first, second = self.costs
        pair = [
            (self.intercept - 2.0 * own + other) / (3.0 * self.slope)
            for own, other in ((first, second), (second, first))
        ]
        return constant((pair[0],), _DOUBLE), constant((pair[1],), _DOUBLE)


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
        return constant(self.at, _DOUBLE)

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
        price = constant(((self.alpha + self.beta * self.cost) / (2.0 * self.beta - self.gamma),), _DOUBLE)
        return price, price


def _near(x: Tensor, y: Tensor, target: Numbers) -> Tensor:
    away = y - constant(target, x)
    return 0.5 * (away @ away) + 0.5 * (x @ x)


_DOUBLE = torch.empty(0, dtype=torch.float64)
