"""The global optimum of a linear or convex quadratic bilevel programme."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel.certificates.globally.answer import GlobalAnswer
from bilevel.certificates.globally.bounds import Region, multiplier_bounds, slack_bounds
from bilevel.certificates.globally.faces import Face
from bilevel.certificates.globally.mixed_integer import Limits, by_binaries
from bilevel.certificates.globally.pessimistic import surest
from bilevel.certificates.globally.pieces import Pieces, Point, Search, branched
from bilevel.certificates.globally.reading import Programme, Reader
from bilevel.errors import ConvergenceError, InfeasibleError
from bilevel.game import Game
from bilevel.tree import map_leaves

Array = NDArray[np.float64]

LARGE = 1e4
"""In place of a bound that is not known, in units of the programme's largest number."""


def solve_globally(
    game: Game,
    leader: str | None = None,
    follower: str | None = None,
    *,
    optimistic: bool = True,
    tolerance: float = 1e-6,
    max_nodes: int = 20_000,
    seconds: float = 60.0,
    seed: int = 0,
) -> GlobalAnswer:
    r"""The best point of all, with a proof, where everything is linear or convex quadratic.

    The follower's loss is linear or convex quadratic in y, and its slope linear in (x, y), so that x'y may occur; the
    leader's is linear or convex quadratic in both; functions and domains are linear in both. Then an answer of the
    follower is a point of its KKT conditions,

    $$ Sz + s + A_y^\top l + E_y^\top m = 0, \quad Az \le a, \quad Ez = e, \quad l \ge 0, \quad l_i\,(a - Az)_i = 0, $$

    and a binary $w_i$ says which factor vanishes: $(a - Az)_i \le S_i (1 - w_i)$, $l_i \le M_i w_i$. HiGHS solves the
    mixed-integer programme. $S_i$ is proved by a linear programme and $M_i$ by looking at all bases of the
    constraints, where these are at most 20,000. Where either has no proof, a branch and bound without such bounds
    (Bard and Moore 1990) goes on from what HiGHS found. The coefficients are read off by autograd in float64, and held
    against the functions at random points, at corners of the feasible set, and at the answer.

    It costs one mixed-integer programme, exponential in the follower's inequalities at worst. Players other than
    the two stand still where they start; of data the first batch is taken.

    Where the follower has several optima the leader gets the one it likes best (the optimistic answer). With
    `optimistic=False` it gets the one it likes least, and the answer is the best that the leader can be sure of: the
    lowest $\max F(x, y)$ over all optima y. These are the feasible y with the same $Sy$ at which the inequalities with
    $l_i > 0$ bind, so that the KKT conditions of that maximum are added, and a branch and bound decides both. Where no
    point has that lowest value, because the follower turns against the leader just there, the answer is beside it by
    the tolerance, and `attained` is False.

    Args:
        game: Its tensors are taken in float64; what losses capture must work with that.
        leader: Default: the first player.
        follower: Default: the last player.
        optimistic: Which of the follower's optima the leader gets where there are several.
        tolerance: Of the proof: nothing is better by more than this times (1 + |value|).
        max_nodes: Of HiGHS, and of the branch and bound after it.
        seconds: Of one call of HiGHS; beyond it the answer says `proved=False`.
        seed: Of the random points.

    Raises:
        ValueError: For a function that is not linear, or a loss that is not convex quadratic, and by how much. With
            `optimistic=False` for functions of the leader's that see a follower with several optima.
        InfeasibleError: When no point keeps the constraints, or none of them is an answer of the follower.
        UnboundedError: When the leader's loss falls for ever.
        ConvergenceError: When the search ended without any answer.
    """
    first, last = _pair(game, leader, follower)
    _require_settings(tolerance, max_nodes, seconds)
    exact = game if game.like.dtype == torch.float64 else game.to(dtype=torch.float64)
    reader = Reader(exact.to("cpu") if exact.device.type != "cpu" else exact, first, last)
    read = reader.programme(seed)
    region = Region(read)
    slack, multiplier = slack_bounds(read, region), multiplier_bounds(read, region)
    read.require_read(region.points)
    pieces, limits = Pieces(read), Limits(tolerance, max_nodes, seconds)
    search, reason = _searched(pieces, slack, multiplier, limits)
    best = search.best
    if best is None:
        if search.complete:
            raise InfeasibleError(
                f"solve_globally: points keep all the constraints, and at none of them is {last!r} at an optimum of "
                f"its own. Loosen the constraints of {first!r} that see {last!r}, or bound {last!r}'s loss from below."
            )
        raise ConvergenceError(f"solve_globally: no answer found. {reason} Raise max_nodes= or seconds=.")
    attained, bound, proved, nodes = True, min(search.bound, best.value), search.complete, search.nodes
    worst = _worst(read, best)
    if not optimistic and worst <= best.value:
        reason += " The follower has no optimum there that the leader likes less."
    elif not optimistic:
        best, bound, proved, attained, more, reason = _surest(read, first, last, limits)
        nodes, worst = nodes + more, best.value
    read.require_read([best.z])
    flat = {"inequality": best.inequality, "equality": best.equality}
    z = torch.as_tensor(best.z)
    x, y = z[: read.n], z[read.n :]
    forms = {first: game.structure(first).unflatten(x), last: game.structure(last).unflatten(y)}
    found = {name: forms.get(name, game.initial(name)) for name in game.names}
    return GlobalAnswer(
        value=best.value,
        variables=map_leaves(lambda leaf: leaf.to(game.like), found),
        multipliers=map_leaves(lambda leaf: leaf.to(game.like), reader.multipliers(flat, read.form)),
        proved=proved,
        reason=reason,
        worst=worst,
        bound=bound,
        nodes=nodes,
        optimistic=optimistic,
        attained=attained,
    )


