"""What a point is worth: how far its hypergradient can be wrong, and whether it is an equilibrium."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bilevel.certificates.alone import Settings, members_alone
from bilevel.certificates.arguments import batches_of, buffers_of, check_leaves, check_settings, variables_of
from bilevel.certificates.certificate import Certificate, Finding
from bilevel.certificates.constrained import shared_multipliers
from bilevel.certificates.constrained_point import ConstrainedPoint
from bilevel.certificates.point import LeaderFollowerPoint, Taken
from bilevel.certificates.precision import in_float64
from bilevel.certificates.verdicts import INCONCLUSIVE, attempt, bounded, definite, faithful, small, vanishes
from bilevel.certificates.within import certified_within, has_constraints
from bilevel.game import Game
from bilevel.game.data import Batch
from bilevel.game.rounding import rounding, terms
from bilevel.responses import Response
from bilevel.responses.base import State
from bilevel.solving.solution import Solution
from bilevel.tree import Variables, flatten


def certify(
    game: Game,
    point: Solution | Mapping[str, Variables],
    *,
    leader: str | None = None,
    follower: str | None = None,
    response: Response | None = None,
    state: State | None = None,
    hypergradient: Variables = None,
    batches: Mapping[str, Batch] | None = None,
    tolerance: float = 1e-3,
    lanczos_steps: int = 30,
    float64: bool = True,
    seed: int = 0,
) -> Certificate:
    """Whether a point is a differential Stackelberg equilibrium, and how far its hypergradient can be wrong.

    The follower is stationary and its Hessian positive definite; the hypergradient's error is within `tolerance`, and
    so is the corrected hypergradient; the leader's total second derivative is positive definite. Each condition is
    certified, refuted or inconclusive. Of followers who answer together, `game.joined(...)`, each one's own Hessian is
    held positive definite, and the linear solves are by GMRES.

    Within constraints, of either: the follower keeps them, its Lagrangian is stationary and curves upwards along its
    critical cone; the leader keeps its own, some multipliers of the right sign leave nothing of its hypergradient, and
    the total second derivative of its Lagrangian is positive definite along its critical cone. At a kink of the
    follower's answer all of it holds on every side, `Certificate.one_sided` has their hypergradients, and a claim is
    held against the nearest. What lies within `tolerance` of a constraint or of a kink is taken to be at it. Where
    constraints that bind are dependent, or have a gradient of 0, the verdict is inconclusive and not refuted. All
    second derivatives are written down, for up to 1,000 unknowns. Source: Luo, Pang and Ralph 1996.

    A game of fewer digits, such as one in float32 whose losses run under `torch.autocast`, is judged by the same game
    in float64 where that can be evaluated, and its claim is computed as the game computes. It cannot be where losses
    captured tensors of another dtype, or draw random numbers, which are others in float64; then nothing tells what
    half precision inside the losses adds. `Certificate.judged_in` says which it was.

    Costs six linear solves by conjugate gradients, twice `lanczos_steps` products with the follower's Hessian, and as
    many with the leader's, of two solves each. Source: Pedregosa 2016 (arXiv 1602.02355); Fiez et al. 2020
    (arXiv 1906.01217).

    Args:
        game: Players other than leader and follower stand still.
        point: A `Solution`, or all players' variables.
        leader: Default: the first player.
        follower: Default: the last player.
        response: Whose derivative is judged; default: the implicit one.
        state: The response's; default: the solution's, or a fresh one.
        hypergradient: A claim to judge instead.
        batches: Held, as random numbers are; default: each player's first.
        tolerance: Accepted relative error; the default suits float32.
        lanczos_steps: For smallest eigenvalues; up to 100 unknowns all are taken, and the verdict is exact.
        float64: Whether to judge in float64, where the game has fewer digits: twice the memory, and on GPUs slow.
        seed: Of random directions.

    Raises:
        ValueError: For missing players, wrong shapes or dtypes, NaN, batches of players without data, a set that is no
            smooth functions (a cone, a `prox=`), or more than 1,000 unknowns within constraints.

    Examples:
        >>> import torch
        >>> def lead(x, y): return (y - 1) ** 2 + x ** 2
        >>> def follow(x, y): return (y - 2 * x) ** 2
        >>> from bilevel.game import Player
        >>> zero = torch.tensor(0.0, dtype=torch.float64)
        >>> game = Game(x=Player(lead, zero), y=Player(follow, zero))
        >>> certify(game, {"x": zero + 0.4, "y": zero + 0.8}).standing.value
        'certified'
    """
    game.require_one("certify")
    check_settings(tolerance, lanczos_steps)
    first = game.names[0] if leader is None else leader
    last = game.names[-1] if follower is None else follower
    for name in (first, last):
        if name not in game.names:
            raise ValueError(f"certify: there is no player {name!r}; players are {list(game.names)}.")
    if game.names.index(first) >= game.names.index(last):
        raise ValueError(
            f"certify: leader {first!r} does not move before follower {last!r}; order of play: {list(game.names)}. "
            "Players who move together are for certify_nash."
        )
    if state is not None and response is None:
        raise ValueError("certify: state= is a response's; give response= as well.")
    constrained = has_constraints(game, (first, last))
    game.require_minima("certify", joined=True, constrained=constrained)
    variables, buffers, drawn = variables_of(game, point), buffers_of(game, point), batches_of(game, batches)
    claim, answer = None, None
    if hypergradient is not None:
        check_leaves(game, first, hypergradient, "the hypergradient of")
        claim = flatten(hypergradient).detach()
    if response is not None and state is None and isinstance(point, Solution):
        state = point.states.get(last)
    if constrained:
        held_within = ConstrainedPoint(game, first, last, variables, buffers=buffers, batches=drawn, seed=seed)
        return certified_within(held_within, claim, response, state, Settings(tolerance, lanczos_steps, seed))
    given = LeaderFollowerPoint(game, first, last, variables, buffers=buffers, batches=drawn, seed=seed)
    held = (in_float64(given) if float64 else None) or given
    curvature = held.spectrum(held.y, lanczos_steps)
    slope = float(held.slope(held.y, *held.own).detach().norm())
    # A gradient of two terms as large as |H| |y| cannot be told from 0 below their rounding.
    lost = rounding(terms(curvature.largest, float(held.y.norm())), held.y.dtype, 100.0)
    findings = [small("follower's first order", slope, held.reference, lost, tolerance)]
    here = attempt(lambda: held.implicit(held.y)) if curvature.smallest > 0.0 else None
    if held.held.symmetric:
        findings.append(definite("follower's second order", curvature, f"of {last}'s own Hessian", lowest=held.lowest))
        lowest = min(curvature.smallest, held.lowest)
    else:
        own = held.members(lanczos_steps)
        findings += [definite(f"{name}: second order", found, "of its own Hessian") for name, found in own.items()]
        lowest = min(found.smallest for found in own.values())
    if here is None or lowest <= 0.0:
        reason = "the follower is at no strict minimum: there is no response to differentiate"
        findings.append(Finding("hypergradient's error", INCONCLUSIVE, math.nan, f"<= {tolerance:g}", reason))
        return Certificate("differential Stackelberg", tuple(findings), **_known(given, held))
    if response is not None:
        answer = given.answer(response, state)
        claim = answer.gradient if claim is None else claim
    if claim is None:
        taken = here if held is given else attempt(lambda: given.implicit(given.y))
        claim = (here if taken is None else taken).gradient
    h = claim.to(held.y)
    there, left, remark = _corrected(held, here, lanczos_steps)
    estimate = math.nan if there is None else float((h - there.gradient).norm())
    bound = math.inf if there is None else (1.0 + 1e-6) * estimate + left
    findings.append(bounded(bound, estimate, _scale(held, here if there is None else there), tolerance, remark))
    if answer is not None:
        findings.append(faithful(lambda: given.directional(answer)))
    findings.extend(_leader(held, there, left, tolerance, lanczos_steps))
    form = game.structure(first)
    return Certificate(
        "differential Stackelberg",
        tuple(findings),
        hypergradient=form.unflatten(claim),
        corrected=None if there is None else form.unflatten(there.gradient.to(claim)),
        hypergradient_norm=float(h.norm()),
        error_estimate=estimate,
        error_bound=bound,
        corrected_bound=left,
        **_known(given, held),
    )


def certify_nash(
    game: Game,
    point: Solution | Mapping[str, Variables],
    *,
    batches: Mapping[str, Batch] | None = None,
    tolerance: float = 1e-3,
    lanczos_steps: int = 30,
    seed: int = 0,
) -> Certificate:
    """Whether a point is a differential Nash equilibrium: nobody gains to second order by moving alone.

    For every player: its own gradient is below `tolerance` times that at the game's start, and its own Hessian is
    positive definite. For a player with a domain, or functions as constraints: it keeps them, its Lagrangian's gradient
    is below that, with the multipliers that suit best, and its Lagrangian's Hessian is positive definite along those
    that bind. Where several players have the same function as a constraint they share it, and bear it by one multiplier
    (the variational equilibrium); give them functions of their own to ask for any generalised Nash equilibrium. Each is
    certified, refuted or inconclusive, as in `certify`. It says nothing of a larger move: the point
    may be no Nash equilibrium globally. A player whose loss is linear in its own variables, as in a bilinear game, has
    no curvature and needs none: where its gradient vanishes no move gains, and none loses.

    Costs two gradients and up to `lanczos_steps` Hessian-vector products a player. Source: Ratliff et al. 2016
    (arXiv 1411.2168).

    Args:
        game: Every player is taken to move alone.
        point: A `Solution`, or all players' variables.
        batches: Held, as random numbers are; default: each player's first.
        tolerance: Of each player's gradient, in units of that at the game's start.
        lanczos_steps: For smallest eigenvalues; up to 100 unknowns all are taken, and the verdict is exact.
        seed: Of Lanczos' random start and of the batches.

    Raises:
        ValueError: For missing players, wrong shapes or dtypes, NaN, or batches of players without data.

    Examples:
        >>> import torch
        >>> def first(x, y): return x ** 2 + x * y
        >>> def second(x, y): return y ** 2 - x * y
        >>> from bilevel.game import Player
        >>> one = torch.tensor(1.0, dtype=torch.float64)
        >>> game = Game(x=Player(first, one), y=Player(second, one))
        >>> certify_nash(game, {"x": 0 * one, "y": 0 * one}).standing.value
        'certified'
    """
    game.require_one("certify_nash")
    check_settings(tolerance, lanczos_steps)
    game.require_minima("certify_nash", constrained=True, joined=True)
    variables, buffers, given = variables_of(game, point), buffers_of(game, point), batches_of(game, batches)
    start = {name: game.initial(name) for name in game.names}
    drawn = {name: given[name] if name in given else game.draw(name, game.start(name, seed))[0] for name in game.names}
    settings = Settings(tolerance, lanczos_steps, seed)
    alone = [
        part
        for name in game.names
        for part in members_alone(game, name, variables, start, drawn[name], buffers, settings)
    ]
    findings = [finding for part in alone for finding in part.findings]
    borne = {part.name: part.borne for part in alone if part.borne is not None}
    gradients, products = (sum(getattr(part, what) for part in alone) for what in ("gradients", "products"))
    findings += shared_multipliers(game, borne, tolerance)
    return Certificate("differential Nash", tuple(findings), gradients=gradients, products=products)


def _known(given: LeaderFollowerPoint, held: LeaderFollowerPoint) -> dict[str, Any]:
    """What a certificate says of itself: its precision, and its cost."""
    both = (given,) if held is given else (given, held)
    return {
        "judged_in": held.y.dtype,
        "gradients": sum(point.gradients for point in both),
        "products": sum(point.products for point in both),
    }


def _corrected(held: LeaderFollowerPoint, here: Taken, steps: int) -> tuple[Taken | None, float, str]:
    """The hypergradient after one Newton step, a bound of what it still misses, and a remark on the bound."""
    moved = attempt(lambda: held.y + held.newton(held.y))
    there = None if moved is None else attempt(lambda: held.implicit(moved))
    far = "one Newton step does not reach the follower's optimum: solve its problem further"
    if there is None:
        return None, math.inf, far
    curvature = attempt(lambda: held.spectrum(there.y, steps))
    if curvature is None or curvature.smallest <= 0.0:
        return there, math.inf, far
    mu, remark = curvature.lower, ""
    if not mu > 0.0:
        mu, remark = 0.5 * curvature.smallest, "mu is a guess"
    sizes = terms(curvature.largest, float(there.y.norm()), there.mixed, float(flatten(held.own).norm()))
    if not (there.slope <= 0.5 * here.slope or there.slope <= rounding(held.reference + sizes, there.y.dtype, 100.0)):
        return there, math.inf, far
    rate = attempt(lambda: held.sensitivity(there))
    if rate is None:
        return there, math.inf, far
    lost = rounding(curvature.largest / mu * there.scale, there.y.dtype, 100.0)
    return there, rate * there.slope / mu + there.mixed * there.residual / mu + lost, remark


def _leader(held: LeaderFollowerPoint, there: Taken | None, left: float, tolerance: float, steps: int) -> list[Finding]:
    """The leader's two conditions, at the follower's corrected optimum."""
    first, second = "leader's first order", "leader's second order"
    if there is None or not math.isfinite(left):
        reason = "the follower's optimum is not known"
        return [
            Finding(first, INCONCLUSIVE, math.nan, f"<= {tolerance:g}", reason),
            Finding(second, INCONCLUSIVE, math.nan, "> 0", reason),
        ]
    found = attempt(lambda: held.total_spectrum(there.y, steps))
    if found is None:
        last = Finding(second, INCONCLUSIVE, math.nan, "> 0", "its products could not be had")
    else:
        # Each product is as good as its two linear solves.
        noise = 1e3 * held.rtol * max(abs(found.smallest), abs(found.largest))
        last = definite(second, found, "of the total second derivative", noise=noise)
    return [vanishes(first, there, left, _scale(held, there), tolerance), last]


def _scale(held: LeaderFollowerPoint, taken: Taken) -> float:
    """What a hypergradient is small beside: its own two terms, or where both vanish, |g_x| at the start."""
    return max(taken.scale, held.leader_reference)
