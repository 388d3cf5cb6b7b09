"""Projected and proximal gradient steps, accelerated, with a step that is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError, require_kinds
from bilevel.inner.base import InnerSolver, Problem

_MOST_GROWTH = 1e3
"""By how much the largest curvature grows in one step at most."""

_KEPT = 0.8
"""The share of the largest curvature that the next call starts with, where this call's steps saw a smaller one."""


@final
@dataclass(frozen=True)
class ProjectedGradient(InnerSolver):
    r"""The optimum within the player's domain, or of its loss with its proximal term, by projected gradient steps.

    $$
    y_{k+1} = P_s\big(v_k - s\, \nabla f(v_k)\big), \qquad
    v_{k+1} = P\big(y_{k+1} + \beta_k (y_{k+1} - y_k)\big), \qquad s = 1 / L
    $$

    L is the largest curvature that was seen, between one point and the next: it starts from the one measured at the
    start of the game, grows as steps show more, and is remembered from call to call. Momentum starts again from 0 where
    it points uphill, so that a strongly convex loss is solved at a linear rate without its constant being known.

    Of many games (`Games`) each has its own step, momentum and end. A batch is held through a call. A player without a
    domain may use it as well: then it is accelerated gradient descent.

    Costs one gradient and a projection or two a step. Converges for convex losses; for others to a point where the
    residual vanishes. Source: Beck & Teboulle 2009, SIAM J. Imaging Sci. 2(1); O'Donoghue & Candès 2015
    (arXiv 1204.3982), for the restarts.

    Args:
        accelerate: Whether there is momentum; without it every step lowers a convex loss.

    Raises:
        NonFiniteError: Where the loss or its gradient is NaN or infinite within the domain.

    Examples:
        >>> ProjectedGradient().accelerate
        True
    """

    accelerate: bool = True

    def __post_init__(self) -> None:
        require_kinds(self)

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The leaves after at most `steps` steps, and the largest curvature that was seen."""
        one = [leaf.detach().unsqueeze(0) for leaf in y]

        def field(leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            loss, slopes = problem.field([leaf.squeeze(0) for leaf in leaves])
            return loss, [slope.unsqueeze(0) for slope in slopes]

        def at_rest(leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
            found = problem.at_rest([leaf.squeeze(0) for leaf in leaves], [slope.squeeze(0) for slope in slopes])
            return [part.unsqueeze(0) for part in found]

        def settled(leaves: Sequence[Tensor], step: Tensor) -> list[Tensor]:
            found = problem.settled([leaf.squeeze(0) for leaf in leaves], step.squeeze(0))
            return [part.unsqueeze(0) for part in found]

        found, seen = descend(
            Rows(problem, field, at_rest, settled), one, memory, steps, torch.tensor([threshold]), self.accelerate
        )
        return [leaf.squeeze(0) for leaf in found], seen


@dataclass(frozen=True, eq=False)
class Rows:
    """A problem whose leaves are `[count, ...]`, with one problem in each row."""

    problem: Problem
    field: Callable[[Sequence[Tensor]], tuple[Tensor, list[Tensor]]]
    at_rest: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
    settled: Callable[[Sequence[Tensor], Tensor], list[Tensor]]


@torch.no_grad()
def descend(
    rows: Rows,
    y: list[Tensor],
    memory: Any,
    steps: int,
    threshold: Tensor,
    accelerate: bool,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Where the steps end in each row, and the largest curvature that each has seen."""
    problem, count = rows.problem, len(y[0])
    like = y[0].new_ones(count)
    threshold = threshold.to(like)
    if memory is not None:
        seen = memory["curvature"].to(like).expand(count).clone()
    elif problem.rests.needs_scale:
        seen = like / problem.rests.step  # the inverse of the largest curvature at the start
    else:
        seen = _probed(rows, y)
    feasible = problem.rests.any_step  # a domain is kept by what momentum extrapolates as well
    here = rows.settled(y, 1.0 / seen) if feasible else [leaf.clone() for leaf in y]
    v, last = here, here
    before: tuple[list[Tensor], list[Tensor]] | None = None
    momentum, witnessed = torch.ones_like(like), torch.zeros_like(like)
    moving = torch.ones_like(like, dtype=torch.bool)
    for step in range(steps + 1):
        loss, slopes = rows.field(v)
        left = _norms(rows.at_rest(v, slopes))
        if not bool(torch.isfinite(left).all()) or not bool(torch.isfinite(loss).all()):
            raise NonFiniteError(
                f"Player {problem.name!r}: its loss or its gradient became NaN or infinite after {step} of {steps} "
                "projected steps. Start elsewhere, or keep the player where its loss is finite by a smaller domain."
            )
        moving = moving & ~(left <= threshold)
        if step == steps or not bool(moving.any()):
            break
        if before is not None:
            moved = [a - b for a, b in zip(v, before[0], strict=True)]
            bent = [a - b for a, b in zip(slopes, before[1], strict=True)]
            square = _dots(moved, moved)
            curved = torch.where(square > 0.0, _dots(bent, bent) / torch.where(square > 0.0, square, 1.0), 0.0).sqrt()
            # Below its rounding a difference says nothing of the curvature.
            told = square.sqrt() > 1e3 * torch.finfo(like.dtype).eps * (1.0 + _norms(v))
            witnessed = torch.where(told, torch.maximum(curved, witnessed), witnessed)
            steeper = told & (curved > seen)
            seen = torch.where(steeper, curved.clamp(max=_MOST_GROWTH * seen), seen)
            momentum = torch.where(steeper, 1.0, momentum)
        before = (v, slopes)
        s = 1.0 / seen
        ahead = rows.settled([a - _spread(s, a) * b for a, b in zip(v, slopes, strict=True)], s)
        if accelerate:
            # Uphill: the way from v to the new point goes against the way from the last point to it.
            back = _dots(
                [a - b for a, b in zip(v, ahead, strict=True)], [a - b for a, b in zip(ahead, last, strict=True)]
            )
            momentum = torch.where(back > 0.0, 1.0, momentum)
            grown = 0.5 * (1.0 + (1.0 + 4.0 * momentum.square()).sqrt())
            beta = (momentum - 1.0) / grown
            momentum = grown
            further = [a + _spread(beta, a) * (a - b) for a, b in zip(ahead, last, strict=True)]
            further = rows.settled(further, s) if feasible and problem.rests.projects else further
        else:
            further = ahead
        last = _chosen(moving, ahead, last)
        v = _chosen(moving, further, v)
    # One step more without momentum, for which the gradient is known: entries that a wall holds lie on it exactly.
    s = 1.0 / seen
    end = rows.settled([a - _spread(s, a) * b for a, b in zip(v, slopes, strict=True)], s)
    # A flatter loss is noticed in time, and only by steps that saw it: calls that find y at rest tell nothing.
    kept = torch.where(witnessed > 0.0, torch.maximum(witnessed, _KEPT * seen), seen)
    return end, {"curvature": kept}


