"""The best that a leader can be sure of: its follower takes the optimum that the leader likes least."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bilevel.certificates.globally.faces import Face
from bilevel.certificates.globally.pieces import OPEN, Choice, Point, Search, lowest
from bilevel.certificates.globally.reading import Programme
from bilevel.errors import BilevelError, UnboundedError

Array = NDArray[np.float64]

ZERO = 1e-9
"""Up to this a multiplier is 0, in units of the follower's slope."""

BROKEN = 1e-7
"""What a choice may be broken by: HiGHS' own tolerance."""

MOST_COPIES = 8
"""So many tangents of a leader's loss that is quadratic in y have a worst answer each."""


@dataclass(frozen=True, eq=False)
class Node:
    """What is decided: of each inequality whether it binds with a multiplier, and of each copy whether it binds."""

    held: Choice
    touched: NDArray[np.int8]


@dataclass
class WorstAnswers:
    r"""min F subject to the KKT conditions of the follower, and to those of its worst answer for the leader.

    With multipliers (l, m) of the follower at x, all its optima are the feasible y with the same Sy at which the
    inequalities with l_i > 0 bind. The one at which c'y is largest has multipliers of its own,

    $$ A^\top \pi + E^\top r + S u = c, \quad \pi_i\,(a - Az)_i = 0, \quad \pi_i \ge 0 \text{ where } l_i = 0. $$

    Unknowns are v = (x, y_1, ..., l, m, (pi, r, u)_1, ..., eta): one y for each c, the slope of F in y, which is
    one where F is linear in y. Where F is quadratic in y it is the highest of its tangents, and each has a y.
    """

    read: Programme
    tangents: list[tuple[Array, float, int]] = field(default_factory=list)
    slopes: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        read, n = self.read, self.read.n
        self.n, self.m = n, read.m
        self.l, self.p = len(read.lower.right), len(read.lower_equal.right)
        self.A, self.E, self.S = read.lower.matrix[:, n:], read.lower_equal.matrix[:, n:], read.slope[:, n:]
        self.moving = np.abs(self.A).max(axis=1, initial=0.0) > 0.0
        self.curved = bool(read.H[n:, n:].any())
        self._strict: dict[bytes, tuple[Array, Array, Array] | None] = {}
        lowest: Array = np.zeros(n + self.m)
        if read.quadratic:
            lowest = -np.asarray(np.linalg.lstsq(read.H, read.g, rcond=None)[0], dtype=np.float64)
        self.touch(lowest)

    def touch(self, z: Array) -> bool:
        """Add the tangent at z; whether it has a worst answer of its own."""
        a, b = self.read.tangent(z)
        own = not self.slopes or self.curved
        if own:
            self.slopes.append(a[self.n :])
        self.tangents.append((a, b, len(self.slopes) - 1))
        return own

    # Where what lies in v ---------------------------------------------------------------------------------------------

    @property
    def copies(self) -> int:
        """Worst answers."""
        return len(self.slopes)

    @property
    def size(self) -> int:
        """Of v."""
        return self.n + self.l + self.p + self.copies * (2 * self.m + self.l + self.p) + 1

    def y(self, j: int) -> slice:
        """A copy of y."""
        return slice(self.n + j * self.m, self.n + (j + 1) * self.m)

    @property
    def multipliers(self) -> slice:
        """l."""
        begin = self.n + self.copies * self.m
        return slice(begin, begin + self.l)

    @property
    def equal_multipliers(self) -> slice:
        """m."""
        return slice(self.multipliers.stop, self.multipliers.stop + self.p)

    def worst(self, j: int) -> slice:
        """(pi, r, u) of a copy."""
        width = self.l + self.p + self.m
        begin = self.equal_multipliers.stop + j * width
        return slice(begin, begin + width)

    def pushes(self, j: int) -> slice:
        """The pi of a copy."""
        return slice(self.worst(j).start, self.worst(j).start + self.l)

    def _placed(self, rows: int, *parts: tuple[slice, Array]) -> Array:
        found = np.zeros((rows, self.size))
        for place, part in parts:
            found[:, place] = part
        return found

    def _pairs(self, matrix: Array, j: int) -> Array:
        """Rows of (x, y) as rows of v, with a copy of y."""
        return self._placed(len(matrix), (slice(0, self.n), matrix[:, : self.n]), (self.y(j), matrix[:, self.n :]))

    def programme(self, node: Node) -> tuple[Array, Array, Array, Array, Array]:
        """A, b, E, d and bounds `[size, 2]` of the linear programme of a node."""
        read = self.read
        E, d = [self._pairs(read.upper_equal.matrix, 0)], [read.upper_equal.right]
        A, b = [self._pairs(read.upper.matrix, 0)], [read.upper.right]
        for j, slope in enumerate(self.slopes):
            own = (self.multipliers, self.A.T), (self.equal_multipliers, self.E.T)
            E += [self._pairs(read.slope, j) + self._placed(self.m, *own), self._pairs(read.lower_equal.matrix, j)]
            E.append(self._placed(self.m, (self.worst(j), np.hstack([self.A.T, self.E.T, self.S]))))
            d += [-read.start, read.lower_equal.right, slope]
            binding = (node.held == 1) | (node.touched[:, j] == 1)
            E.append(self._pairs(read.lower.matrix[binding], j))
            d.append(read.lower.right[binding])
            A.append(self._pairs(read.lower.matrix, j))
            b.append(read.lower.right)
        for a, constant, j in self.tangents:
            row = self._pairs(a[None], j)
            row[:, -1] = -1.0
            A.append(row)
            b.append(np.array([-constant]))
        bounds = np.stack([np.full(self.size, -np.inf), np.full(self.size, np.inf)], axis=1)
        bounds[self.multipliers, 0] = 0.0
        bounds[self.multipliers, 1][(node.held == 0) | ~self.moving] = 0.0
        for j in range(self.copies):
            low, high = bounds[self.pushes(j), 0], bounds[self.pushes(j), 1]
            low[(node.held == 0) | ~self.moving] = 0.0
            high[((node.held == 0) & (node.touched[:, j] == 0)) | ~self.moving] = 0.0
        return np.vstack(A), np.concatenate(b), np.vstack(E), np.concatenate(d), bounds

    def relaxed(self, node: Node) -> tuple[float, Array | None]:
        """As `Pieces.relaxed`."""
        A, b, E, d, bounds = self.programme(node)
        cost = np.zeros(self.size)
        cost[-1] = 1.0
        return lowest(cost, A, b, E, d, bounds)

    def broken(self, node: Node, v: Array) -> tuple[float, tuple[int, int] | None]:
        """By how much v breaks what is not decided, and where the most: (inequality, copy), or copy -1 for `held`."""
        l = v[self.multipliers]
        most, place = BROKEN, None
        for i in np.flatnonzero(self.moving & (node.held != 1)):
            slack = np.array([self.slack(v, j)[i] for j in range(self.copies)])
            push = np.array([v[self.pushes(j)][i] for j in range(self.copies)])
            if node.held[i] == OPEN:
                by = min(l[i], slack.max())
                if l[i] <= BROKEN:
                    by = max(by, float(np.maximum(-push, np.minimum(push, slack)).max()))
                where = (int(i), -1)
            else:
                each = np.where(node.touched[i] == OPEN, np.minimum(push, slack), 0.0)
                by, where = float(each.max()), (int(i), int(each.argmax()))
            if by > most:
                most, place = by, where
        return most, place

    def slack(self, v: Array, j: int) -> Array:
        """Of the follower's inequalities at a copy, `[l]`."""
        z = np.concatenate([v[: self.n], v[self.y(j)]])
        return np.asarray(self.read.lower.right - self.read.lower.matrix @ z, dtype=np.float64)

    def strictly(self, held: NDArray[np.bool_]) -> tuple[Array, Array, Array] | None:
        """(x, l, m) of an answer whose multipliers are above 0 just where `held`; None where there is none.

        What holds at such points holds in the limit along them. Without one these inequalities never hold all the
        follower's optima together, and the face that they would leave it is none that it is held to.
        """
        known = held.tobytes()
        if known not in self._strict:
            read, n, m = self.read, self.n, self.m
            size = n + m + self.l + self.p + 1
            z, l = slice(0, n + m), slice(n + m, n + m + self.l)
            everything = read.upper.joined(read.lower)
            A = np.zeros((len(everything.right) + int(held.sum()), size))
            A[: len(everything.right), z] = everything.matrix
            A[len(everything.right) :, l] = -np.eye(self.l)[held]
            A[len(everything.right) :, -1] = 1.0
            equal = read.upper_equal.joined(read.lower_equal)
            stationary = np.hstack([read.slope, self.A.T, self.E.T, np.zeros((m, 1))])
            E = np.zeros((m + len(equal.right) + int(held.sum()), size))
            E[:m], E[m : m + len(equal.right), z] = stationary, equal.matrix
            E[m + len(equal.right) :, z] = read.lower.matrix[held]
            bounds = np.stack([np.full(size, -np.inf), np.full(size, np.inf)], axis=1)
            bounds[l, 0], bounds[l, 1][~held], bounds[-1] = 0.0, 0.0, (0.0, 1.0)
            cost = np.zeros(size)
            cost[-1] = -1.0
            right = np.append(everything.right, np.zeros(int(held.sum())))
            level = np.concatenate([-read.start, equal.right, read.lower.right[held]])
            found, at = lowest(cost, A, right, E, level, bounds)
            good = at is not None and (not held.any() or -found > BROKEN)
            self._strict[known] = (at[:n], at[l], at[l.stop : -1]) if good and at is not None else None
        return self._strict[known]

    def answer(self, x: Array, l: Array, m: Array, held: NDArray[np.bool_]) -> tuple[float, Array] | None:
        """F where the follower is worst of all optima at which `held` binds, and that y; None where unknown."""
        inside = self._feasible(x, l, m, held)
        return None if inside is None else Face.of(self.read, x, inside, l, held).worst(self.read, x)

    def _feasible(self, x: Array, l: Array, m: Array, held: NDArray[np.bool_]) -> Array | None:
        read, n = self.read, self.n
        E = np.vstack([self.S, self.E, self.A[held]])
        level = np.concatenate(
            [
                -read.start - read.slope[:, :n] @ x - self.A.T @ l - self.E.T @ m,
                read.lower_equal.right - read.lower_equal.matrix[:, :n] @ x,
                (read.lower.right - read.lower.matrix[:, :n] @ x)[held],
            ]
        )
        free = np.full((self.m, 2), np.inf) * np.array([-1.0, 1.0])
        right = read.lower.right - read.lower.matrix[:, :n] @ x
        return lowest(np.zeros(self.m), self.A, right, E, level, free)[1]


