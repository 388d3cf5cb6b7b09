"""Averaged gradient steps: the solver for products that are each with another sample of the matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from bilevel.errors import require_kinds
from bilevel.linear.base import LinearSolver
from bilevel.linear.system import Candidate, LinearSystem


@final
@dataclass(frozen=True, kw_only=True)
class StochasticGradient(LinearSolver):
    r"""Takes gradient steps on $\tfrac12 u^\top (A + \text{damping}\, I)\, u - b^\top u$, and averages the last ones.

    $$
    u_{k+1} = u_k + a\, (b - A_k u_k), \qquad u = \frac{1}{|T|} \sum_{k \in T} u_k
    $$

    Each product may be with another sample $A_k$ of A, such as the Hessian of a fresh batch. The mean of u over the
    samples is then what the same steps give with A itself: short of $A^{-1} b$ by what `max_steps` leave, as
    $(1 - a \lambda)^k$, and by nothing else. Its variance falls as 1 over the steps that are averaged. `Implicit`
    starts it at the last call's u, so that few steps a call are enough where the leader moves little.

    Costs `max_steps` products, one more from a start; memory for 3 vectors. On random products a step must be below 2
    over the largest curvature of a sample, or it diverges. `ConjugateGradient` solves with one matrix faster.
    Source: Polyak & Juditsky 1992; for hypergradients, arXiv 2111.14580 (AmIGO).

    Args:
        step_size: a; about 1 over the largest curvature of a sample.
        max_steps: How many.
        averaged: The share of the steps, the last ones, over which u is the mean; 0 is the last alone.
        rtol: None: the steps are taken and none is left out.
        atol: Absolute tolerance of the residual.
        damping: Added to the diagonal of A.
        strict: Raise where it would warn.

    Examples:
        >>> import torch
        >>> from bilevel.linear import LinearOperator
        >>> solver = StochasticGradient(step_size=0.5, max_steps=40)
        >>> found = solver.solve(LinearOperator(lambda v: 2.0 * v, symmetric=True), torch.tensor([8.0]))
        >>> found.solution, found.products
        (tensor([4.]), 40)
    """

    rtol: float | None = None
    step_size: float
    max_steps: int = 100
    averaged: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        super().__post_init__()
        self._require("step_size", 0.0 < self.step_size < math.inf, "a positive number")
        self._require("max_steps", self.max_steps >= 1, "at least 1")
        self._require("averaged", 0.0 <= self.averaged <= 1.0, "a share of the steps, from 0 to 1")

    @property
    def tells_indefinite(self) -> bool:
        """It diverges."""
        return True

    @property
    def takes_random(self) -> bool:
        """Yes: the mean of its answer is the answer to A's mean."""
        return True

    @property
    def remedy(self) -> str:
        """More steps."""
        return "more max_steps, a larger step_size"

    @property
    def takes_parts(self) -> bool:
        """Yes."""
        return True

    def iterate(self, system: LinearSystem) -> Candidate:
        """The steps, and their mean."""
        kept = max(1, round(self.averaged * self.max_steps))
        here = system.rhs.new_zeros(system.rhs.shape) if system.initial is None else system.initial
        total = None
        for number in range(self.max_steps):
            if number == 0 and system.initial is None:
                here = self.step_size * system.rhs
            else:
                here = here + self.step_size * system.residual(here)
            if number >= self.max_steps - kept:
                total = here if total is None else total + here
        assert total is not None
        return system.measure(total / kept)
