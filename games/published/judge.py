"""Whether an answer to a published problem is one, by SciPy alone: nothing of the library takes part."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from games.published.problem import Problem

_FAR = 5.0
_POINTS = 21


@dataclass(frozen=True)
class Verdict:
    """What SciPy finds at an answer (x, y).

    Attributes:
        violation: The largest of G, of g, and of what leaves a box.
        gap: f(x, y) less the lowest f(x, .) that was found.
        y: Where that is.
    """

    violation: float
    gap: float
    y: Tensor


def judged(problem: Problem, x: Tensor, y: Tensor) -> Verdict:
    """An answer, judged."""
    low, high = (torch.tensor(end, dtype=torch.float64) for end in problem.box)
    parts = [low - x, x - high, problem.lower(x, y)]
    if problem.G is not None:
        parts.append(problem.G(x, y))
    best = lowest(problem, x, y)
    return Verdict(float(torch.cat(parts).max()), float(problem.f(x, y) - problem.f(x, best)), best)


def lowest(problem: Problem, x: Tensor, near: Tensor) -> Tensor:
    """The follower's best answer to x, by SLSQP from `near` and other places, from a grid where it is not convex."""
    from scipy.optimize import minimize

    def tensor(point: Any) -> Tensor:
        return torch.tensor(point, dtype=torch.float64)

    def value_and_slope(point: Any) -> tuple[float, Any]:
        y = tensor(point).requires_grad_()
        value = problem.f(x, y)
        (slope,) = torch.autograd.grad(value, y)
        return float(value.detach()), slope.numpy()

    def inside(point: Any) -> Any:
        return -problem.lower(x, tensor(point)).numpy()

    def slopes(point: Any) -> Any:
        return -jacrev(lambda y: problem.lower(x, y))(tensor(point)).numpy()

    # One evaluation before the search: a follower without functions has bounds at least.
    functions = [{"type": "ineq", "fun": inside, "jac": slopes}] if len(problem.lower(x, near)) else []
    starts = [near, torch.ones_like(near), torch.full_like(near, 0.3)]
    if not problem.convex:
        low, high = problem.y_box
        axes = [torch.linspace(max(a, -_FAR), min(b, _FAR), _POINTS).tolist() for a, b in zip(low, high, strict=True)]
        starts += [tensor(place) for place in itertools.product(*axes)]
    ends = [near] if not functions or float(inside(near.numpy()).min()) >= -1e-9 else []
    for start in starts:
        found = minimize(
            value_and_slope,
            start.numpy(),
            jac=True,
            method="SLSQP",
            constraints=functions,
            options={"ftol": 1e-14, "maxiter": 300},
        )
        if not functions or float(inside(found.x).min()) >= -1e-9:
            ends.append(tensor(found.x))
    return min(ends or [near], key=lambda y: float(problem.f(x, y)))
