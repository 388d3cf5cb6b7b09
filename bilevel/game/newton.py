"""A follower with a domain or a non-smooth term brought to rest to rounding, and its curvature there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel.autodiff import jacobian
from bilevel.tree import flatten

if TYPE_CHECKING:
    from bilevel.game.follower import Follower

DENSE = 500
"""So many unknowns or fewer have the Jacobian of F written down."""


def residual_and_jacobian(follower: Follower, y: Tensor) -> tuple[Tensor, Tensor]:
    """F at a flat `y: [n]`, and dF/dy `[n, n]`."""
    held = follower.held_residual()
    xs = [x.detach() for x in follower.xs]
    value, rows = jacobian(lambda y: held(y, *xs), y)
    return value.detach(), rows.detach()


def newton_step(follower: Follower, y: Tensor) -> Tensor | None:
    """y after one semismooth Newton step on F, `[n]`, where that brings |F| down by half or more; else None.

    At a solution without a kink F is smooth, and the step is Newton's. Source: Qi & Sun 1993, Math. Programming 58.
    """
    if y.numel() > DENSE:
        return None
    value, rows = residual_and_jacobian(follower, y)
    step, info = torch.linalg.solve_ex(rows, -value)
    if int(info) != 0 or not bool(torch.isfinite(step).all()):
        return None
    moved = flatten(follower.form.build(follower.settled(follower.form.split(y + step), follower.rests.step)))
    for candidate in (y + step, moved):
        with torch.no_grad():
            _, found = follower.gradients(follower.form.split(candidate))
        left = float(torch.stack([part.square().sum() for part in found]).sum().sqrt())
        if left <= 0.5 * float(value.norm()):
            return candidate
    return None


def curvatures(follower: Follower, y: Tensor) -> tuple[float, float]:
    """The extreme real parts of the eigenvalues of dF/dy; NaN where there are too many unknowns.

    With the derivative D of the projection and the Hessian H, dF/dy = (I - D) / s + D H. It has the eigenvalues of a
    symmetric matrix that is positive definite exactly where the loss, with the curvature of the wall that holds y,
    curves upwards along every direction that is free.
    """
    if y.numel() > DENSE:
        return math.nan, math.nan
    values = torch.linalg.eigvals(residual_and_jacobian(follower, y)[1]).real
    return float(values.min()), float(values.max())
