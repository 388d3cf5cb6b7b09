r"""From a point near a constrained optimum to the optimum with its multipliers, to rounding.

Multipliers by non-negative least squares on the gradients of the constraints, then Newton's method on the KKT system
with the set of binding constraints corrected between its steps (a primal-dual active set, which is a semismooth Newton
method on \(\min(l, -c) = 0\)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.constraints.functions import Constrained, Linearised

DENSE = 2000
"""So many variables or fewer have their Hessian written down."""
_STEPS = 60
_PATIENCE = 5
_NEAR = 1e-5  # in units of y's size: how near a constraint must be to be thought to bind, before Newton's steps decide


@dataclass(frozen=True, eq=False)
class KKTPoint:
    """A point with its multipliers, and what was seen there.

    `y` `[n]`; `l` `[m]`, 0 where a constraint does not bind; `m` `[p]`; `slope` is the loss's gradient `[n]`; `hessian`
    the Lagrangian's, None where it is too large; `error` the largest relative miss of stationarity and feasibility.
    """

    y: Tensor
    l: Tensor
    m: Tensor
    slope: Tensor
    at: Linearised
    hessian: Tensor | None
    error: float

    @property
    def binding(self) -> Tensor:
        """Which inequalities bind `[m]`."""
        bound: Tensor = self.l > 0.0
        return bound

    @property
    def size(self) -> float:
        """The size of y, which lengths are told in units of."""
        return 1.0 + float(self.y.abs().max())

    @property
    def scale(self) -> float:
        """The size of the terms of stationarity, which gradients are told in units of."""
        terms = (
            float(self.slope.norm())
            + float((self.at.push_c.T * self.l).norm())
            + float((self.at.push_e.T * self.m).norm())
        )
        curved = 0.0 if self.hessian is None else float(self.hessian.norm()) * self.size
        return max(terms, curved) or 1.0

    @property
    def distances(self) -> Tensor:
        """How far inside each inequality y is, in units of its size, by the constraint's own slope `[m]`."""
        inside: Tensor = -self.at.c / (lengths(self.at.A) * self.size)
        return inside

    @property
    def pushes(self) -> Tensor:
        """How hard each inequality holds y back, in units of `scale` `[m]`."""
        pushes: Tensor = self.l * self.at.push_c.norm(dim=1) / self.scale
        return pushes

    @property
    def violations(self) -> Tensor:
        """How far each inequality and each equality is broken, in units of y's size `[m + p]`."""
        equalities = self.at.e.abs() / (lengths(self.at.E) * self.size)
        return torch.cat([(-self.distances).clamp(min=0.0), equalities])


def lengths(rows: Tensor) -> Tensor:
    """The norms of rows, and 1 for a row of zeros."""
    norms = rows.norm(dim=1)
    return torch.where(norms > 0.0, norms, torch.ones_like(norms))


def reached(point: KKTPoint, epsilon: float) -> bool:
    """Whether it is an optimum to well above rounding: Newton's method has arrived."""
    return bool(point.error <= epsilon**0.6)


def optimum(programme: Constrained, y: Tensor) -> KKTPoint:
    """The KKT point that Newton's method reaches from `y: [n]`, or the best that it saw."""
    epsilon = programme.epsilon
    slope, at = programme.loss_and_gradient(y)[1], programme.linearised(y)
    l, m = recovered(y, slope, at)
    binding = l > 0.0
    best: KKTPoint | None = None
    seen: set[tuple[bool, ...]] = set()
    hessian, near, stale = None, False, 0
    for _ in range(_STEPS):
        if y.numel() <= DENSE and (hessian is None or not near):
            hessian = programme.hessian(y, l, m)
        here = _judged(KKTPoint(y, l, m, slope, at, hessian, math.inf))
        gained = best is None or here.error < 0.5 * best.error
        if best is None or here.error < best.error:
            best = here
        if hessian is None or not math.isfinite(here.error) or here.error <= 10.0 * epsilon:
            break
        if not gained and reached(best, epsilon):
            break
        # Where nothing is feasible no step gains; the set of binding constraints may change once for each of them.
        stale = 0 if gained else stale + 1
        if stale > _PATIENCE + len(at.c):
            break
        moved, l, m = _newton(here, hessian, binding)
        # So near, the Hessian of a step ago is as good, and costs nothing.
        turned = float((l - here.l).norm() + (m - here.m).norm()) / (float(l.norm() + m.norm()) or 1.0)
        near = float(moved.abs().max()) <= 1e-7 * here.size and turned <= 1e-7
        y = y + moved
        if not bool(torch.isfinite(y).all()):
            break
        slope, at = programme.loss_and_gradient(y)[1], programme.linearised(y)
        broken = at.c / (lengths(at.A) * (1.0 + float(y.abs().max())))
        change = (binding & (l < 0.0)) | (~binding & (broken > 10.0 * epsilon))
        if tuple((binding ^ change).tolist()) in seen:
            # A cycle: one change at a time, the first of them, ends it (Murty's rule).
            first = int(change.nonzero()[0]) if bool(change.any()) else 0
            change = torch.arange(len(change)) == first if bool(change.any()) else change
        seen.add(tuple(binding.tolist()))
        binding = binding ^ change
        l = torch.where(binding, l.clamp(min=0.0), 0.0)
        # What begins to bind has a multiplier of 0 until the next step gives it one; `binding` remembers it.
    assert best is not None
    return _settled(best, epsilon)


