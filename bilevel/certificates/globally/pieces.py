"""The follower's KKT conditions in pieces: of each inequality either its multiplier is 0, or it binds."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bilevel.certificates.globally.reading import Programme
from bilevel.errors import BilevelError, UnboundedError

Array = NDArray[np.float64]
Choice = NDArray[np.int8]
"""Of each inequality: 0, its multiplier is 0; 1, it binds; -1, not decided."""

OPEN = -1


@dataclass
class Point:
    """An answer: z, the multipliers of inequalities and of equalities, F there, and a lower bound of F in its piece."""

    z: Array
    inequality: Array
    equality: Array
    value: float
    bound: float


@dataclass
class Pieces:
    """min F subject to the follower's KKT conditions, in unknowns v = (z, l, m, eta), where eta >= tangents of F."""

    read: Programme
    tangents: list[tuple[Array, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        read = self.read
        self.N, self.l, self.p = read.n + read.m, len(read.lower.right), len(read.lower_equal.right)
        self.size = self.N + self.l + self.p + 1
        self.moving = np.abs(read.lower.matrix[:, read.n :]).max(axis=1, initial=0.0) > 0.0
        # Where F is linear this is F itself; else it keeps eta from falling for ever where F does not.
        lowest: Array = np.zeros(self.N)
        if read.quadratic:
            lowest = -np.asarray(np.linalg.lstsq(read.H, read.g, rcond=None)[0], dtype=np.float64)
        self.tangents.append(read.tangent(lowest))

    @property
    def equalities(self) -> tuple[Array, Array]:
        """Rows and right-hand sides of stationarity and of everybody's equalities, in v."""
        read, n = self.read, self.read.n
        stationary = np.hstack(
            [read.slope, read.lower.matrix[:, n:].T, read.lower_equal.matrix[:, n:].T, np.zeros((read.m, 1))]
        )
        equal = read.upper_equal.joined(read.lower_equal)
        rows = np.vstack([stationary, self.wide(equal.matrix)])
        return rows, np.append(-read.start, equal.right)

    @property
    def inequalities(self) -> tuple[Array, Array]:
        """Rows and right-hand sides of everybody's inequalities and of the tangents, in v."""
        above = self.read.upper.joined(self.read.lower)
        tangents = self.wide(np.array([a for a, _ in self.tangents]))
        tangents[:, -1] = -1.0
        return np.vstack([self.wide(above.matrix), tangents]), np.append(above.right, [-b for _, b in self.tangents])

    @property
    def multiplier_rows(self) -> Array:
        """Rows of v that pick the multipliers of the inequalities, `[l, size]`."""
        return np.eye(self.size)[self.N : self.N + self.l]

    def wide(self, matrix: Array) -> Array:
        """Rows of z as rows of v."""
        return np.hstack([matrix, np.zeros((len(matrix), self.size - self.N))])

    def relaxed(self, choice: Choice) -> tuple[float, Array | None]:
        """The lowest eta where only what is decided is asked for, and v there.

        (inf, None) where nothing keeps it, (-inf, None) where eta falls for ever.
        """
        A, b = self.inequalities
        E, d = self.equalities
        binding = choice == 1
        E = np.vstack([E, self.wide(self.read.lower.matrix[binding])])
        d = np.append(d, self.read.lower.right[binding])
        cost = np.zeros(self.size)
        cost[-1] = 1.0
        high = np.full(self.size, np.inf)
        low = np.full(self.size, -np.inf)
        low[self.N : self.N + self.l] = 0.0
        high[self.N : self.N + self.l][(choice == 0) | ~self.moving] = 0.0
        bounds = np.stack([low, high], axis=1)
        return lowest(cost, A, b, E, d, bounds)

    def solved(self, choice: Choice, tolerance: float) -> Point | None:
        """The best answer of a piece, every inequality decided; None where the piece is empty.

        A quadratic F is minimised by SciPy's SLSQP between tangents, whose linear programmes bound it from below.
        """
        for _ in range(50):
            bound, v = self.relaxed(choice)
            if v is None:
                if bound < 0.0:
                    raise UnboundedError(
                        "solve_globally: the leader's loss falls for ever along answers of its follower. Bound the "
                        "leader by a domain, or by inequality=."
                    )
                return None
            if self.read.quadratic:
                v = self._descended(choice, v)
            z, rest, value = v[: self.N], v[self.N :], self.read.loss(v[: self.N])
            if value - bound <= 0.1 * tolerance * (1.0 + abs(value)) or not self.read.quadratic:
                break
            self.tangents.append(self.read.tangent(z))
        return Point(z, np.maximum(rest[: self.l], 0.0), rest[self.l : self.l + self.p], value, bound)

    def _descended(self, choice: Choice, v: Array) -> Array:
        """Where F is lowest in a piece, by a search in what its equalities leave free."""
        from scipy.linalg import null_space  # noqa: PLC0415
        from scipy.optimize import minimize  # noqa: PLC0415

        A, b = self.inequalities
        A, b = A[: len(A) - len(self.tangents), :-1], b[: len(A) - len(self.tangents)]
        E = self.equalities[0][:, :-1]
        binding, idle = np.flatnonzero(choice == 1), np.flatnonzero((choice == 0) | ~self.moving)
        E = np.vstack([E, self.wide(self.read.lower.matrix[binding])[:, :-1]])
        unit = self.multiplier_rows[:, :-1]
        E, A = np.vstack([E, unit[idle]]), np.vstack([A, -unit])
        b = np.append(b, np.zeros(self.l))
        free = null_space(E)
        if not free.shape[1]:
            return v
        base, Z = v[:-1], free[: self.N]
        H, g = Z.T @ self.read.H @ Z, Z.T @ (self.read.H @ base[: self.N] + self.read.g)
        B, h = A @ free, np.maximum(b - A @ base, 0.0)
        kept = np.abs(B).max(axis=1) > 1e-12
        B, h = B[kept], h[kept]
        t = minimize(
            lambda t: float(0.5 * t @ H @ t + g @ t),
            np.zeros(len(g)),
            jac=lambda t: H @ t + g,
            method="SLSQP",
            constraints=[{"type": "ineq", "fun": lambda t: h - B @ t, "jac": lambda t: -B}],
            options={"ftol": 1e-15, "maxiter": 300},
        ).x
        # Exact on the set of inequalities that bind there, where that keeps the others.
        near = h - B @ t <= 1e-6 * (1.0 + np.abs(h))
        K = np.block([[H, B[near].T], [B[near], np.zeros((near.sum(), near.sum()))]])
        exact = np.linalg.lstsq(K, np.append(-g, h[near]), rcond=None)[0][: len(g)]
        for candidate in (exact, t):
            over = float((B @ candidate - h).max(initial=0.0))
            falls = 0.5 * candidate @ H @ candidate + g @ candidate <= 0.0
            if falls and over <= 1e-9 * (1.0 + float(np.abs(h).max(initial=0.0))):
                return np.append(base + free @ candidate, 0.0)
        return v

    def choice_of(self, z: Array, inequality: Array) -> Choice:
        """Which inequalities bind at a point, by which of slack and multiplier is the smaller."""
        slack = self.read.lower.right - self.read.lower.matrix @ z
        return np.where((inequality > slack) & self.moving, 1, 0).astype(np.int8)


@dataclass
class Search:
    """What a search has found: the best answer, a lower bound of all, how many nodes, and why it stopped short."""

    best: Point | None
    bound: float
    nodes: int
    complete: bool


def branched(pieces: Pieces, best: Point | None, *, tolerance: float, max_nodes: int) -> Search:
    """Branch and bound on which inequalities bind (Bard and Moore 1990), which needs no bounds of anything.

    A node is a linear programme in which some are decided. The node of the lowest bound comes first.
    """
    order = itertools.count()
    open_nodes: list[tuple[float, int, Choice]] = [(-math.inf, next(order), np.full(pieces.l, OPEN, dtype=np.int8))]
    nodes = 0
    while open_nodes:
        known, _, choice = heapq.heappop(open_nodes)
        value = math.inf if best is None else best.value
        within = tolerance * (1.0 + abs(value)) if best is not None else 0.0
        if known >= value - within:
            return Search(best, known, nodes, True)
        if nodes >= max_nodes:
            return Search(best, known, nodes, False)
        nodes += 1
        bound, v = pieces.relaxed(choice)
        bound = max(bound, known)
        if (bound >= value - within and math.isfinite(bound)) or (v is None and bound > 0.0):
            continue
        undecided = np.flatnonzero((choice == OPEN) & pieces.moving)
        if not len(undecided) or v is not None:
            piece = np.where(choice == OPEN, 0, choice).astype(np.int8)
            if len(undecided):
                assert v is not None
                z, l = v[: pieces.N], v[pieces.N : pieces.N + pieces.l]
                slack = pieces.read.lower.right - pieces.read.lower.matrix @ z
                broken = np.minimum(l, slack)[undecided]
                pick = int(undecided[np.argmax(broken)])
                piece = np.where(choice == OPEN, pieces.choice_of(z, l), choice).astype(np.int8)
            if not len(undecided) or float(broken.max()) <= 1e-7:
                found = pieces.solved(piece, tolerance)
                if found is not None:
                    best = found if best is None or found.value < best.value else best
                    if not len(undecided):
                        continue
                elif not len(undecided):
                    continue
                if best is not None and bound >= best.value - tolerance * (1.0 + abs(best.value)):
                    continue
        else:
            pick = int(undecided[0])
        for side in (0, 1):
            child = choice.copy()
            child[pick] = side
            heapq.heappush(open_nodes, (bound, next(order), child))
    return Search(best, math.inf if best is None else best.value, nodes, True)


def lowest(cost: Array, A: Array, b: Array, E: Array, d: Array, bounds: Array) -> tuple[float, Array | None]:
    """The lowest cost and where; (inf, None) where nothing keeps the rows, (-inf, None) where it falls for ever."""
    from scipy.optimize import linprog  # noqa: PLC0415 - importing bilevel stays light

    found = linprog(cost, A_ub=A, b_ub=b, A_eq=E, b_eq=d, bounds=bounds)
    if found.status == 4:  # infeasible or unbounded, or lost in rounding
        found = linprog(0.0 * cost, A_ub=A, b_ub=b, A_eq=E, b_eq=d, bounds=bounds)
        found.status = 3 if found.status == 0 else found.status
    if found.status == 0:
        return float(found.fun), np.asarray(found.x, dtype=np.float64)
    if found.status in (2, 3):
        return (math.inf if found.status == 2 else -math.inf), None
    raise BilevelError(f"solve_globally: a linear programme ended with {found.message!r}.")
