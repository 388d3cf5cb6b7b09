"""What a check of a hypergradient rests on: the response's claim, the follower solved anew, and their slopes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from bilevel.errors import BilevelError, BilevelWarning
from bilevel.responses import Response, State
from bilevel.responses.base import require_answer
from bilevel.testing.finite_differences import Slope, slope_at_zero
from bilevel.testing.losses import LeaderFollowerLosses
from bilevel.testing.resolved import ResolvedFollower
from bilevel.tree import Variables, flatten


class Verdict(Enum):
    """What a check found: `RIGHT`, `WRONG` or `CANNOT_TELL`."""

    RIGHT = "right"
    WRONG = "wrong"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, eq=False)
class Claim:
    """The response's answer y `[m]` at x `[n]` and the hypergradient `[n]` that autograd gives through it.

    `path` says whether the graph leads from the leader's loss to x at all; `raised` is what went wrong, in words, and
    then there is no hypergradient. `state` is the response's before the answer, `after` the one after it.
    """

    held: LeaderFollowerLosses
    response: Response
    x: Tensor
    y: Tensor
    gradient: Tensor
    state: State
    after: State
    path: bool = True
    raised: str = ""
    warned: tuple[str, ...] = ()

    def own_value(self, x: Tensor) -> float:
        """The leader's loss at the response's own answer to x `[n]`, from the same state."""
        held = self.held
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", BilevelWarning)
                y, _ = _answer(held, self.response, x, self.state)
            return held.value(x, flatten(y))
        except BilevelError:  # too far away for it
            return math.nan


def claimed(held: LeaderFollowerLosses, response: Response, x: Tensor, state: State, settle: int) -> Claim:
    """Call the response `settle` times at x `[n]`, then once more, and differentiate the leader's loss through it."""
    leaf = x.clone().requires_grad_()
    after, y = state, flatten(state["variables"]) if "variables" in state else torch.zeros(0).to(x)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(settle):
                with torch.no_grad():
                    _, state = _answer(held, response, x, state)
            caught.clear()  # what held while it warmed up holds no longer
            answer, after = _answer(held, response, leaf, state)
            y = flatten(answer).detach()
            if after.get("buffers"):
                held = replace(held, buffers={held.follower: after["buffers"]}, at=(x, y))
            loss = held.loss(held.leader, leaf, flatten(answer))
            slope = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
            after = response.after_backward(after, answer)
    except BilevelError as error:
        raised = f"{type(error).__name__}: {error}"
        return Claim(held, response, x, y, torch.full_like(x, torch.nan), state, after, raised=raised)
    told = []
    for entry in caught:
        if issubclass(entry.category, BilevelWarning):
            told.append(f"{entry.category.__name__}: {entry.message}")
        else:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    gradient = torch.zeros_like(x) if slope is None else slope
    return Claim(
        held, response, x, y, gradient, state, after, path=slope is not None, warned=tuple(dict.fromkeys(told))
    )


def _answer(held: LeaderFollowerLosses, response: Response, x: Tensor, state: State) -> tuple[Variables, State]:
    others = {**held.others, held.leader: held.game.structure(held.leader).unflatten(x)}
    answer, after = response(held.game, others, state, held.batches.get(held.follower))
    require_answer(held.game, held.follower, answer, f"check_hypergradient: {type(response).__name__}")
    return answer, after


@dataclass(frozen=True, eq=False)
class Evidence:
    """A claim, and what was found of it.

    `directions: [k, n]` are orthonormal rows; the square of what is seen along row i stands for `weights: [k]` times as
    much in the whole gradient. `claimed: [k]` and `slopes` are the claimed and the true slopes along them. `follower`
    is None when the true values are the response's own, for a leader that tunes the inner optimiser. `repeatable`
    says whether the losses give the same twice.
    """

    claim: Claim
    follower: ResolvedFollower | None
    names: tuple[str, ...]
    directions: Tensor
    weights: Tensor
    claimed: Tensor
    slopes: tuple[Slope, ...]
    rtol: float
    atol: float
    repeatable: bool

    @property
    def true(self) -> Tensor:
        """The differences' slopes `[k]`, float64."""
        return torch.tensor([slope.value for slope in self.slopes], dtype=torch.float64)

    @property
    def errors(self) -> Tensor:
        """How far those may be off, `[k]`."""
        return torch.tensor([slope.error for slope in self.slopes], dtype=torch.float64)

    def size(self, slopes: Tensor) -> float:
        """The norm of a whole gradient, from its slopes `[k]`."""
        return float((self.weights * slopes.square()).sum().sqrt())

    @property
    def scale(self) -> float:
        """The size that errors are relative to: the larger of the true and the claimed gradient's."""
        sizes = [self.size(self.true), self.size(self.claimed)]
        return max([size for size in sizes if math.isfinite(size)], default=math.nan)

    def judged(self) -> tuple[Verdict, float, float, float]:
        """The verdict, and the error, its uncertainty and what is tolerated, all in units of the gradient's size."""
        if self.claim.raised:
            return Verdict.CANNOT_TELL, math.nan, math.nan, self.rtol
        if not bool(torch.isfinite(self.claim.gradient).all()):
            return Verdict.WRONG, math.inf, 0.0, self.rtol
        apart, doubt, scale = self.size(self.claimed - self.true), self.size(self.errors), self.scale
        known = math.isfinite(apart) and math.isfinite(doubt)
        allowed = self.rtol * scale + self.atol
        # Where the gradient all but vanishes, `atol` is what counts.
        unit = max(scale, self.atol / self.rtol) or 1.0
        told = (apart / unit if known else math.nan, doubt / unit if known else math.inf, allowed / unit)
        settled = self.repeatable and (self.follower is None or self.follower.sound)
        if known and settled and apart + doubt <= allowed:
            return Verdict.RIGHT, *told
        if known and settled and apart - doubt > allowed:
            return Verdict.WRONG, *told
        return Verdict.CANNOT_TELL, *told


