"""Families of leader-follower games with smooth formulas and known answers.

Their followers, and those of `regressions` and `duopolies`, have curvatures of at most about 1: any gradient method
with a step size of up to 1 converges on each of them, and how fast is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.testing.known import DOUBLE, KnownGame, Matrix, Numbers, constant, reflection


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
        return constant(self.at, DOUBLE)

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
        return constant(self.at, DOUBLE)

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
        return constant(self.at, DOUBLE)

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


def _near(x: Tensor, y: Tensor, target: Numbers) -> Tensor:
    away = y - constant(target, x)
    return 0.5 * (away @ away) + 0.5 * (x @ x)