def judged(programme: Constrained, y: Tensor) -> KKTPoint:
    """A point `y: [n]` as it is, with the multipliers that leave least of stationarity there."""
    slope, at = programme.loss_and_gradient(y)[1], programme.linearised(y)
    l, m = recovered(y, slope, at)
    hessian = programme.hessian(y, l, m) if y.numel() <= DENSE else None
    return _judged(KKTPoint(y, l, m, slope, at, hessian, math.inf))


def recovered(y: Tensor, slope: Tensor, at: Linearised) -> tuple[Tensor, Tensor]:
    """The multipliers l `[m]` >= 0 and m `[p]` that leave least of |slope + push_c'l + push_e'm|.

    A constraint that does not bind is the dearer the farther away it is.
    """
    from scipy.optimize import nnls  # noqa: PLC0415 - with SciPy's optimisers, only where it is used

    sizes = lengths(at.push_c)
    unit = at.push_c / sizes[:, None]
    left, across = slope, unit
    if len(at.E):
        basis = torch.linalg.qr(at.push_e.T).Q
        left, across = slope - basis @ (basis.T @ slope), unit - (unit @ basis) @ basis.T
    l = torch.zeros_like(at.c)
    if len(l):
        distance = -at.c / (lengths(at.A) * (1.0 + float(y.abs().max())))
        matrix = torch.cat([across.T, torch.diag(distance.clamp(min=0.0) / _NEAR)])
        found, _ = nnls(matrix.numpy(), torch.cat([-left, torch.zeros_like(l)]).numpy(), maxiter=30 * max(10, len(l)))
        pushes = torch.as_tensor(found)
        l = torch.where(pushes > 1e-9 * float(slope.norm()), pushes, 0.0) / sizes
    m = torch.zeros_like(at.e)
    if len(m):
        m = torch.linalg.lstsq(at.push_e.T, -(slope + at.push_c.T @ l)[:, None], driver="gelsd").solution[:, 0]
    return l, m


def _judged(point: KKTPoint) -> KKTPoint:
    at = point.at
    rest = float((point.slope + at.push_c.T @ point.l + at.push_e.T @ point.m).norm()) / point.scale
    off = torch.where(point.binding, point.distances.abs(), point.violations[: len(at.c)])
    worst = torch.cat([off, point.violations[len(at.c) :]])
    return replace(point, error=max(rest, float(worst.max()) if len(worst) else 0.0))


def _newton(here: KKTPoint, hessian: Tensor, binding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The step in y, and the multipliers after it, for these binding constraints; rows are scaled to length 1."""
    at, n = here.at, len(here.y)
    rows, columns = torch.cat([at.A[binding], at.E]), torch.cat([at.push_c[binding], at.push_e])
    sizes, weights = lengths(rows), lengths(columns)
    scale = float(hessian.abs().max()) or 1.0
    matrix = kkt_matrix(hessian / scale, rows / sizes[:, None], columns / weights[:, None])
    missed = torch.cat([at.c[binding], at.e]) / sizes
    rhs = torch.cat([-here.slope / scale, -missed])
    found, info = torch.linalg.solve_ex(matrix, rhs)
    if int(info) or not bool(torch.isfinite(found).all()):
        found = torch.linalg.lstsq(matrix, rhs[:, None], driver="gelsd").solution[:, 0]
    multipliers = scale * found[n:] / weights
    count = int(binding.sum())
    l = torch.zeros_like(at.c)
    l[binding] = multipliers[:count]
    return found[:n], l, multipliers[count:]


def kkt_matrix(hessian: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[[H, P'], [A, 0]] of a Hessian `[n, n]`, and what binds `[k, n]`: its gradients, and what it pushes along."""
    n, k = len(hessian), len(rows)
    matrix = torch.zeros(n + k, n + k, dtype=hessian.dtype)
    matrix[:n, :n], matrix[:n, n:], matrix[n:, :n] = hessian, columns.T, rows
    return matrix


def _settled(point: KKTPoint, epsilon: float) -> KKTPoint:
    """With multipliers that are rounding set to 0, so that the set of binding constraints is no accident of it."""
    noise = (point.pushes <= 1e3 * epsilon) & point.binding
    if not bool(noise.any()) or not reached(point, epsilon):
        return point
    return _judged(replace(point, l=torch.where(noise, 0.0, point.l)))
