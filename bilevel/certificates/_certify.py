"""What a point is worth: how far its hypergradient can be wrong, and whether it is an equilibrium."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from bilevel.certificates.certificate import Certificate, Finding, Standing
from bilevel.certificates.point import Answer, LeaderFollowerPoint, Taken, own_gradient
from bilevel.errors import BilevelError
from bilevel.game import Game
from bilevel.game.data import Batch
from bilevel.linear.lanczos import Spectrum
from bilevel.responses import Response
from bilevel.responses.base import State
from bilevel.solving.solution import Solution
from bilevel.tree import Variables, flatten, map_leaves, named_leaves

_T = TypeVar("_T")
CERTIFIED, REFUTED, INCONCLUSIVE = Standing.CERTIFIED, Standing.REFUTED, Standing.INCONCLUSIVE


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
    seed: int = 0,
) -> Certificate:
    """Whether a point is a differential Stackelberg equilibrium, and how far its hypergradient can be wrong.

    The follower is stationary and its Hessian positive definite; the hypergradient's error is within `tolerance`, and
    so is the corrected hypergradient; the leader's total second derivative is positive definite. Each condition is
    certified, refuted or inconclusive.

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
        seed: Of random directions.

    Raises:
        ValueError: For missing players, wrong shapes or dtypes, NaN, or batches of players without data.

    Examples:
        >>> def lead(x, y): return (y - 1) ** 2 + x ** 2
        >>> def follow(x, y): return (y - 2 * x) ** 2
        >>> from bilevel.game import Player
        >>> zero = torch.tensor(0.0, dtype=torch.float64)
        >>> game = Game(x=Player(lead, zero), y=Player(follow, zero))
        >>> certify(game, {"x": zero + 0.4, "y": zero + 0.8}).standing.value
        'certified'
    """
    game.require_one("certify")
    _check_settings(tolerance, lanczos_steps)
    game.require_minima("certify")
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
    held = LeaderFollowerPoint(
        game,
        first,
        last,
        _variables(game, point),
        buffers=_buffers(game, point),
        batches=_batches(game, batches),
        seed=seed,
    )
    claim, answer = None, None
    if hypergradient is not None:
        _check_leaves(game, first, hypergradient, "the hypergradient of")
        claim = flatten(hypergradient).detach()
    curvature = held.spectrum(held.y, lanczos_steps)
    slope = float(held.slope(held.y, *held.own).detach().norm())
    # A gradient of two terms as large as |H| |y| cannot be told from 0 below their rounding.
    rounding = 100.0 * torch.finfo(held.y.dtype).eps * curvature.largest * float(held.y.norm())
    findings = [_small("follower's first order", slope, held.reference, rounding, tolerance)]
    here = _attempt(lambda: held.implicit(held.y)) if curvature.smallest > 0.0 else None
    findings.append(_definite("follower's second order", curvature, f"of {last}'s own Hessian", lowest=held.lowest))
    if here is None or min(curvature.smallest, held.lowest) <= 0.0:
        reason = "the follower is at no strict minimum: there is no response to differentiate"
        findings.append(Finding("hypergradient's error", INCONCLUSIVE, math.nan, f"<= {tolerance:g}", reason))
        return Certificate(
            "differential Stackelberg", tuple(findings), gradients=held.gradients, products=held.products
        )
    if response is not None:
        kept = point.states if isinstance(point, Solution) else {}
        answer = held.answer(response, kept.get(last) if state is None else state)
        claim = answer.gradient if claim is None else claim
    h = here.gradient if claim is None else claim
    there, left, remark = _corrected(held, here, lanczos_steps)
    estimate = math.nan if there is None else float((h - there.gradient).norm())
    bound = math.inf if there is None else (1.0 + 1e-6) * estimate + left
    findings.append(_bounded(bound, estimate, _scale(held, here if there is None else there), tolerance, remark))
    if answer is not None:
        findings.append(_faithful(held, answer))
    findings.extend(_leader(held, there, left, tolerance, lanczos_steps))
    form = game.structure(first)
    return Certificate(
        "differential Stackelberg",
        tuple(findings),
        hypergradient=form.unflatten(h),
        corrected=None if there is None else form.unflatten(there.gradient),
        hypergradient_norm=float(h.norm()),
        error_estimate=estimate,
        error_bound=bound,
        corrected_bound=left,
        gradients=held.gradients,
        products=held.products,
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
    positive definite. Each is certified, refuted or inconclusive, as in `certify`. It says nothing of a larger move:
    the point may be no Nash equilibrium globally.

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
        >>> def first(x, y): return x ** 2 + x * y
        >>> def second(x, y): return y ** 2 - x * y
        >>> from bilevel.game import Player
        >>> one = torch.tensor(1.0, dtype=torch.float64)
        >>> game = Game(x=Player(first, one), y=Player(second, one))
        >>> certify_nash(game, {"x": 0 * one, "y": 0 * one}).standing.value
        'certified'
    """
    game.require_one("certify_nash")
    _check_settings(tolerance, lanczos_steps)
    game.require_minima("certify")
    variables, buffers, given = _variables(game, point), _buffers(game, point), _batches(game, batches)
    start = {name: game.initial(name) for name in game.names}
    findings, products = [], 0
    for name in game.names:
        batch = given[name] if name in given else game.draw(name, game.start(name, seed))[0]
        norm, spectrum = own_gradient(game, name, variables, batch, buffers)
        reference, _ = own_gradient(game, name, start, batch, game.buffers())
        found = spectrum(lanczos_steps, seed)
        size = float(flatten(variables[name]).norm())
        rounding = 100.0 * torch.finfo(flatten(variables[name]).dtype).eps * found.largest * size
        findings.append(_small(f"{name}: first order", norm, reference, rounding, tolerance))
        findings.append(_definite(f"{name}: second order", found, "of its own Hessian"))
        products += found.products
    return Certificate("differential Nash", tuple(findings), gradients=2 * len(game.names), products=products)


