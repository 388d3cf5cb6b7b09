"""The Neumann series: as many gradient steps, without a system to solve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import ConvergenceError
from bilevel.linear.base import LinearOperator, LinearSolution, LinearSolver, norm
from bilevel.linear.gaussian import gaussian


@final
@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    """Sums the first terms of the series for A^-1 b, and says what the rest would have been.

    u = a sum_(j <= K) (I - a (A + damping I))^j b, with a = `step_size` and K = `max_steps`: K = 0 is a b. K terms are
    what unrolling K + 1 gradient steps of size a from the optimum gives, exactly. With `rtol=None` exactly K terms are
    added; otherwise fewer once they suffice. From an `initial` the series is of its residual, and is added to it.

    `step_size=None` is 1 / lambda, lambda the largest eigenvalue as `power_steps` power iterations from `seed` see it,
    a little from below.

    Raises `ConvergenceError` when the series diverges: beforehand when the operator is symmetric and step_size >
    2 / lambda (not tested with `power_steps=0`), and underway when the residual is not finite or has grown to twice its
    start (100 times when not symmetric, where it may grow in passing). Needs every eigenvalue within the circle
    |1 - a lambda| < 1: a positive-definite A, or at least eigenvalues with positive real parts.

    Costs K products, 1 for the residual, 1 for an initial, `power_steps` for lambda; memory for 3 vectors. The error of
    an SPD system falls by 1 - 1/k a step for condition number k: thousands of terms where conjugate gradients take
    dozens. With few terms and rtol=None the answer is a heavily damped one, and nothing warns.

    Source: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.

    >>> operator = LinearOperator(lambda v: 0.5 * v, symmetric=True)
    >>> found = Neumann(max_steps=2, step_size=1.0, rtol=None).solve(operator, torch.tensor([8.0]))
    >>> found.solution, found.residual_norm
    (tensor([14.]), tensor(1.))
    """

    max_steps: int = 100
    step_size: float | None = None
    power_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        self._require("max_steps", self.max_steps >= 0, "at least 0, which is step_size * b")
        positive = self.step_size is None or 0.0 < self.step_size < math.inf
        self._require("step_size", positive, "a positive number, or None to have it estimated")
        least = 1 if self.step_size is None else 0
        self._require("power_steps", self.power_steps >= least, f"at least {least} with step_size={self.step_size}")

    def solve(self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None) -> LinearSolution:
        """u `[n]` near (A + damping I)^-1 rhs, started from `initial: [n]`."""
        size = self._size(rhs, initial)
        if concrete(size) == 0.0:
            return self._conclude(torch.zeros_like(rhs), size, size, 0)
        damped = operator.damped(self.damping)
        tolerance = self._tolerance(size)
        solution = initial
        residual = rhs if initial is None else rhs - damped.matvec(initial)
        products = 0 if initial is None else 1
        left = size if initial is None else norm(residual)
        adding = self._adding(left, tolerance)
        if not concrete(adding):
            return self._conclude(torch.zeros_like(rhs) if solution is None else solution, left, size, products)

        step, taken = self._step(damped, rhs)
        products += taken
        # Only a symmetric residual that grows at all proves divergence. Against |b| too, for a start that was close.
        most_growth = 2.0 if operator.symmetric else 100.0
        ceiling = most_growth * torch.maximum(left, size)
        ceiling = torch.where(ceiling > 0.0, ceiling, 1.0)  # a zero system among others in a batch
        single = not transforms_active() and not torch.is_grad_enabled()  # then vectors of its own are written over
        for number in range(self.max_steps + 1):
            # u + a (b - A u) adds the series' next term to u: the same products, and the true residual at every step.
            length = step if single else torch.where(adding, step, 0.0)
            over = single and number > 0  # both vectors are its own by then
            if solution is None:
                solution = length * residual
            else:
                solution = torch.addcmul(solution, length, residual, out=solution if over else None)
            last = number == self.max_steps
            if last:
                residual = rhs  # lets its own go before the largest product
            residual = damped.residual(rhs, solution, out=residual if over and not last else None, last=last)
            products += 1
            left = norm(residual)
            growth = concrete(left / ceiling)
            if not growth <= 1.0:
                raise ConvergenceError(
                    f"Neumann diverges: after {products} products the residual is over {most_growth * growth:.2g} "
                    "times its start. An eigenvalue of A + damping I is negative or above 2 / step_size "
                    f"(step_size={self.step_size}). Use a smaller step_size, some damping, or GMRES()."
                )
            if self.rtol is not None:
                adding = adding & self._adding(left, tolerance)
                if not concrete(adding):
                    break
        return self._conclude(torch.zeros_like(rhs) if solution is None else solution, left, size, products)

    def _adding(self, size: Tensor, tolerance: Tensor) -> Tensor:
        return torch.ones_like(size, dtype=torch.bool) if self.rtol is None else size > tolerance

    def _step(self, operator: LinearOperator, rhs: Tensor) -> tuple[Tensor, int]:
        """The step size, a 0-d tensor, and the products it took to find or to check."""
        if self.step_size is None:
            largest = self._largest_eigenvalue(operator.matvec, rhs)
            if -concrete(-largest) <= 0.0:
                raise ConvergenceError(
                    "Neumann found no step_size: the products of a random vector with A vanish. Add some damping."
                )
            return 1.0 / largest, self.power_steps
        # |A v| / |v| bounds the largest eigenvalue from below only when A is symmetric.
        if self.power_steps == 0 or not operator.symmetric:
            return torch.full_like(rhs[0], self.step_size), 0
        largest_seen = concrete(self._largest_eigenvalue(operator.matvec, rhs))
        bound = 2.0 / largest_seen if largest_seen > 0.0 else math.inf
        if self.step_size > bound:
            raise ConvergenceError(
                f"Neumann(step_size={self.step_size:g}) diverges: the largest eigenvalue, {largest_seen:.3g} or more, "
                f"bounds it by {bound:.3g}. Take half of that, or None to have it estimated."
            )
        return torch.full_like(rhs[0], self.step_size), self.power_steps

    def _largest_eigenvalue(self, matvec: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        vector = gaussian((like.numel(),), like, self.seed)
        size = norm(vector)
        for _ in range(self.power_steps):
            vector = matvec(vector / torch.where(size > 0.0, size, 1.0))
            size = norm(vector)
        return size