def _probed(rows: Rows, y: list[Tensor]) -> Tensor:
    """The curvature along the gradient at y in each row."""
    _, slopes = rows.field(y)
    size = _norms(slopes)
    length = torch.finfo(size.dtype).eps ** 0.5 * (1.0 + _norms(y))
    # Who stands at an optimum has no gradient to look along: then along all entries alike.
    alike = size.new_tensor(sum(leaf[0].numel() for leaf in y)).rsqrt()
    unit = [
        torch.where(_spread(size, slope) > 0.0, slope / _spread(torch.where(size > 0.0, size, 1.0), slope), alike)
        for slope in slopes
    ]
    _, there = rows.field([leaf - _spread(length, leaf) * part for leaf, part in zip(y, unit, strict=True)])
    found = _norms([a - b for a, b in zip(there, slopes, strict=True)]) / length
    return torch.where(found > 0.0, found, 1.0)


def _spread(values: Tensor, leaf: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (leaf.ndim - 1))


def _dots(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The inner product in each row `[count]`."""
    parts = [(a * b).reshape(len(a), -1).sum(1) for a, b in zip(some, others, strict=True)]
    return torch.stack(parts).sum(0)


def _norms(leaves: Sequence[Tensor]) -> Tensor:
    return _dots(leaves, leaves).sqrt()


def _chosen(moving: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
    return [torch.where(_spread(moving, a), a, b) for a, b in zip(new, old, strict=True)]
