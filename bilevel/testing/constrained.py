"""Families of games whose follower is held by a set, or has a term without a derivative, with known answers.

Followers have curvatures between about .15 and 1, as those of the other families.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.constraints import L1, Box, ConstraintSet, NonNegative, Penalty, Simplex
from bilevel.testing.known import DOUBLE, KnownGame, Matrix, Numbers, constant, reflection


class ConstrainedGame(KnownGame):
    """A known game whose follower has a domain or a proximal term; `best_response` is piecewise smooth."""

    target: Numbers
    at: Numbers

    @property
    def x0(self) -> Tensor:
        """Where the leader stands."""
        return constant(self.at, DOUBLE)

    @property
    def y0(self) -> Tensor:
        """Where the follower starts: off its best response by `radius` in every entry, and back into its domain."""
        start: Tensor = self.best_response(self.x0).detach() + self.radius
        return start if self.domain is None else self.domain.project(start)

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """|y - target|^2 / 2 + |x|^2 / 2."""
        away = y - constant(self.target, x)
        return 0.5 * (away @ away) + 0.5 * (x @ x)


def _within_box(curved: Tensor, slope: Tensor, low: float, high: float) -> Tensor:
    """argmin y'Hy/2 - q'y within bounds, by trying every set of bounds that may hold; differentiable within it."""
    m = len(slope)
    for held in itertools.product((0, -1, 1), repeat=m):
        free = torch.tensor([side == 0 for side in held])
        ends = torch.tensor([{-1: low, 0: 0.0, 1: high}[side] for side in held], dtype=slope.dtype)
        if not bool(torch.isfinite(ends).all()):
            continue
        mask = free.to(slope.dtype)
        system = mask[:, None] * curved * mask + torch.diag(1.0 - mask)
        y: Tensor = torch.linalg.solve(system, mask * (slope - curved @ ends)) + ends
        with torch.no_grad():
            left = curved @ y - slope
            sides = torch.tensor(held, dtype=slope.dtype)
            outward = bool(((sides * left <= 1e-12) | free).all())
            within = bool(((y >= low - 1e-12) & (y <= high + 1e-12)).all())
        if outward and within:
            return y
    raise ArithmeticError("A convex programme within bounds has an optimum; the curvature is not positive definite.")


@final
@dataclass(frozen=True)
class BoxQuadratic(ConstrainedGame):
    r"""A quadratic follower within bounds, $f = \tfrac12 y^\top H y - y^\top B x$, $\text{low} \le y \le \text{high}$.

    Args:
        curvatures: The eigenvalues of H `[m]`.
        coupling: B `[m, n]`.
        at: Where the leader stands `[n]`.
        target: Of the leader `[m]`.
        axis: The eigenvectors of H are the unit vectors reflected along this `[m]`; default: not at all.
        low: The lower bound of every entry.
        high: The upper one.
        radius: How far from its optimum the follower starts.
    """

    curvatures: Numbers
    coupling: Matrix
    at: Numbers
    target: Numbers
    axis: Numbers = ()
    low: float = -0.303
    high: float = 0.431
    radius: float = 0.5

    @property
    def domain(self) -> ConstraintSet:
        """The box."""
        return Box(self.low, self.high)

    def _curved(self, like: Tensor) -> Tensor:
        turn = reflection(self.axis or (0.0,) * len(self.curvatures), like)
        curved: Tensor = turn @ (constant(self.curvatures, like)[:, None] * turn.T)
        return curved

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return 0.5 * (y @ (self._curved(x) @ y)) - y @ (constant(self.coupling, x) @ x)

    def best_response(self, x: Tensor) -> Tensor:
        """By trying every set of bounds that may hold."""
        return _within_box(self._curved(x), constant(self.coupling, x) @ x, self.low, self.high)


@final
@dataclass(frozen=True)
class NonNegativeLeastSquares(ConstrainedGame):
    r"""$f = \tfrac12 |A y - x|^2 / |A|^2 + \tfrac16 |y|^2$ with $y \ge 0$: a regression without negative weights.

    Args:
        design: A `[n, m]`.
        at: x, what is to be fitted `[n]`.
        target: Of the leader `[m]`.
        radius: How far from its optimum the follower starts.
    """

    design: Matrix
    at: Numbers
    target: Numbers
    radius: float = 0.5

    @property
    def domain(self) -> ConstraintSet:
        """The non-negative numbers."""
        return NonNegative()

    def _scaled(self, like: Tensor) -> tuple[Tensor, float]:
        a = constant(self.design, like)
        return a, float(a.detach().square().sum()) * 1.25

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        a, size = self._scaled(x)
        left = a @ y - x
        return 0.5 * (left @ left) / size + (y @ y) / 12.0

    def best_response(self, x: Tensor) -> Tensor:
        """By trying every set of entries that may be 0."""
        a, size = self._scaled(x)
        eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        return _within_box(a.T @ a / size + eye / 6.0, a.T @ x / size, 0.0, math.inf)


@final
@dataclass(frozen=True)
class WaterFilling(ConstrainedGame):
    r"""A power $y$ shared among channels, $f = -\sum_i \log(1 + y_i / n_i(x))$, $\sum_i y_i = \text{total}$, $y \ge 0$.

    The noises are $n = 1 + \tfrac12 \sigma(B x)$, and $y^* = \max(\text{level} - n, 0)$: channels whose noise is above
    the water's level stay dry.

    Args:
        coupling: B `[m, n]`.
        at: Where the leader stands `[n]`.
        target: Of the leader `[m]`.
        total: The power.
        radius: How far from its optimum the follower starts.
    """

    coupling: Matrix
    at: Numbers
    target: Numbers
    total: float = 0.277
    radius: float = 0.2

    @property
    def domain(self) -> ConstraintSet:
        """The shares of the power."""
        return Simplex(self.total)

    @property
    def y0(self) -> Tensor:
        """All of the power in one channel."""
        start = torch.zeros(len(self.coupling), dtype=torch.float64)
        start[0] = self.total
        return start

    def _noise(self, x: Tensor) -> Tensor:
        return 1.0 + 0.5 * torch.sigmoid(constant(self.coupling, x) @ x)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return -torch.log1p(y / self._noise(x)).sum()

    def best_response(self, x: Tensor) -> Tensor:
        """By the water's level."""
        noise = self._noise(x)
        with torch.no_grad():
            ordered = noise.detach().sort().values
            counts = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype)
            levels = (self.total + ordered.cumsum(0)) / counts
            wet = noise <= ordered[(levels > ordered).sum() - 1]
        level = (self.total + torch.where(wet, noise, 0.0).sum()) / wet.sum()
        return torch.where(wet, level - noise, 0.0)


@final
@dataclass(frozen=True)
class Lasso(ConstrainedGame):
    r"""The lasso with orthonormal inputs, $f + w |y|_1$ with $f = \tfrac12 |y - c|^2$, whose weight the leader chooses.

    $w = e^{x_1}$ and $y^* = \operatorname{sign}(c) \max(|c| - w, 0)$.

    Args:
        data: c `[m]`.
        at: Where the leader stands, x `[1]`.
        target: Of the leader `[m]`.
        radius: How far from its optimum the follower starts.
    """

    data: Numbers
    at: Numbers
    target: Numbers
    radius: float = 0.5

    @property
    def prox(self) -> Penalty:
        """The term."""
        return L1(_weight)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f, without the term."""
        away = y - constant(self.data, x)
        return 0.5 * (away @ away)

    def best_response(self, x: Tensor) -> Tensor:
        """The data, moved towards 0 by the weight."""
        data = constant(self.data, x)
        return torch.where(data.abs() > x[0].exp(), data - data.sign() * x[0].exp(), 0.0)


def _weight(x: Tensor) -> Tensor:
    return x[0].exp()
