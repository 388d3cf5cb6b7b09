"""Bounds that hold at every answer: of slacks by linear programmes, of multipliers by bases of the constraints."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from bilevel.certificates.globally.reading import Programme
from bilevel.errors import BilevelError, InfeasibleError

Array = NDArray[np.float64]

MOST_BASES = 20_000
"""How many bases of a follower's constraints are looked at, in batches."""


class Region:
    """The points (x, y) that keep everybody's constraints, whatever the follower wants."""

    def __init__(self, read: Programme) -> None:
        self.above = read.upper.joined(read.lower)
        self.equal = read.upper_equal.joined(read.lower_equal)
        self.points: list[Array] = []
        self.bounded = True
        if self._solve(np.zeros(read.n + read.m)) is None:
            raise InfeasibleError(
                "solve_globally: no point keeps all the constraints, whatever the follower wants. Loosen some of "
                f"{[*self.above.names, *self.equal.names][:8]}."
            )

    def _solve(self, direction: Array) -> Array | None:
        """A point furthest along a direction; None where there is none."""
        from scipy.optimize import linprog  # noqa: PLC0415 - importing bilevel stays light

        found = linprog(
            -direction,
            A_ub=self.above.matrix if len(self.above.right) else None,
            b_ub=self.above.right if len(self.above.right) else None,
            A_eq=self.equal.matrix if len(self.equal.right) else None,
            b_eq=self.equal.right if len(self.equal.right) else None,
            bounds=(None, None),
        )
        if found.status == 0:
            return np.asarray(found.x, dtype=np.float64)
        if found.status in (2, 3, 4):
            return None
        raise BilevelError(f"solve_globally: a linear programme ended with {found.message!r}.")

    def furthest(self, direction: Array) -> float:
        """The largest direction'z; infinite where there is none."""
        if not direction.any():
            return 0.0
        point = self._solve(direction)
        if point is None:
            self.bounded = False
            return math.inf
        self.points.append(point)
        return float(direction @ point)


def slack_bounds(read: Programme, region: Region) -> Array:
    """Of each of the follower's inequalities, the most by which it can be loose, `[l]`."""
    rows = zip(read.lower.matrix, read.lower.right, strict=True)
    return np.array([right + region.furthest(-row) for row, right in rows])


def multiplier_bounds(read: Programme, region: Region) -> Array | None:
    r"""Of each of the follower's inequalities, a number that a multiplier of every answer is at most, `[l]`.

    At an answer the slope -(S z + s) is a combination of the gradients of constraints that bind, and then of linearly
    independent ones (Caratheodory), which are part of a basis of all the gradients. So the largest multiplier over all
    bases, with the slope in the range that linear programmes show, bounds one choice of multipliers at each answer.
    None where there are more than `MOST_BASES`; infinite where the slope has no bounds.
    """
    A, E = read.lower.matrix[:, read.n :], read.lower_equal.matrix[:, read.n :]
    free = _independent(E)
    rank = int(np.linalg.matrix_rank(np.vstack([A, E]))) if A.size or E.size else 0
    moving = np.flatnonzero(np.abs(A).max(axis=1, initial=0.0) > 0.0)
    size, bounds = rank - len(free), np.zeros(len(A))
    if not size:
        return bounds
    if math.comb(len(moving), size) > MOST_BASES:
        return None
    high = np.array([region.furthest(row) for row in read.slope]) + read.start
    low = read.start - np.array([region.furthest(-row) for row in read.slope])
    chosen = moving[np.array(list(combinations(range(len(moving)), size)))]
    for part in np.array_split(chosen, max(1, len(chosen) // 2000)):
        basis = np.concatenate([A[part], np.broadcast_to(E[free], (len(part), *E[free].shape))], axis=1)
        values = np.linalg.svd(basis, compute_uv=False)
        kept = values[:, -1] > 1e-10 * values[:, 0]
        inverse = np.linalg.pinv(basis[kept]).transpose(0, 2, 1)[:, :size]
        inverse = np.where(np.abs(inverse) <= 1e-12 * np.abs(inverse).max(axis=(1, 2), keepdims=True), 0.0, inverse)
        with np.errstate(invalid="ignore"):
            ends = [np.where(inverse == 0.0, 0.0, -inverse * end) for end in (low, high)]
        np.maximum.at(bounds, part[kept], np.maximum(*ends).sum(axis=-1))
    return bounds


def _independent(rows: Array) -> list[int]:
    """Rows that span all of them."""
    found: list[int] = []
    for i in range(len(rows)):
        if np.linalg.matrix_rank(rows[[*found, i]]) > len(found):
            found.append(i)
    return found
