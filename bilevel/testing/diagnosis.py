"""Why a hypergradient is wrong, or cannot be judged: one line a finding, with the way out."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bilevel.autodiff import pullback
from bilevel.errors import BilevelError, BilevelWarning
from bilevel.linear import ConjugateGradient, LinearOperator
from bilevel.testing.evidence import Evidence, Follower, Verdict, own_slope
from bilevel.testing.finite_differences import slope_at_zero


def diagnosis(evidence: Evidence, verdict: Verdict) -> tuple[str, ...]:
    """The findings, the gravest first; a right hypergradient has none."""
    claim = evidence.claim
    if verdict is Verdict.RIGHT:
        return ()
    told = [f"The response raised {claim.raised}"] if claim.raised else []
    if not evidence.repeatable:
        told.append(
            "A loss gives another value when it is evaluated again: it draws random numbers that are not torch's, or "
            "keeps a state. Only torch's generators are held; draw from them, or fix the numbers in the batch."
        )
        return tuple(told)
    if not claim.raised and not bool(torch.isfinite(claim.gradient).all()):
        told.append("The hypergradient holds NaN or infinity.")
        if not math.isfinite(claim.held.slope(claim.x, claim.y)[0]):
            told.append(
                "So does the follower's loss at the response's answer: its inner solver left the loss's domain."
            )
    elif verdict is Verdict.CANNOT_TELL:
        told += [*_of_the_losses(evidence), *_in_the_way(evidence)]
    else:
        told += _of_the_losses(evidence)
        patterns = _pattern(evidence)
        told += patterns + _own_derivative(evidence) + _at_fault(evidence)
        told += [] if patterns else _factors(evidence)
    told += [f"It warned: {_first_sentence(text)}" for text in claim.warned]
    return tuple(told)


# Why nothing can be said ---------------------------------------------------------------------------------------------


def _in_the_way(evidence: Evidence) -> list[str]:
    claim, follower = evidence.claim, evidence.follower
    if follower is not None:
        told = _not_a_minimum(evidence, follower)
        if told:
            return told
    if claim.raised or not evidence.slopes:
        return []
    told = []
    jumps = [slope.kink for slope in evidence.slopes if slope.kink > 0.1 * slope.error]
    noisy = evidence.size(torch.tensor([slope.noise for slope in evidence.slopes], dtype=torch.float64))
    doubt = evidence.size(evidence.errors)
    single = claim.x.dtype != torch.float64
    if follower is not None and follower.jumped:
        told.append(
            "However small the step, the follower re-solved beside this point lies far away: it hops to another "
            "minimum. The leader's loss jumps here and has no derivative; move the leader a little."
        )
    elif jumps:
        told.append(
            f"The leader's loss has a kink here: its slopes from the left and from the right differ by "
            f"{max(jumps):.2g}. There is no one derivative to compare with: move the leader a little, or smooth it."
        )
    elif not doubt < math.inf:
        told.append("The follower could not be solved anew close by, on both sides: no differences could be taken.")
    elif noisy > doubt / 3:
        spread = "" if follower is None else f" (re-solved values scatter by {follower.noise:.1g})"
        apart = follower is not None and follower.wander > 1e-3
        if apart:
            told.append(
                f"Noise: its minimum is so flat that other starts end elsewhere{spread}. Regularise it (a weight decay)"
                f"{', or play it in float64' if single else ''}."
            )
        else:
            told.append(
                f"Noise: the differences are no better than +- {doubt / (evidence.scale or 1.0):.1g} of the "
                f"gradient{spread}. "
                + ("Play it in float64. " if single else "")
                + "Or ask for less, by rtol= or atol=."
            )
    else:
        told.append(
            "The differences do not settle as the step shrinks: the leader's loss is not smooth close by (a kink or a "
            "jump beside this point), or bends within the smallest step. Move the leader a little."
        )
    return told


def _not_a_minimum(evidence: Evidence, follower: Follower) -> list[str]:
    name, rest = evidence.claim.held.follower, follower.rest
    least, largest = follower.curvature
    if not rest.finite:
        return [f"The loss of player {name!r} or its gradient is not finite at the response's answer."]
    away = float(rest.y.norm()) / (float(evidence.claim.y.norm()) + 1.0)
    if not follower.at_rest:
        how = f"The follower does not come to rest: its |gradient| stays {follower.stationarity:.1g} of the start's"
        if _kinked(evidence, follower):
            return [
                f"{how}, and turns round within a tiny step: its loss has a kink where it is least, as |w| has at 0. "
                "Its optimum obeys no gradient there; smooth the kink, or use a proximal or projected follower."
            ]
        if away > 30.0:
            return [f"{how}, and its variables have grown {away:.1g}-fold: it runs away. Its loss needs a minimum."]
        return [f"{how} after {rest.products:,} Hessian-vector products. Its problem may be too ill-conditioned."]
    if not follower.unique:
        return [
            f"Solved from other starts nearby the follower comes to rest elsewhere, and the leader's loss differs by "
            f"{follower.noise:.1g}: its minimum is not unique or very flat. There is no one answer to differentiate; "
            "regularise it (a weight decay)."
        ]
    if not follower.minimum:
        return [
            f"The follower comes to rest at no minimum: its curvature is down to {least:.2g} (largest {largest:.2g}). "
            "Differentiating through a saddle means nothing; train it further from another start, or regularise it."
        ]
    return []


def _kinked(evidence: Evidence, follower: Follower) -> bool:
    """Whether the gradient turns round within a step far too short for a smooth loss."""
    held, x, y = evidence.claim.held, evidence.claim.x, follower.rest.y
    slope = held.slope(x, y)[1]
    unit = slope / slope.norm()
    eps = torch.finfo(y.dtype).eps
    for share in (0.1 ** (k / 2) for k in range(8)):
        there = held.slope(x, y - share * eps**0.5 * max(1.0, float(y.norm())) * unit)[1]
        if float(there @ slope) < 0.0 and float(there.norm()) > 0.1 * float(slope.norm()):
            return True
    return False


# Why it is wrong -----------------------------------------------------------------------------------------------------


def _of_the_losses(evidence: Evidence) -> list[str]:
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


def _pattern(evidence: Evidence) -> list[str]:
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


def _factors(evidence: Evidence) -> list[str]:
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


def _own_derivative(evidence: Evidence) -> list[str]:
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


def _at_fault(evidence: Evidence) -> list[str]:
    """How far the answer is from the optimum, and what its slope is worth."""
    claim, follower = evidence.claim, evidence.follower
    if follower is None or not claim.path:
        return []
    held, x, y = claim.held, claim.x, claim.y
    distance = float((y - follower.rest.y).norm()) / (float(follower.rest.y.norm()) or 1.0)
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
    linear = claim.after.get("linear")
    if linear is not None and float(linear["residual"]) > 0.1 * evidence.rtol:
        told.append(
            f"Its linear solve left a relative residual of {float(linear['residual']):.2g}: more max_steps, a smaller "
            "rtol, no damping, a preconditioner, or ConjugateGradient() in place of a cheap approximation."
        )
    learned = claim.after.get("residual")
    if learned is not None:
        told.append(
            f"Its learned slope leaves {float(learned):.2g} of what it should answer (0 is exact): warmup=, settle= "
            "calls, more steps or perturbations, a lower learning rate."
        )
    return told


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


def _first_sentence(text: str) -> str:
    return text.split(". ", maxsplit=1)[0].rstrip(".") + "."