# Verdicts ------------------------------------------------------------------------------------------------------------


def _corrected(held: LeaderFollowerPoint, here: Taken, steps: int) -> tuple[Taken | None, float, str]:
    """The hypergradient after one Newton step, a bound of what it still misses, and a remark on the bound."""
    moved = _attempt(lambda: held.y + held.newton(held.y))
    there = None if moved is None else _attempt(lambda: held.implicit(moved))
    far = "one Newton step does not reach the follower's optimum: solve its problem further"
    if there is None:
        return None, math.inf, far
    curvature = _attempt(lambda: held.spectrum(there.y, steps))
    if curvature is None or curvature.smallest <= 0.0:
        return there, math.inf, far
    epsilon = torch.finfo(there.y.dtype).eps
    mu, remark = curvature.lower, ""
    if not mu > 0.0:
        mu, remark = 0.5 * curvature.smallest, "mu is a guess"
    floor = held.reference + curvature.largest * float(there.y.norm()) + there.mixed * float(flatten(held.own).norm())
    if not (there.slope <= 0.5 * here.slope or there.slope <= 100.0 * epsilon * floor):
        return there, math.inf, far
    rate = _attempt(lambda: held.sensitivity(there))
    if rate is None:
        return there, math.inf, far
    rounding = 100.0 * epsilon * (curvature.largest / mu) * there.scale
    return there, rate * there.slope / mu + there.mixed * there.residual / mu + rounding, remark


