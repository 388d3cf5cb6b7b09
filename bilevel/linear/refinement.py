"""Restarts from the true residual: what the Krylov solvers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.linear.base import LinearOperator, norm

# From a residual [n], its norm, the norm to bring it to and the most steps: a correction [n] and the steps it took.
Correction = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, int]]


def default_steps(unknowns: int) -> int:
    """Twice the n steps of exact arithmetic, for rounding; at least 20, and 1000 as a guard on the bill."""
    return min(max(2 * unknowns, 20), 1000)


def refine(
    operator: LinearOperator,
    rhs: Tensor,
    whole: Tensor,
    initial: Tensor | None,
    correct: Correction,
    tolerance: Tensor,
    max_steps: int,
    stalled: float,
    enough: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor, int]:
    """Correct until the residual, computed anew from the solution, is within `tolerance`.

    `whole` is |rhs|. Returns the solution `[n]`, its residual's norm, and how many products were taken. Ends early when
    a correction leaves more than `stalled` of the residual: a tolerance below what the dtype can resolve costs one or
    two of them in vain, not `max_steps`. Ends as well when `enough` says so after a correction.
    """
    # A recurrence goes on shrinking below what rounding lets the true residual reach.
    target = torch.maximum(tolerance, torch.finfo(rhs.dtype).eps * whole)
    solution = initial
    residual = rhs if initial is None else rhs - operator.matvec(initial)
    products = 0 if initial is None else 1
    size = whole if initial is None else norm(residual)
    steps = 0
    while steps < max_steps and concrete(size > target):
        correction, taken = correct(residual, size, target, max_steps - steps)
        candidate = correction if solution is None else solution + correction
        remaining = operator.residual(rhs, candidate)
        products += taken + 1
        remaining_size = norm(remaining)
        # The first is the method's own answer, whatever its residual; a later one must improve on it.
        accepted = (size > target) & ((remaining_size < size) if steps else torch.ones_like(size, dtype=torch.bool))
        # Written so that a NaN is accepted, and reported by whoever judges the residual.
        accepted = accepted | ~torch.isfinite(remaining_size)
        helped = concrete((size > target) & (remaining_size < stalled * size))
        if not transforms_active():  # one system: nothing to mix, and vectors can be long
            if concrete(accepted):
                solution, residual, size = candidate, remaining, remaining_size
        else:
            solution = torch.where(accepted, candidate, 0.0 if solution is None else solution)
            residual = torch.where(accepted, remaining, residual)
            size = torch.where(accepted, remaining_size, size)
        steps += taken
        if not helped or enough():
            break
    return torch.zeros_like(rhs) if solution is None else solution, size, products
