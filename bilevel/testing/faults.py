"""Why a hypergradient is wrong: left out, turned round, not solved; one line a finding, with the way out."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bilevel.autodiff import pullback
from bilevel.errors import BilevelError, BilevelWarning
from bilevel.linear import ConjugateGradient, LinearOperator
from bilevel.testing.evidence import Evidence, own_slope
from bilevel.testing.finite_differences import slope_at_zero


def of_the_losses(evidence: Evidence) -> list[str]:
    """Whether autograd differentiates the losses themselves rightly, in both players' variables."""
    claim = evidence.claim
    held, x = claim.held, claim.x
    generator = torch.Generator().manual_seed(0)
    # Beside the answer: at an optimum a wrong derivative may be zero like the right one.
    noise = torch.randn(claim.y.numel(), generator=generator, dtype=torch.float64).to(claim.y)
    y = claim.y + 0.1 * (float(claim.y.norm()) or 1.0) * noise / noise.norm()
    told = []
    for player in (held.leader, held.follower):
        for name, point in ((held.leader, x), (held.follower, y)):
            if name not in held.game.arguments(player):
                continue
            leaf = point.clone().requires_grad_()
            at = (leaf, y) if name == held.leader else (x, leaf)
            loss = held.loss(player, *at)
            slope = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
            slope = torch.zeros_like(leaf) if slope is None else slope
            noise = torch.randn(leaf.numel(), generator=generator, dtype=torch.float64).to(leaf)
            # Where the gradient has most to say, and elsewhere.
            direction = noise / noise.norm()
            if float(slope.norm()) > 0.0:
                direction = direction * (1.0 if float(slope @ direction) >= 0.0 else -1.0) + slope / slope.norm()
            direction = direction / direction.norm()
            true = _loss_slope(evidence, y, player, name == held.leader, direction)
            wanted = float(slope @ direction)
            if abs(true[0] - wanted) > 0.02 * max(abs(true[0]), abs(wanted)) + 3 * true[1]:
                told.append(
                    f"The loss of player {player!r} itself is differentiated wrongly in {name!r}: autograd says "
                    f"{wanted:.4g} along a direction, differences of its values {true[0]:.4g}. Look for .detach(), "
                    ".item(), .data, no_grad or a rounding in it."
                )
    return told


def _loss_slope(evidence: Evidence, y: Tensor, player: str, first: bool, direction: Tensor) -> tuple[float, float]:
    held, x = evidence.claim.held, evidence.claim.x

    def value(s: float) -> float:
        with torch.no_grad():
            moved = (x + s * direction, y) if first else (x, y + s * direction)
            return float(held.loss(player, *moved))

    here = value(0.0)
    size = float((x if first else y).double().square().mean().sqrt()) or 1.0
    found = slope_at_zero(
        value,
        here,
        step=0.1 * size / float(direction.abs().max()),
        noise=4 * torch.finfo(x.dtype).eps * abs(here),
        goal=0.0,
        relative=1e-3,
    )
    return found.value, max(found.error, 1e3 * torch.finfo(x.dtype).eps * abs(here))


def pattern(evidence: Evidence) -> list[str]:
    """What was left out or turned round, by comparing the claim with the truth's two terms."""
    claim, true, claimed = evidence.claim, evidence.true, evidence.claimed
    if not claim.path:
        return [
            "No path leads from the leader's loss through the response to the leader: the answer is detached. Return "
            "variables that depend on `others` (no .detach(), .data, no_grad or fresh leaves)."
        ]
    x, y = claim.x, claim.y
    direct = evidence.directions.double() @ _direct(evidence, x, y).double()
    implicit = true - direct
    # It has to explain the error itself, which may be small beside the gradient.
    explained = min(0.1 * evidence.size(claimed - true), 2 * evidence.rtol * evidence.size(true))
    tolerated = explained + evidence.size(evidence.errors)

    def is_like(other: Tensor) -> bool:
        return evidence.size(claimed - other) <= tolerated

    two_terms = evidence.size(direct) > tolerated
    if is_like(torch.zeros_like(true)):
        return ["The hypergradient is zero, and should not be: the response's answer carries no derivative."]
    if is_like(-true):
        return ["It is minus the truth: a sign is flipped (a loss to maximise? -H^-1 without its minus?)."]
    if two_terms and is_like(direct):
        return [
            "It is the direct term alone, the leader's loss differentiated with the follower held: the implicit term "
            "is dropped. The response's answer is detached, or its linear solver returns zero."
        ]
    if two_terms and is_like(implicit):
        return [
            "It is the implicit term alone: the direct term, the leader's loss differentiated with the follower held, "
            "is missing. Does the response return the variables of a leader that was detached?"
        ]
    if two_terms and is_like(direct - implicit):
        return ["Its implicit term has the wrong sign: -H^-1 without its minus, or a follower that maximises."]
    return []


