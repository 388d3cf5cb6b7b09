r"""The smallest curvature along a critical cone: where a point within constraints may move at no cost to first order.

The cone is \(\{d : Ad = 0, Bd \le 0\}\), with the gradients A of what is held and B of what binds with a multiplier of
0. A strict minimum curves upwards along it, and no minimum curves downwards along it.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from bilevel.constraints.active_set import lengths

MOST_WEAK = 12
"""So many constraints with a multiplier of 0 or fewer are looked at in all their combinations, 4,096 of them."""


def lowest_on_cone(hessian: Tensor, held: Tensor, weak: Tensor) -> tuple[float, float]:
    r"""The smallest curvature along the cone, and the largest along the space that it lies in; (1, 1) for a point.

    Args:
        hessian: `[n, n]`.
        held: Rows A `[k, n]`.
        weak: Rows B `[w, n]`; rows that what is held makes vanish bound nothing.

    With a basis of the null space of A, d is a part w that moves along B too and a part that leaves it, \(-B^+ s\) with
    \(s \ge 0\). After w is minimised out a matrix in s is left, whose lowest value over unit \(s \ge 0\) is at an
    eigenvector without negative entries of a principal submatrix (Kaplan 2000). NaN where B has more than `MOST_WEAK`
    rows, or dependent ones, and the space that contains the cone does not decide.
    """
    free = torch.eye(len(hessian), dtype=hessian.dtype)
    if len(held):
        _, sizes, right = torch.linalg.svd(held / lengths(held)[:, None], full_matrices=True)
        free = right[int((sizes > 1e-10).sum()) :].T
    if not free.shape[1]:
        return 1.0, 1.0
    inside = free.T @ (0.5 * (hessian + hessian.T)) @ free
    values, vectors = torch.linalg.eigh(inside)
    lowest, highest = float(values[0]), float(values[-1])
    rows = (weak / lengths(weak)[:, None]) @ free
    rows = rows[rows.norm(dim=1) > 1e-8]
    sides = rows @ vectors[:, 0]
    # A direction and its opposite curve alike, so that one constraint, which halves the space, changes nothing.
    if lowest > 0.0 or len(rows) < 2 or bool((sides <= 0.0).all()) or bool((sides >= 0.0).all()):
        return lowest, highest
    sizes, right = torch.linalg.svd(rows, full_matrices=True)[1:]
    if len(rows) > MOST_WEAK or len(sizes) < len(rows) or float(sizes[-1]) < 1e-8:
        return math.nan, highest
    along, leaving = right[len(rows) :].T, -torch.linalg.pinv(rows)
    reduced = leaving.T @ inside @ leaving
    floor = math.inf
    if along.shape[1]:
        kept = along.T @ inside @ along
        floor = float(torch.linalg.eigvalsh(kept)[0])
        if floor <= 0.0:
            return floor, highest
        mixed = along.T @ inside @ leaving
        reduced = reduced - mixed.T @ torch.linalg.solve(kept, mixed)
    return min(floor, _lowest_without_negative(0.5 * (reduced + reduced.T))), highest


def _lowest_without_negative(matrix: Tensor) -> float:
    """The least s'Ms over unit s >= 0."""
    found = math.inf
    for size in range(1, len(matrix) + 1):
        for chosen in combinations(range(len(matrix)), size):
            part = matrix[list(chosen)][:, list(chosen)]
            values, vectors = torch.linalg.eigh(part)
            for value, vector in zip(values.tolist(), vectors.T, strict=True):
                if bool((vector >= -1e-12).all()) or bool((vector <= 1e-12).all()):
                    found = min(found, value)
    return found
