"""The response that stands in for an exact answer: as close to the follower's optimum as the dtype goes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.inner import InnerSolver, Problem, TorchOptimizer
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.linear import ConjugateGradient
from bilevel.responses import Implicit
from bilevel.tree import join

if TYPE_CHECKING:
    from bilevel.testing.known import KnownGame

SEARCHED: OptimizerFactory = partial(
    torch.optim.LBFGS,
    max_iter=50,
    history_size=20,
    tolerance_grad=0.0,
    tolerance_change=0.0,
    line_search_fn="strong_wolfe",
)
UNSEARCHED: OptimizerFactory = partial(
    torch.optim.LBFGS, lr=1.0, max_iter=50, history_size=20, tolerance_grad=0.0, tolerance_change=0.0
)


@dataclass(frozen=True)
class Polished(InnerSolver):
    """L-BFGS with a line search to 1e4 times the threshold, and without one from there.

    A line search compares losses, which near the optimum differ by less than their rounding: the gradient then stalls
    at about its square root, 1e-8. Full quasi-Newton steps need only the gradient, and end at its own rounding.
    """

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The better of the two answers; nothing is remembered."""
        near, memory = TorchOptimizer(SEARCHED).minimise(problem, y, None, steps=steps, threshold=1e4 * threshold)
        there, _ = TorchOptimizer(UNSEARCHED).minimise(problem, near, memory, steps=steps, threshold=threshold)
        left = [float(torch.linalg.vector_norm(join(problem.gradients(point)[1]))) for point in (near, there)]
        return (there if left[1] <= left[0] else near), None


@dataclass(frozen=True)
class Searched(InnerSolver):
    """L-BFGS with a line search, anew for each leader: another leader's curvature is no guide."""

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """Its answer; nothing is remembered."""
        found, _ = TorchOptimizer(SEARCHED).minimise(problem, y, None, steps=steps, threshold=threshold)
        return found, None


def converged(dtype: torch.dtype) -> Implicit:
    """For hypergradients: to 1e-10 in float64, 1e-5 else."""
    if dtype == torch.float64:
        return Implicit(Polished(), steps=40, tolerance=1e-10, linear_solver=ConjugateGradient(rtol=1e-10))
    return Implicit(Searched(), steps=40, tolerance=1e-5, linear_solver=ConjugateGradient(rtol=1e-5))


def settled(dtype: torch.dtype) -> Implicit:
    """For values, which are shown to four digits: to 1e-6 in float64, 1e-4 else."""
    return Implicit(Searched(), steps=40, tolerance=1e-6 if dtype == torch.float64 else 1e-4)


def least(known: KnownGame) -> float | None:
    """The leader's loss at the optimum that BFGS finds from the start; None when it finds none at a finite distance.

    First derivatives only: the second ones of `KnownGame.equilibrium` cost a hundred times more where the best
    response is itself found by Newton's method.
    """
    from scipy.optimize import minimize  # noqa: PLC0415 - only where it is used

    def value_and_slope(point: Any) -> tuple[float, Any]:
        x = torch.as_tensor(point, dtype=torch.float64).requires_grad_()
        value = known.value(x)
        (slope,) = torch.autograd.grad(value, x)
        return float(value.detach()), slope.numpy()

    start = known.x0.detach()
    found = minimize(value_and_slope, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 200})
    slope = float(known.hypergradient(start).norm())
    # A search that goes on for ever goes far, along a loss that falls ever more slowly.
    near = float(abs(torch.as_tensor(found.x) - start).max()) <= 10.0 * (1.0 + float(start.abs().max()))
    return float(found.fun) if near and float(abs(found.jac).max()) <= 1e-7 * (1.0 + slope) else None
