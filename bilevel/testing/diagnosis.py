"""What to say of a check: what is in the way, or at fault; one line a finding, the gravest first."""

from __future__ import annotations

import math

import torch

from bilevel.testing.evidence import Evidence, Verdict
from bilevel.testing.faults import at_fault, factors, of_the_losses, own_derivative, pattern
from bilevel.testing.obstacles import in_the_way


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
        told += [*of_the_losses(evidence), *in_the_way(evidence)]
    else:
        told += of_the_losses(evidence)
        patterns = pattern(evidence)
        told += patterns + own_derivative(evidence) + at_fault(evidence)
        told += [] if patterns else factors(evidence)
    told += [f"It warned: {_first_sentence(text)}" for text in claim.warned]
    return tuple(told)


def _first_sentence(text: str) -> str:
    return text.split(". ", maxsplit=1)[0].rstrip(".") + "."
