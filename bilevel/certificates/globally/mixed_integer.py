"""The follower's KKT conditions as a mixed-integer programme: a binary for each inequality says whether it binds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bilevel.certificates.globally.pieces import Pieces, Point, Search

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """Where a search stops."""

    tolerance: float
    max_nodes: int
    seconds: float


def by_binaries(pieces: Pieces, slack: Array, multiplier: Array, limits: Limits) -> Search:
    """The best answer whose slacks and multipliers are within bounds, by HiGHS.

    HiGHS keeps its constraints to 1e-6, which times a large bound is a lot. So each choice of binaries that it finds is
    solved anew without bounds, and excluded; what it says of the rest is the lower bound. A quadratic loss of the
    leader's is its tangents (outer approximation, Duran and Grossmann 1986).
    """
    best: Point | None = None
    excluded: list[Array] = []
    lowest, nodes, bound = math.inf, 0, -math.inf
    for _ in range(100):
        found = _solved(pieces, slack, multiplier, excluded, limits)
        nodes += int(getattr(found, "mip_node_count", 0) or 0)
        if found.status == 2:
            return Search(best, lowest, nodes, True)
        if found.x is None or found.status not in (0, 1):
            return Search(best, min(bound, lowest), nodes, False)
        bound = min(float(found.mip_dual_bound), lowest)
        choice = np.rint(found.x[pieces.size :]).astype(np.int8)
        point = pieces.solved(choice, limits.tolerance)
        if point is not None:
            best = point if best is None or point.value < best.value else best
        if best is not None and bound >= best.value - limits.tolerance * (1.0 + abs(best.value)):
            return Search(best, bound, nodes, True)
        if found.status == 1 or nodes >= limits.max_nodes:
            return Search(best, bound, nodes, False)
        lowest = lowest if point is None else min(lowest, point.bound)
        excluded.append(choice)
    return Search(best, bound, nodes, False)


def _solved(pieces: Pieces, slack: Array, multiplier: Array, excluded: list[Array], limits: Limits):  # type: ignore[no-untyped-def]
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 - importing bilevel stays light
    from scipy.sparse import csr_array  # noqa: PLC0415

    read, size, count = pieces.read, pieces.size, pieces.l
    E, d = pieces.equalities
    A, b = pieces.inequalities
    none = np.zeros((len(A), count))
    # slack <= S (1 - w): -A z + S w <= S - right; and l <= M w.
    loose = np.hstack([-pieces.wide(read.lower.matrix), np.diag(slack)])
    pushed = np.hstack([pieces.multiplier_rows, -np.diag(multiplier)])
    rows = [np.hstack([A, none]), loose[pieces.moving], pushed]
    right = [b, (slack - read.lower.right)[pieces.moving], np.zeros(count)]
    for choice in excluded:
        # At least one binary is another.
        turned = np.where(choice == 1, 1.0, -1.0) * pieces.moving
        rows.append(np.append(np.zeros(size), turned)[None])
        right.append(np.array([choice[pieces.moving].sum() - 1.0]))
    low = np.concatenate([np.full(size, -np.inf), np.zeros(count)])
    low[pieces.N : pieces.N + count] = 0.0
    high = np.concatenate([np.full(size, np.inf), pieces.moving.astype(float)])
    above, below = csr_array(np.vstack(rows)), csr_array(np.hstack([E, np.zeros((len(E), count))]))
    cost = np.zeros(size + count)
    cost[size - 1] = 1.0
    return milp(
        cost,
        integrality=np.append(np.zeros(size), np.ones(count)),
        bounds=Bounds(low, high),
        constraints=[LinearConstraint(above, -np.inf, np.hstack(right)), LinearConstraint(below, d, d)],
        options={"mip_rel_gap": 0.0, "node_limit": limits.max_nodes, "time_limit": limits.seconds},
    )
