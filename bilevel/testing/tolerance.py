"""How far a right hypergradient may be from the exact one, derived from the game and from how far its follower got."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.testing.known import KnownGame
from bilevel.testing.subject import Evaluation, Subject


@dataclass(frozen=True)
class Exact:
    """The exact answer of a game at its point, and the norms that errors are bounded by."""

    gradient: Tensor
    jacobian: Tensor
    best_response: Tensor
    least: float
    largest: float
    scale: float
    leader_slope: float
    mixed: float
    sensitivity: float
    curvature: float


def exact(known: KnownGame) -> Exact:
    """All of it by dense derivatives, float64; `scale` is |g_x| + |J| |g_y|, what rounding is relative to."""
    x = known.x0
    y = known.best_response(x).detach()

    def implicit(y: Tensor) -> Tensor:
        """The implicit hypergradient as a function of where it is taken."""
        g_x, g_y = torch.func.grad(known.leader, argnums=(0, 1))(x, y)
        hessian = torch.func.jacrev(torch.func.grad(known.follower, argnums=1), argnums=1)(x, y)
        mixed = torch.func.jacrev(torch.func.grad(known.follower, argnums=1), argnums=0)(x, y)
        answer: Tensor = g_x - mixed.T @ torch.linalg.solve(hessian, g_y)
        return answer

    g_x, g_y = torch.func.grad(known.leader, argnums=(0, 1))(x, y)
    jacobian, (least, largest) = known.jacobian(x), known.curvature(x)
    size = float(torch.linalg.matrix_norm(jacobian, 2))
    g_yy = torch.func.jacrev(torch.func.grad(known.leader, argnums=1), argnums=1)(x, y)
    g_xy = torch.func.jacrev(torch.func.grad(known.leader, argnums=0), argnums=1)(x, y)
    return Exact(
        gradient=known.hypergradient(x),
        jacobian=jacobian,
        best_response=y,
        least=least,
        largest=largest,
        scale=float(g_x.norm()) + size * float(g_y.norm()) + 1e-3,
        leader_slope=float(g_y.norm()),
        mixed=float(torch.linalg.matrix_norm(known.mixed(x), 2)),
        sensitivity=float(torch.linalg.matrix_norm(torch.func.jacrev(implicit)(y), 2)),
        curvature=float(torch.linalg.matrix_norm(g_yy, 2)) * size + float(torch.linalg.matrix_norm(g_xy, 2)),
    )


def tolerance(known: KnownGame, subject: Subject, found: Evaluation, steps: int, truth: Exact | None = None) -> float:
    r"""A bound on $|h - h^*|$ for a right answer at y, with $e = |y - y^*|$ and r the residual that it reports.

    * *Where it is taken.* The implicit hypergradient moves with y by $S e$, S the norm of its derivative in y; twice
    that, for the second order. * *Its equation.* $H u = g_y$ solved to a relative residual r is wrong by $|f_{yx}|\,
    r\, |g_y|$ over the least curvature. * *Its steps.* The iterates of a linear iteration on a quadratic are $y^* +
    p_K(H)(y_0 - y^*)$, and their derivative is $J - p_K(H) J$ with the same polynomial, so that $|J_K - J| \le \max
    |p_K|\, |J|$. As the game starts off its optimum by `radius` along every eigenvector, $\max |p_K| \le e /
    \text{radius}$. Elsewhere the derivative lags behind by the number of steps, like $K \rho^K$. The leader's slope
    there differs by $(|g_{yy}| |J| + |g_{xy}|)\, e$. * *Rounding.* 1,000 eps times conditioning, of $|g_x| + |J|
    |g_y|$.

    Args:
        known: The game that was played.
        subject: Who answered.
        found: The answer, with its residual.
        steps: That were taken.
        truth: The exact answer, where it is known already.
    """
    truth = exact(known) if truth is None else truth
    e = float((found.follower - truth.best_response).norm())
    size = float(torch.linalg.matrix_norm(truth.jacobian, 2))
    rounding = 1000.0 * torch.finfo(known.dtype).eps * (truth.largest / truth.least) * truth.scale
    equation = truth.mixed * found.residual * (truth.leader_slope + truth.curvature * e) / truth.least
    total = rounding + equation
    if not subject.of_steps:
        total += 2.0 * truth.sensitivity * e
    else:
        linear = known.quadratic and subject.linear_iteration
        lag = 1.0 if linear else 1.0 + steps
        if not linear:  # it may oscillate, and be at the optimum for a moment
            e = max(e, subject.distance(known, max(1, steps * 7 // 8)))
        total += truth.leader_slope * size * lag * e / known.radius + truth.curvature * (1.0 + lag) * e
    return total


def stated_error(subject: Subject, truth: Exact) -> float:
    """What an estimate of stated bias b may be off by beyond `tolerance`, b |J| |g_y|; 0 where it states none."""
    stated = subject.promise.stated_bias
    size = float(torch.linalg.matrix_norm(truth.jacobian, 2))
    return 0.0 if math.isnan(stated) else stated * size * truth.leader_slope
