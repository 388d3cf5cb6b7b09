"""Why a hypergradient cannot be judged: no minimum, a kink, noise; one line a finding, with the way out."""

from __future__ import annotations

import math

import torch

from bilevel.testing.evidence import Evidence
from bilevel.testing.resolved import ResolvedFollower


def in_the_way(evidence: Evidence) -> list[str]:
    """What keeps the check from a verdict, the gravest first."""
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


def _not_a_minimum(evidence: Evidence, follower: ResolvedFollower) -> list[str]:
    name, rest = evidence.claim.held.follower, follower.rest
    least, largest = follower.curvature
    if not rest.finite:
        return [f"The loss of player {name!r} or its gradient is not finite at the response's answer."]
    away = float(rest.y.norm()) / (float(evidence.claim.y.norm()) + 1.0)
    if not follower.at_rest:
        if follower.constrained:
            return [
                "The follower does not come to rest within its constraints: Newton's method on its KKT system, from "
                "the response's answer, finds no optimum. Its constraints may contradict each other, or its loss fall "
                "for ever."
            ]
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


def _kinked(evidence: Evidence, follower: ResolvedFollower) -> bool:
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
