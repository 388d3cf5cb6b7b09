"""Games whose follower solves a quadratic programme within functions, with known answers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.testing.known import DOUBLE, KnownGame, Matrix, Numbers, constant, reflection


@final
@dataclass(frozen=True)
class Programme(KnownGame):
    r"""A quadratic programme whose loss and constraints the leader moves.

    $$
    f = \tfrac12 y^\top H y - y^\top B x \quad \text{within} \quad A y \le b + C x, \; \sum_i y_i = s
    $$

    The leader's loss is $g = \tfrac12 |y - t|^2 + \tfrac12 |x|^2$. Without rows only the equality constrains it;
    with small, equal curvatures a linear one with a regulariser.

    Args:
        curvatures: The eigenvalues of H `[m]`.
        coupling: B `[m, n]`.
        at: Where the leader stands `[n]`.
        target: t `[m]`.
        rows: A `[k, m]`; () for no inequality.
        offset: b `[k]`.
        moves: C `[k, n]`.
        total: s; None for no equality.
        axis: The eigenvectors of H are the unit vectors reflected along this `[m]`; default: not at all.
        radius: How far from its optimum the follower starts.
    """

    curvatures: Numbers
    coupling: Matrix
    at: Numbers
    target: Numbers
    rows: Matrix = ()
    offset: Numbers = ()
    moves: Matrix = ()
    total: float | None = None
    axis: Numbers = ()
    radius: float = 0.5

    @property
    def x0(self) -> Tensor:
        """Where the leader stands."""
        return constant(self.at, DOUBLE)

    @property
    def y0(self) -> Tensor:
        """Where the follower starts: off its best response by `radius` in every entry."""
        start: Tensor = self.best_response(self.x0).detach() + self.radius
        return start

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        away = y - constant(self.target, x)
        return 0.5 * (away @ away) + 0.5 * (x @ x)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return 0.5 * (y @ (self._curved(x) @ y)) - y @ (constant(self.coupling, x) @ x)

    def inequality(self, x: Tensor, y: Tensor) -> Tensor | None:
        """A y - b - C x, at most 0."""
        if not self.rows:
            return None
        return constant(self.rows, x) @ y - constant(self.offset, x) - constant(self.moves, x) @ x

    def equality(self, x: Tensor, y: Tensor) -> Tensor | None:
        """sum y - s, which is 0."""
        return None if self.total is None else y.sum() - self.total

    def best_response(self, x: Tensor) -> Tensor:
        """By trying every set of rows that may bind; differentiable within it."""
        m, curved, slope = len(self.curvatures), self._curved(x), constant(self.coupling, x) @ x
        balance = torch.ones(0 if self.total is None else 1, m, dtype=x.dtype)
        rows = constant(self.rows, x) if self.rows else torch.zeros(0, m, dtype=x.dtype)
        caps = constant(self.offset, x) + constant(self.moves, x) @ x if self.rows else torch.zeros(0, dtype=x.dtype)
        level = torch.full((len(balance),), self.total or 0.0, dtype=x.dtype)
        for count in range(min(len(rows), m - len(balance)) + 1):
            for held in itertools.combinations(range(len(rows)), count):
                bind = torch.cat([rows[list(held)], balance])
                top = torch.cat([curved, bind.T], dim=1)
                corner = torch.zeros(len(bind), len(bind), dtype=x.dtype)
                system = torch.cat([top, torch.cat([bind, corner], dim=1)])
                with torch.no_grad():
                    if float(torch.linalg.svdvals(system)[-1]) < 1e-10:
                        continue
                z: Tensor = torch.linalg.solve(system, torch.cat([slope, caps[list(held)], level]))
                with torch.no_grad():
                    inside = bool((rows @ z[:m] <= caps + 1e-11).all())
                    pushing = bool((z[m : m + count] >= -1e-11).all())
                if inside and pushing:
                    return z[:m]
        raise ArithmeticError("The programme is infeasible.")

    def _curved(self, like: Tensor) -> Tensor:
        values = constant(self.curvatures, like)
        turn = reflection(self.axis or (0.0,) * len(self.curvatures), like)
        curved: Tensor = turn @ (values[:, None] * turn.T)
        return curved