def _surest(read: Programme, leader: str, follower: str, limits: Limits) -> tuple[Point, float, bool, bool, int, str]:
    """The pessimistic answer: the point, a lower bound, whether it is proved and attained, nodes, and how."""
    n = read.n
    for rows in (read.upper, read.upper_equal):
        seeing = np.flatnonzero(np.abs(rows.matrix[:, n:]).max(axis=1, initial=0.0) > 0.0)
        if len(seeing):
            raise ValueError(
                f"solve_globally(optimistic=False): {rows.names[int(seeing[0])]} of {leader!r} sees {follower!r}, "
                "which has several optima; which of them the leader must keep it at is not asked here. State it of "
                f"{leader!r} alone, or take the optimistic answer, whose `worst` says whether all optima keep it."
            )
    found = surest(read, limits.tolerance, limits.max_nodes)
    point = found.search.best
    if point is None and found.search.complete:
        raise InfeasibleError(
            f"solve_globally(optimistic=False): whatever {leader!r} does, {follower!r} has optima at which the loss of "
            f"{leader!r} is as high as one likes. Bound {follower!r} by a domain."
        )
    if point is None:
        raise ConvergenceError(f"solve_globally(optimistic=False): no answer found; the search {found.short}.")
    if found.short:
        reason = f"The search {found.short}, with a lower bound only."
    else:
        reason = "Branch and bound on the follower's optimum and on the worst of its optima proves it."
    if not found.attained:
        reason += " No point has the lowest value itself: there the follower turns against the leader."
    return point, found.search.bound, found.search.complete, found.attained, found.search.nodes, reason


