"""The optima that a follower has at one point of the leader's, and which of them the leader likes least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from bilevel.certificates.globally.reading import Programme

Array = NDArray[np.float64]

MOST_VERTICES = 20_000
"""How many sets of walls are looked at for vertices."""


@dataclass(frozen=True, eq=False)
class Face:
    """The y `[m]` with A y <= a and E y = e, of which `inside` is one."""

    A: Array
    a: Array
    E: Array
    e: Array
    inside: Array

    @staticmethod
    def of(read: Programme, x: Array, inside: Array, multipliers: Array, binding: NDArray[np.bool_]) -> Face:
        """All optima at x, by one of them and its multipliers.

        For any multipliers l they are the feasible y with S y + s(x) + A'l + E'm = 0 of the same l and m, that is the
        same S y, at which the constraints with l_i > 0 bind (Mangasarian 1988). `binding` says which these are.
        """
        n, S = read.n, read.slope[:, read.n :]
        A, right = read.lower.matrix[:, n:], read.lower.right - read.lower.matrix[:, :n] @ x
        E = np.vstack([read.lower_equal.matrix[:, n:], S, A[binding]])
        return Face(A, np.maximum(right, A @ inside), E, E @ inside, inside)

    def furthest(self, direction: Array) -> Array | None:
        """Where it goes furthest along a direction; None where there is no end."""
        from scipy.optimize import linprog  # noqa: PLC0415 - importing bilevel stays light

        if not direction.any():
            return self.inside
        found = linprog(-direction, A_ub=self.A, b_ub=self.a, A_eq=self.E, b_eq=self.e, bounds=(None, None))
        return np.asarray(found.x, dtype=np.float64) if found.status == 0 else None

    def vertices(self) -> list[Array] | None:
        """Its corners; None where it has no bounds, or more than `MOST_VERTICES` sets of walls that may meet in one."""
        m = len(self.inside)
        values, turned = np.linalg.svd(self.E, full_matrices=True)[1:] if len(self.E) else (np.zeros(0), np.eye(m))
        rank = int((values > 1e-9 * values.max(initial=1.0)).sum())
        free = turned[rank:].T
        if not free.shape[1]:
            return [self.inside]
        if any(self.furthest(sign * row) is None for row in free.T for sign in (1.0, -1.0)):
            return None
        B, room = self.A @ free, np.maximum(self.a - self.A @ self.inside, 0.0)
        walls = np.flatnonzero(np.abs(B).max(axis=1) > 1e-9)
        if math.comb(len(walls), free.shape[1]) > MOST_VERTICES:
            return None
        found = []
        for chosen in combinations(walls, free.shape[1]):
            part = B[list(chosen)]
            if np.linalg.cond(part) > 1e10:
                continue
            t = np.linalg.solve(part, room[list(chosen)])
            if (B @ t - room).max() <= 1e-7 * (1.0 + float(room.max())):
                found.append(self.inside + free @ t)
        return found

    def worst(self, read: Programme, x: Array) -> tuple[float, Array] | None:
        """The highest loss of the leader's in it, and where; infinite where it has no end, None where unknown."""
        n = read.n
        here = np.concatenate([x, self.inside])
        if not read.H[n:, n:].any():
            end = self.furthest((read.H @ here + read.g)[n:])
            if end is None:
                return math.inf, self.inside
            ends = [end]
        else:
            corners = self.vertices()
            if corners is None:
                return None
            ends = corners
        losses = [read.loss(np.concatenate([x, y])) for y in ends]
        highest = int(np.argmax(losses))
        return losses[highest], ends[highest]
