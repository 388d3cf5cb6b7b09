"""Restarts from the true residual: what the Krylov solvers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.linear.system import Candidate, LinearSystem

# From a residual [n], its norm, the norm to bring it to and the most steps: a correction [n] and the steps it took.
Correction = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, int]]


def default_steps(unknowns: int) -> int:
    """Twice the n steps of exact arithmetic, for rounding; at least 20, and 1000 as a guard on the bill."""
    return min(max(2 * unknowns, 20), 1000)


def refine(
    system: LinearSystem,
    correct: Correction,
    *,
    max_steps: int,
    stalled: float,
    enough: Callable[[], bool] = lambda: False,
) -> Candidate:
    """Correct until the residual, computed anew from the solution, is within the system's tolerance.

    Ends early when a correction leaves more than `stalled` of the residual: a tolerance below what the dtype can
    resolve costs one or two of them in vain, not `max_steps`. Ends as well when `enough` says so after a correction.
    """
    # A recurrence goes on shrinking below what rounding lets the true residual reach.
    target = torch.maximum(system.tolerance, torch.finfo(system.rhs.dtype).eps * system.rhs_norm)
    best = system.start()
    steps = 0
    while steps < max_steps and concrete(best.residual_norm > target):
        correction, taken = correct(best.residual, best.residual_norm, target, max_steps - steps)
        from_zero = not steps and system.initial is None
        found = system.measure(correction if from_zero else best.solution + correction)
        left, before = found.residual_norm, best.residual_norm
        # The first is the method's own answer, whatever its residual; a later one must improve on it.
        accepted = (before > target) & ((left < before) if steps else torch.ones_like(left, dtype=torch.bool))
        # Written so that a NaN is accepted, and reported by whoever judges the residual.
        accepted = accepted | ~torch.isfinite(left)
        helped = concrete((before > target) & (left < stalled * before))
        if transforms_active():
            best = system.with_residual(
                torch.where(accepted, found.solution, best.solution),
                torch.where(accepted, found.residual, best.residual),
                torch.where(accepted, left, before),
            )
        elif concrete(accepted):  # one system: nothing to mix, and vectors can be long
            best = found
        steps += taken
        if not helped or enough():
            break
    return best