@dataclass(frozen=True, eq=False)
class Candidate:
    """The lowest value so far: the leader's point, the follower's multipliers, and which inequalities hold its optima.

    It is taken there, or in the limit along points whose multipliers are above 0 where `held`.
    """

    value: float
    x: Array
    l: Array
    m: Array
    held: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Surest:
    """What the search ends with: the search, whether the value is taken at a point, and why it stopped short."""

    search: Search
    attained: bool
    short: str


def surest(read: Programme, tolerance: float, max_nodes: int) -> Surest:
    """Branch and bound on which inequalities hold all optima together, and which the worst of them touches.

    The leader's functions and the follower's loss are as `solve_globally` asks; no function of the leader's sees y.
    Pieces are closed: on an edge of one, where a multiplier ends, the follower has more optima than within. So the
    lowest value is an infimum, and a point near enough to it, inside the piece, is given where it is not taken.
    """
    scale = max(float(np.abs(read.slope).max(initial=0.0)), float(np.abs(read.start).max(initial=0.0))) or 1.0
    worst = WorstAnswers(replace(read, slope=read.slope / scale, start=read.start / scale))
    order = itertools.count()
    root = Node(np.full(worst.l, OPEN, dtype=np.int8), np.full((worst.l, worst.copies), OPEN, dtype=np.int8))
    open_nodes: list[tuple[float, int, Node]] = [(-math.inf, next(order), root)]
    best: Candidate | None = None
    nodes, short, lost = 0, "", math.inf
    while open_nodes and not short:
        known, _, node = heapq.heappop(open_nodes)
        if best is not None and known >= best.value - tolerance * (1.0 + abs(best.value)):
            lost = min(lost, known)
            break
        if nodes >= max_nodes:
            lost, short = known, f"ended after max_nodes={max_nodes}"
            break
        nodes += 1
        if node.touched.shape[1] < worst.copies:
            more = np.full((worst.l, worst.copies - node.touched.shape[1]), OPEN, dtype=np.int8)
            node = Node(node.held, np.hstack([node.touched, more]))
        bound, v = worst.relaxed(node)
        bound = max(bound, known)
        if v is None and bound > 0.0:
            continue
        if best is not None and bound >= best.value - tolerance * (1.0 + abs(best.value)):
            lost = min(lost, bound)
            continue
        place = None if v is None else worst.broken(node, v)[1]
        if v is not None and place is None:
            held = (node.held == 1) | ((node.held == OPEN) & (v[worst.multipliers] > BROKEN) & worst.moving)
            if worst.strictly(held) is not None:
                end = (v[: worst.n], v[worst.multipliers], v[worst.equal_multipliers])
                found = worst.answer(*end, held)
                if found is None:
                    lost, short = bound, "met a set of optima whose corners are too many, or that has no bounds"
                    break
                value, y = found
                if best is None or value < best.value:
                    best = Candidate(value, *end, held)
                if value <= bound + tolerance * (1.0 + abs(bound)):
                    lost = min(lost, bound)
                    continue
                if worst.copies >= MOST_COPIES and worst.curved:
                    lost, short = bound, f"needed more than {MOST_COPIES} tangents of the leader's loss"
                    break
                worst.touch(np.concatenate([v[: worst.n], y]))
                heapq.heappush(open_nodes, (bound, next(order), node))
                continue
        open_ = np.flatnonzero((node.held == OPEN) & worst.moving)
        if place is None and len(open_):
            place = (int(open_[0]), -1)
        if place is None and v is None:
            loose = np.argwhere((node.touched == OPEN) & (node.held == 0)[:, None] & worst.moving[:, None])
            if not len(loose):
                raise UnboundedError(
                    "solve_globally: the leader's loss falls for ever, whatever its follower answers. Bound the leader "
                    "by a domain, or by inequality=."
                )
            place = (int(loose[0][0]), int(loose[0][1]))
        if place is None:
            continue  # all is decided, and the inequalities held never hold together
        for side in (0, 1):
            held, touched = node.held.copy(), node.touched.copy()
            if place[1] < 0:
                held[place[0]] = side
            else:
                touched[place] = side
            heapq.heappush(open_nodes, (bound, next(order), Node(held, touched)))
    if best is None:
        return Surest(Search(None, lost, nodes, not short), attained=False, short=short)
    point, attained = _taken(worst, best, tolerance, scale)
    return Surest(Search(point, min(lost, best.value), nodes, not short), attained, short)


def _taken(worst: WorstAnswers, best: Candidate, tolerance: float, scale: float) -> tuple[Point, bool]:
    """A point where the leader is sure of the value, up to the tolerance, and whether it is where the value is."""
    value, held, x, l, m = best.value, best.held, best.x, best.l, best.m
    room = tolerance * (1.0 + abs(value))
    here = worst.answer(x, l, m, held & (l > ZERO))
    if here is not None and here[0] <= value + room:
        return _point(x, here[1], l, m, here[0], value, scale), True
    inner = worst.strictly(held)
    assert inner is not None
    share, found = 1.0, None
    while share > 1e-12:
        at, push, level = ((1.0 - share) * end + share * start for end, start in zip((x, l, m), inner, strict=True))
        there = worst.answer(at, push, level, held)
        if there is not None and there[0] <= value + room:
            found = _point(at, there[1], push, level, there[0], value, scale)
            break
        share *= 0.5
    if found is None:
        raise BilevelError("solve_globally: no point near the infimum was found; the programme is badly scaled.")
    return found, False


def _point(x: Array, y: Array, l: Array, m: Array, value: float, bound: float, scale: float) -> Point:
    return Point(np.concatenate([x, y]), np.maximum(l, 0.0) * scale, m * scale, value, bound)