def _searched(pieces: Pieces, slack: Array, multiplier: Array | None, limits: Limits) -> tuple[Search, str]:
    """The search, and how it is proved or why not."""
    read = pieces.read
    known = multiplier is not None and bool(np.isfinite(multiplier[pieces.moving]).all())
    known = known and bool(np.isfinite(slack[pieces.moving]).all())
    numbers = (read.H, read.g, read.slope, read.start, read.lower.matrix, read.lower.right)
    large = LARGE * max(1.0, *(float(np.abs(part).max(initial=0.0)) for part in numbers))
    multiplier = np.full(pieces.l, large) if multiplier is None else multiplier
    # A margin for what the linear programmes are exact to.
    S, M = (np.where(np.isfinite(b), 1.001 * b + 1e-3, large) for b in (slack, multiplier))
    search = by_binaries(pieces, S, M, limits)
    if known and search.complete:
        return search, "All bounds of the mixed-integer programme are proved."
    why = "HiGHS stopped short" if known else "Bounds of slacks or multipliers are not known"
    after = branched(pieces, search.best, tolerance=limits.tolerance, max_nodes=limits.max_nodes)
    total = Search(after.best, after.bound, search.nodes + after.nodes, after.complete)
    if after.complete:
        return total, f"{why}; branch and bound, which needs none, proves it."
    return total, f"{why}, and branch and bound ended after max_nodes={limits.max_nodes} with a lower bound only."


def _worst(read: Programme, best: Point) -> float:
    """The leader's loss at its point, if the follower takes the optimum that the leader likes least."""
    n, y, S = read.n, best.z[read.n :], read.slope[:, read.n :]
    slope = read.slope @ best.z + read.start
    # All optima of a convex quadratic share S y and the slope's product with y.
    E = np.vstack([read.lower_equal.matrix[:, n:], S, slope[None] / max(1.0, float(np.abs(slope).max(initial=0.0)))])
    A, right = read.lower.matrix[:, n:], read.lower.right - read.lower.matrix[:, :n] @ best.z[:n]
    face = Face(A, np.maximum(right, A @ y), E, E @ y, y)

    def furthest(direction: Array) -> float:
        end = face.furthest(direction)
        return math.inf if end is None else float(direction @ (end - y))

    both = (read.upper_equal.matrix[:, n:], -read.upper_equal.matrix[:, n:])
    for rows, room in (
        (read.upper.matrix[:, n:], read.upper.right - read.upper.matrix @ best.z),
        *((e, None) for e in both),
    ):
        for i, row in enumerate(rows):
            if furthest(row) > 1e-6 * (1.0 + float(np.abs(row).max())) + (0.0 if room is None else max(room[i], 0.0)):
                return math.inf
    if not read.quadratic:
        more = furthest(read.g[n:])
        return best.value + (more if more > 1e-9 * (1.0 + abs(best.value)) else 0.0)
    ends = [furthest(sign * row) for row in np.eye(read.m) for sign in (1.0, -1.0)]
    if max(ends, default=0.0) <= 1e-6 * (1.0 + float(np.abs(y).max(initial=0.0))):
        return best.value
    found = face.worst(read, best.z[:n])
    return math.nan if found is None else max(found[0], best.value)


def _pair(game: Game, leader: str | None, follower: str | None) -> tuple[str, str]:
    game.require_one("solve_globally")
    first = game.names[0] if leader is None else leader
    last = game.names[-1] if follower is None else follower
    for name in (first, last):
        if name not in game.names:
            raise ValueError(f"solve_globally: there is no player {name!r}; players are {list(game.names)}.")
        if game.members(name) != (name,):
            raise ValueError(
                f"solve_globally: {name!r} is {list(game.members(name))} together, who minimise no single loss. Give "
                "the game before joined()."
            )
    if game.names.index(first) >= game.names.index(last):
        raise ValueError(
            f"solve_globally: leader {first!r} does not move before follower {last!r}; order: {list(game.names)}."
        )
    return first, last


def _require_settings(tolerance: float, max_nodes: int, seconds: float) -> None:
    for name, given in (("tolerance", tolerance), ("max_nodes", max_nodes), ("seconds", seconds)):
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0.0 < given < math.inf:
            raise ValueError(f"solve_globally: {name}={given!r}; expected a number above 0.")