def _leader(held: LeaderFollowerPoint, there: Taken | None, left: float, tolerance: float, steps: int) -> list[Finding]:
    """The leader's two conditions, at the follower's corrected optimum."""
    first, second = "leader's first order", "leader's second order"
    if there is None or not math.isfinite(left):
        reason = "the follower's optimum is not known"
        return [
            Finding(first, INCONCLUSIVE, math.nan, f"<= {tolerance:g}", reason),
            Finding(second, INCONCLUSIVE, math.nan, "> 0", reason),
        ]
    found = _attempt(lambda: held.total_spectrum(there.y, steps))
    if found is None:
        last = Finding(second, INCONCLUSIVE, math.nan, "> 0", "its products could not be had")
    else:
        # Each product is as good as its two linear solves.
        noise = 1e3 * held.rtol * max(abs(found.smallest), abs(found.largest))
        last = _definite(second, found, "of the total second derivative", noise=noise)
    return [_vanishes(first, there, left, _scale(held, there), tolerance), last]


def _small(name: str, norm: float, reference: float, rounding: float, tolerance: float) -> Finding:
    relative = norm / reference if reference > 0.0 else norm
    remark = "|grad| over that at the start"
    if norm <= rounding and relative > tolerance:
        return Finding(name, CERTIFIED, relative, f"<= {tolerance:g}", f"{remark}; 0 up to rounding")
    standing = CERTIFIED if relative <= tolerance else REFUTED
    return Finding(name, standing, relative, f"<= {tolerance:g}", remark)


def _definite(
    name: str, found: Spectrum, what: str, *, lowest: float = math.inf, noise: float | None = None
) -> Finding:
    """A verdict on the smallest eigenvalue; `lowest` is a Rayleigh quotient from elsewhere, `noise` products' error."""
    uncertain = found.rounding if noise is None else noise
    smallest = min(found.smallest, lowest)
    if smallest < -uncertain:
        standing = REFUTED
    else:
        standing = CERTIFIED if found.lower > (0.0 if noise is None else noise) and smallest > 0.0 else INCONCLUSIVE
    how = "exact" if found.exact else f"at least {found.lower:.3g} with probability {1.0 - found.failure:g}"
    if standing is REFUTED:
        how = "a direction of negative curvature"
    return Finding(name, standing, smallest, "> 0", f"smallest eigenvalue {what}; {how}; largest {found.largest:.3g}")


def _scale(held: LeaderFollowerPoint, taken: Taken) -> float:
    """What a hypergradient is small beside: its own two terms, or where both vanish, |g_x| at the start."""
    return max(taken.scale, held.leader_reference)


def _bounded(bound: float, estimate: float, scale: float, tolerance: float, note: str) -> Finding:
    if bound <= tolerance * scale:
        standing = CERTIFIED
    else:
        # What the bound adds to the estimate may hide a right answer, or a wrong one.
        wrong = math.isfinite(bound) and 2.0 * estimate - bound > tolerance * scale
        standing = REFUTED if wrong else INCONCLUSIVE
    remark = f"bound {bound:.3g}, estimate {estimate:.3g}, scale {scale:.3g}" + (f"; {note}" if note else "")
    return Finding("hypergradient's error", standing, bound / max(scale, 1e-300), f"<= {tolerance:g}", remark)


def _vanishes(name: str, there: Taken, left: float, scale: float, tolerance: float) -> Finding:
    size, wanted = float(there.gradient.norm()), tolerance * scale
    standing = CERTIFIED if size + left <= wanted else REFUTED if size - left > wanted else INCONCLUSIVE
    relative = size / max(scale, 1e-300)
    return Finding(
        name, standing, relative, f"<= {tolerance:g}", "|hypergradient| over |g_x| + |f_yx| |u|, or |g_x| at the start"
    )


_COSINE, _RATIOS, _DRAWS = 0.95, (0.8, 1.25), 5


