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

        f = 1/2 y'Hy - y'Bx,    g = 1/2 |y - t|^2 + y'Dx + a/2 |x|^2,    y* = H^-1 B x

    `curvatures` `[m]` are H's eigenvalues, its eigenvectors the unit vectors reflected along `axis` `[m]`; `coupling`
    is B `[m, n]`, `target` t `[m]`, `cross` D `[m, n]`. With D = -B the game is potential: its Jacobian is symmetric.
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

        f = 1/2 mean (Aw - b)^2 + 1/2 sum_i exp(x_i) w_i^2,    g = 1/2 mean (Cw - d)^2

    `train` is (A, b) as rows (a_1, ..., a_n, b) `[rows, n + 1]`, `valid` (C, d). A is scaled so that the largest
    eigenvalue of A'A / rows is 1/2; penalties in x of up to log 1/2 keep the curvature below 1.
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

        f = mean log(1 + exp(-b Aw)) + 1/2 sum_i exp(x_i) w_i^2,    g = mean log(1 + exp(-d Cw))

    `train` is (A, b) as rows (a_1, ..., a_n, b) with b = -1 or 1, `valid` (C, d). A is scaled as in `Ridge`. The best
    response is found by Newton's method to rounding.
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

        f = sum_i exp(y_i) - u_i(x) y_i,    u = least + (most - least) sigmoid(Bx),    y* = log u
        g = 1/2 |y - t|^2 + 1/2 |x|^2

    The curvature at the best response is u: from `least` to `most` whatever is drawn.
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

        f = 1/2 sum_i (y_i^2 / 8 + p_i(x) y_i - log(y_i) / 4),    p = 1/2 sigmoid(Bx),    y > 0
        y* = 2 (sqrt(p^2 + 1/4) - p),    g = 1/2 |y - t|^2 + 1/2 |x|^2

    Curvatures lie between 1/4 and 1; the follower starts above its best response, where gradient steps stay positive.
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
    """Two firms choose quantities, the leader first; losses are negative profits -q_i (a - b (q_1 + q_2) - c_i).

    `intercept` is a, `slope` b, `costs` (c_leader, c_follower). The follower's curvature is 2 b.
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
    """Two firms choose prices, the leader first; losses are -(p_i - c) (alpha - beta p_i + gamma p_j).

    Demand is stable for gamma < beta. The follower's curvature is 2 beta.
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