def factors(evidence: Evidence) -> list[str]:
    """A factor that explains the claim along all directions, and terms that cancel."""
    claim, true, claimed = evidence.claim, evidence.true, evidence.claimed
    if not claim.path:
        return []
    direct = evidence.directions.double() @ _direct(evidence, claim.x, claim.y).double()
    implicit = true - direct
    factor, share = _factor(evidence, claimed, true), _factor(evidence, claimed - direct, implicit)
    apart, doubt = evidence.size(claimed - true), evidence.size(evidence.errors)
    told: list[str] = []
    for words, rest, part in (
        (f"It is {factor:.4g} times the truth", claimed, factor * true),
        (
            f"Its direct term is right and its implicit term {share:.4g} times the true one",
            claimed - direct,
            share * implicit,
        ),
    ):
        # A factor can always be fitted; it says something where it explains nearly all that is wrong.
        if not told and evidence.size(rest - part) <= 0.03 * min(apart, evidence.size(part)) + doubt:
            told.append(words + (", along its one direction." if len(true) == 1 else ", along every direction."))
    if evidence.size(true) < 0.05 * min(evidence.size(direct), evidence.size(implicit)):
        told.append(
            "The direct and the implicit term all but cancel here, so that small errors of either are large ones of "
            "their sum. Check away from the leader's optimum, or give atol=."
        )
    return told


def _direct(evidence: Evidence, x: Tensor, y: Tensor) -> Tensor:
    """The leader's loss differentiated in x `[n]` alone."""
    held = evidence.claim.held
    leaf = x.clone().requires_grad_()
    loss = held.loss(held.leader, leaf, y)
    slope = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(x) if slope is None else slope


def _factor(evidence: Evidence, claimed: Tensor, true: Tensor) -> float:
    """The a of least |claimed - a true|."""
    size = float((evidence.weights * true * true).sum())
    return float((evidence.weights * claimed * true).sum()) / size if size > 0.0 else 0.0


def own_derivative(evidence: Evidence) -> list[str]:
    """Whether it is the exact derivative of what the response computes, which then is not the optimum."""
    claim = evidence.claim
    if evidence.follower is None or not claim.path:
        return []
    step = 0.1 * (float(claim.x.double().square().mean().sqrt()) or 1.0)
    allowed = evidence.rtol * evidence.scale + evidence.atol
    apart = unsure = 0.0
    for row, weight, wanted in zip(evidence.directions, evidence.weights.tolist(), evidence.claimed, strict=True):
        goal = 0.3 * allowed / math.sqrt(weight * len(evidence.weights))
        slope = own_slope(claim, row, step / float(row.abs().max()), goal, 0.0)
        apart += weight * (float(wanted) - slope.value) ** 2
        unsure += weight * slope.error**2
        # Each value costs a call of the response: no more of them than it takes to see that it is not.
        if not math.sqrt(apart) + math.sqrt(unsure) <= allowed:
            return []
    return [
        "It is the exact derivative of what the response computes, but the response's answer is not the follower's "
        "optimum. More steps, a better inner optimiser, or settle= calls of a warm-started response bring it there; "
        "if so many steps are what you mean, it is right for them."
    ]