def _faithful(held: LeaderFollowerPoint, answer: Answer) -> Finding:
    """The response's derivative against -H^-1 f_yx in fresh directions of the leader, and their spread."""
    name, wanted_text = "response's derivative", f"cosine >= {_COSINE}, size {_RATIOS[0]} to {_RATIOS[1]}"
    cosines, ratios = [], []
    for _ in range(_DRAWS):
        pair = _attempt(lambda: held.directional(answer))
        if pair is None:
            reason = "the response's own answer is at no strict minimum"
            return Finding(name, INCONCLUSIVE, math.nan, wanted_text, reason)
        cosine, ratio = _agreement(*pair)
        cosines.append(cosine)
        ratios.append(ratio)
    good = [c >= _COSINE and _RATIOS[0] <= r <= _RATIOS[1] for c, r in zip(cosines, ratios, strict=True)]
    standing = CERTIFIED if all(good) else INCONCLUSIVE if any(good) else REFUTED
    remark = (
        f"mean cosine {sum(cosines) / _DRAWS:.3f} (from {min(cosines):.3f}), mean size {sum(ratios) / _DRAWS:.3g} "
        f"({min(ratios):.3g} to {max(ratios):.3g}), {_DRAWS} directions"
    )
    return Finding(name, standing, sum(cosines) / _DRAWS, wanted_text, remark)


def _agreement(moved: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Cosine and ratio of sizes."""
    came, expected = float(moved.norm()), float(wanted.norm())
    if expected == 0.0:  # the optimum stands still; then so must the answer
        return (1.0, 1.0) if came == 0.0 else (0.0, math.inf)
    return (float(moved @ wanted) / (came * expected) if came > 0.0 else 0.0), came / expected


def _attempt(function: Callable[[], _T]) -> _T | None:
    """What it returns; None where the follower's losses or curvature do not allow it."""
    try:
        return function()
    except BilevelError:
        return None


# Input ---------------------------------------------------------------------------------------------------------------


def _check_settings(tolerance: float, lanczos_steps: int) -> None:
    if not 0.0 < tolerance < math.inf:
        raise ValueError(f"certify: tolerance={tolerance}; expected a finite number > 0.")
    if lanczos_steps < 1:
        raise ValueError(f"certify: lanczos_steps={lanczos_steps}; expected at least 1.")


def _variables(game: Game, point: Solution | Mapping[str, Variables]) -> dict[str, Variables]:
    given = dict(point.variables) if isinstance(point, Solution) else dict(point)
    missing = [name for name in game.names if name not in given]
    if missing:
        raise ValueError(f"certify: the point lacks the variables of {missing}; given are {sorted(given)}.")
    unknown = sorted(set(given) - set(game.names))
    if unknown:
        raise ValueError(f"certify: the point has variables of {unknown}; players are {list(game.names)}.")
    for name in game.names:
        _check_leaves(game, name, given[name], "the variables of")
    return {name: map_leaves(lambda t: t.detach(), given[name]) for name in game.names}


def _check_leaves(game: Game, name: str, tree: Variables, what: str) -> None:
    """Refuse what has not a player's form, dtype and device, and what is not finite."""
    pairs, start = named_leaves(tree), named_leaves(game.initial(name))
    for path, leaf in pairs:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"certify: {what} {name!r}: {path or 'it'} is {leaf!r}; expected a tensor.")
    game.check(name, tree)
    for (path, leaf), (_, wanted) in zip(pairs, start, strict=True):
        if leaf.dtype != wanted.dtype or leaf.device != wanted.device:
            raise ValueError(
                f"certify: {what} {name!r}: {path or 'its tensor'} is {leaf.dtype} on {leaf.device}; expected that of "
                f"its init, {wanted.dtype} on {wanted.device}."
            )
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"certify: {what} {name!r}: {path or 'its tensor'} holds NaN or infinity.")


def _buffers(game: Game, point: Solution | Mapping[str, Variables]) -> dict[str, dict[str, Tensor]]:
    """Those that the solution ends with, else the game's own."""
    kept = dict(point.buffers) if isinstance(point, Solution) else {}
    return {name: buffers for name, buffers in {**game.buffers(), **kept}.items() if buffers}


def _batches(game: Game, batches: Mapping[str, Batch] | None) -> dict[str, Batch]:
    given = {} if batches is None else dict(batches)
    holding = [name for name, player in game.players.items() if player.data is not None]
    for name in given:
        if name not in holding:
            raise ValueError(f"certify: batches has one for {name!r}; players with data are {holding}.")
    return given