def gathered(claim: Claim, *, count: int, rtol: float, atol: float, seed: int) -> Evidence:
    """Solve the follower anew and take the slopes along `count` directions."""
    held, x = claim.held, claim.x
    tunes_optimizer = held.game.players[held.leader].optimizer_hyper
    names, directions, weights = _directions(claim.gradient, count, seed)
    finite = bool(torch.isfinite(claim.gradient).all())
    along = directions.double() @ torch.where(torch.isfinite(claim.gradient), claim.gradient, 0.0).double()
    follower = None if tunes_optimizer else ResolvedFollower(held, x, claim.y, rtol=rtol, seed=seed)
    repeatable = _same(held.value(x, claim.y), held.value(x, claim.y)) and _same(
        held.slope(x, claim.y)[0], held.slope(x, claim.y)[0]
    )
    slopes: list[Slope] = []
    scale = float(x.double().square().mean().sqrt()) or 1.0
    largest = float(along.abs().max()) if finite else 0.0
    sound = repeatable and not claim.raised and (follower is None or follower.at_rest)
    for row, weight in zip(directions, weights.tolist(), strict=True):
        if not sound:
            break
        # An error along a direction that stands for many others counts as many times.
        share = 0.2 * rtol / math.sqrt(weight * len(weights))
        goal, step = share * largest, 0.1 * scale / float(row.abs().max())
        slope = (
            own_slope(claim, row, step, goal, share)
            if follower is None
            else follower.along(row, step=step, goal=goal, relative=share)
        )
        slopes.append(slope)
        if math.isfinite(slope.value):
            largest = max(largest, abs(slope.value))
    kept = len(slopes)
    return Evidence(
        claim,
        follower,
        names[:kept],
        directions[:kept],
        weights[:kept],
        along[:kept],
        tuple(slopes),
        rtol,
        atol,
        repeatable,
    )


def _same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


def own_slope(claim: Claim, direction: Tensor, step: float, goal: float, relative: float) -> Slope:
    """The slope of the leader's loss at the response's own answers along `direction: [n]`."""
    here = claim.own_value(claim.x)
    return slope_at_zero(
        lambda s: claim.own_value(claim.x + s * direction),
        here,
        step=step,
        noise=4 * torch.finfo(claim.x.dtype).eps * abs(here),
        goal=goal,
        relative=relative,
        levels=4,
    )


def _directions(gradient: Tensor, count: int, seed: int) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Orthonormal rows `[k, n]`, the first along the claimed gradient where there is one, their names and weights."""
    n = gradient.numel()
    generator = torch.Generator().manual_seed(seed)
    size = float(gradient.double().norm())
    aligned = math.isfinite(size) and size > 0.0
    rows = [gradient.double() / size] if aligned else []
    count = min(count, n)
    while len(rows) < count:
        row = torch.randn(n, generator=generator, dtype=torch.float64).to(gradient.device)
        for _ in range(2):  # twice is enough
            for other in rows:
                row = row - (other @ row) * other
        rows.append(row / row.norm())
    names = [f"random {i}" for i in range(1, count + 1)]
    weights = [n / count] * count
    if aligned:
        names = ["the claimed gradient's", *names[: count - 1]]
        weights = [1.0, *[(n - 1) / max(count - 1, 1)] * (count - 1)]
    return tuple(names), torch.stack(rows).to(gradient), torch.tensor(weights, dtype=torch.float64)
