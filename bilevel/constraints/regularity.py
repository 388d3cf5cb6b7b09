"""Whether a constrained optimum moves smoothly with the leader: feasible, independent constraints, curvature, no kink.

A derivative exists and is the KKT system's where the gradients of the constraints that bind are linearly independent,
the Lagrangian curves upwards along them, and every binding constraint has a multiplier above 0 (Robinson 1980;
Fiacco 1983). What fails is told by the constraint's name, with the way out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.constraints.active_set import KKTPoint, lengths, reached
from bilevel.constraints.functions import Constrained, Labels
from bilevel.errors import CurvatureError, DependentConstraintsError, InfeasibleError, UnboundedError

_FAR = 1e8
_TOLD = 4


@dataclass(frozen=True, eq=False)
class Kink:
    """Where constraints are about to bind or to let go: the optimum's derivative is another on either side.

    `story` names them, with their multipliers and slacks; `l` `[m]` has the multipliers of the other side, which are 0,
    or so small that nothing but their being above 0 counts.
    """

    story: str
    l: Tensor


def require_feasible(point: KKTPoint, labels: Labels, epsilon: float) -> None:
    """Raise `InfeasibleError` for an answer outside its constraints, or `UnboundedError` where it ran away."""
    broken = point.violations
    if float(point.y.abs().max()) > _FAR and not reached(point, epsilon):
        raise UnboundedError(
            f"Player {labels.player!r}: its inner solver went to |y| = {float(point.y.abs().max()):.1g}: its loss "
            "falls without bound within its constraints. Add the missing constraint, or a term that holds it back."
        )
    # An inner solver's own tolerance; what Newton's method has finished is far below.
    if not len(broken) or float(broken.max()) <= max(1e-6, epsilon**0.5):
        return
    values = torch.cat([point.at.c, point.at.e])
    worst = sorted(range(len(broken)), key=lambda i: -float(broken[i]))
    told = [
        f"{labels.all[i]} is {float(values[i]):.4g}, wanted {'<= 0' if i < len(point.at.c) else '= 0'}"
        for i in worst[:_TOLD]
        if float(broken[i]) > 0.1 * float(broken.max())
    ]
    raise InfeasibleError(
        f"Player {labels.player!r}: its inner solver found no answer within the constraints; where it stopped "
        f"{'; '.join(told)}. Either they contradict each other for these leaders: loosen them, or keep the leaders "
        "where they do not. Or the solver was stuck: start it from another init, or give it more steps."
    )


def require_regular(programme: Constrained, point: KKTPoint) -> None:
    """Raise where the optimum has no derivative, not even a one-sided one; `point` is one that was `reached`."""
    labels, epsilon = programme.labels, programme.epsilon
    near = point.binding | weak(point, epsilon)
    _require_independent(point, near, labels, epsilon)
    if point.hessian is not None and (flat := _flatness(point, point.hessian, epsilon)) is not None:
        _refuse_vanishing(programme, point, point.hessian)
        raise CurvatureError(_curvature_in_words(flat, labels))


def weak(point: KKTPoint, epsilon: float) -> Tensor:
    """Which inequalities `[m]` are about to bind or to let go: no slack and no multiplier, to about half the digits."""
    small = epsilon**0.45
    about: Tensor = (point.distances.abs() <= small) & (point.pushes <= small)
    return about


def kink(point: KKTPoint, labels: Labels, epsilon: float) -> Kink | None:
    """The kink that an optimum is at, if it is at one."""
    about = weak(point, epsilon)
    if not bool(about.any()):
        return None
    tiny = torch.finfo(torch.float32).tiny
    told = [
        f"{labels.inequality[i]} (multiplier {float(point.l[i]):.1g}, slack {max(0.0, -float(point.at.c[i])):.1g})"
        for i in about.nonzero().flatten().tolist()[:_TOLD]
    ]
    more = int(about.sum()) - len(told)
    turned = torch.where(point.binding, 0.0, tiny).to(point.l)
    return Kink(", ".join(told) + (f" and {more} more" if more > 0 else ""), torch.where(about, turned, point.l))


def _require_independent(point: KKTPoint, near: Tensor, labels: Labels, epsilon: float) -> None:
    rows = torch.cat([point.at.A[near], point.at.E])
    if not len(rows):
        return
    names = [labels.inequality[i] for i in near.nonzero().flatten().tolist()] + list(labels.equality)
    left, values, _ = torch.linalg.svd(rows / lengths(rows)[:, None], full_matrices=True)
    smallest = 0.0 if len(values) < len(rows) else float(values[-1])
    if smallest > 10.0 * epsilon**0.5:
        return
    shares = left[:, -1].abs()
    guilty = [name for name, share in zip(names, shares.tolist(), strict=True) if share > 0.05 * float(shares.max())]
    raise DependentConstraintsError(_dependence_in_words(guilty, labels))


def _refuse_vanishing(programme: Constrained, point: KKTPoint, hessian: Tensor) -> None:
    """Raise where a constraint that binds has a gradient of 0 beside its own curvature: its multiplier is infinite."""
    m, p = len(point.l), len(point.m)
    for i in [*point.binding.nonzero().flatten().tolist(), *range(m, m + p)]:
        unit = torch.zeros(m + p, dtype=hessian.dtype)
        unit[i] = 1.0
        bare = programme.hessian(point.y, 0.0 * point.l, 0.0 * point.m)
        curved = float((programme.hessian(point.y, unit[:m], unit[m:]) - bare).norm()) * point.size
        if float(torch.cat([point.at.A, point.at.E])[i].norm()) < 1e-6 * curved:
            raise DependentConstraintsError(_dependence_in_words([programme.labels.all[i]], programme.labels))


def _dependence_in_words(guilty: list[str], labels: Labels) -> str:
    one = len(guilty) == 1
    return (
        f"Player {labels.player!r}: at its optimum {', '.join(guilty[:8])} {'binds' if one else 'bind'} and "
        f"{'its gradient is 0' if one else 'their gradients are linearly dependent'}, so that no multipliers, and no "
        "derivative, can be told from them. Drop what the others imply (one of two equal bounds, one of a closed set "
        "of balances), or write it so that its gradient does not vanish (g <= 0, not g ** 2 <= 0)."
    )


def curvatures(point: KKTPoint) -> tuple[float, float]:
    """The extreme eigenvalues of the Lagrangian's Hessian along the constraints that bind; (1, 1) where none is free.

    NaN where the Hessian is too large to be known.
    """
    if point.hessian is None:
        return math.nan, math.nan
    rows = torch.cat([point.at.A[point.binding], point.at.E])
    free = torch.eye(len(point.y), dtype=point.hessian.dtype)
    if len(rows):
        free = torch.linalg.svd(rows / lengths(rows)[:, None], full_matrices=True).Vh[len(rows) :].T
    if not free.shape[1]:
        return 1.0, 1.0
    values = torch.linalg.eigvalsh(free.T @ point.hessian @ free)
    return float(values[0]), float(values[-1])


def _flatness(point: KKTPoint, hessian: Tensor, epsilon: float) -> float | None:
    """The smallest eigenvalue along the constraints that bind, where it is not above 0 by more than rounding."""
    rounding = 100.0 * len(point.y) * epsilon * float(hessian.abs().max())
    if not int(torch.linalg.cholesky_ex(hessian - rounding * torch.eye(len(hessian), dtype=hessian.dtype)).info):
        return None  # curved upwards everywhere
    smallest, _ = curvatures(point)
    if smallest > rounding:
        return None
    return smallest if smallest < -rounding else 0.0


def _curvature_in_words(smallest: float, labels: Labels) -> str:
    if smallest < 0.0:
        return (
            f"Player {labels.player!r}: where its inner solver stopped the Lagrangian curves downwards along the "
            f"constraints that bind (smallest eigenvalue {smallest:.3g}): it is a saddle, or a maximum. Start it from "
            "another init, or use another method."
        )
    return (
        f"Player {labels.player!r}: its loss is flat along the constraints that bind (smallest eigenvalue 0): it has "
        "many optima, or one that jumps with the leader, and no derivative. Add a small strictly convex term to its "
        "loss, such as 1e-3 * y.square().sum()."
    )