def at_fault(evidence: Evidence) -> list[str]:
    """How far the answer is from the optimum, and what its slope is worth."""
    claim, follower = evidence.claim, evidence.follower
    if follower is None or not claim.path:
        return []
    held, x, y = claim.held, claim.x, claim.y
    distance = float((y - follower.rest.y).norm()) / (float(follower.rest.y.norm()) or 1.0)
    if follower.constrained:
        if distance <= evidence.rtol:
            return [
                f"The answer is good enough (it is {distance:.1g} of |y| from the optimum re-solved within the "
                "constraints); its derivative is at fault. Constraints that bind move the answer, and hold it: a "
                "derivative of the loss alone does not see them."
            ]
        return [
            f"The answer is at fault: it is {distance:.1g} of |y| from the optimum re-solved within the constraints."
        ]
    left = float(held.slope(x, y)[1].norm()) / (follower.reference or 1.0)
    where = f"its answer is {distance:.1g} of |y| from the re-solved optimum, its |gradient| {left:.1g} of the start's"
    told = []
    exact = _implicit(evidence, x, y)
    if exact is None:
        told.append(f"The answer is at fault: {where}, and the curvature there is not positive.")
    else:
        error = _error_of(evidence, exact)
        at_rest = _implicit(evidence, x, follower.rest.y)
        doubt = evidence.rtol + evidence.size(evidence.errors) / evidence.scale
        if error <= doubt:
            told.append(f"The answer is good enough ({where}); its derivative is at fault.")
        elif at_rest is not None and _error_of(evidence, at_rest) > doubt:
            told.append(
                "Even at the re-solved optimum the implicit-function theorem gives another hypergradient: autograd "
                "does not see all of how the losses depend on the leader. Look for .detach(), .item() or no_grad."
            )
        else:
            told.append(
                f"The answer is at fault: {where}. Differentiated exactly there by the implicit-function theorem, the "
                f"hypergradient would still be off by {error:.2g}."
            )
    return told + _by_its_own_account(evidence)


def _by_its_own_account(evidence: Evidence) -> list[str]:
    """What the response promises and reports of its derivative."""
    response = evidence.claim.response
    stated, reported = response.promise.stated_bias, response.report(evidence.claim.after).residual
    residual = math.nan if reported is None else float(reported)
    if stated > 0.0:
        return [f"The response states a bias of {stated:.2g} of the derivative's size, and promises no more."]
    if math.isnan(residual):
        return []
    if math.isnan(stated):
        return [
            f"Its learned slope leaves {residual:.2g} of what it should answer (0 is exact): warmup=, settle= "
            "calls, more steps or perturbations, a lower learning rate."
        ]
    if residual > 0.1 * evidence.rtol:
        return [
            f"Its linear solve left a relative residual of {residual:.2g}: more max_steps, a smaller "
            "rtol, no damping, a preconditioner, or ConjugateGradient() in place of a cheap approximation."
        ]
    return []


def _implicit(evidence: Evidence, x: Tensor, y: Tensor) -> Tensor | None:
    """The hypergradient `[n]` by the implicit-function theorem at (x, y); None where the curvature is not positive."""
    held = evidence.claim.held
    leaf = y.clone().requires_grad_()
    loss = held.loss(held.leader, x, leaf)
    rhs = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    direct = _direct(evidence, x, y)
    if rhs is None:
        return direct
    _, products = pullback(held.residual, y, x)
    solver = ConjugateGradient(rtol=0.01 * evidence.rtol, max_steps=min(2000, 10 * y.numel()))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)
            adjoint = solver.solve(LinearOperator(lambda v: products(v)[0], symmetric=True), rhs).solution
            return direct - products(adjoint)[1]
    except BilevelError:
        return None


def _error_of(evidence: Evidence, gradient: Tensor) -> float:
    """How far a gradient `[n]` is from the true one, relatively."""
    return evidence.size(evidence.directions.double() @ gradient.double() - evidence.true) / evidence.scale
