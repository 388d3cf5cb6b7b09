"""The Neumann series: as many gradient steps, without a system to solve."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import ConvergenceError, require_kinds
from bilevel.linear.base import LinearSolver
from bilevel.linear.gaussian import gaussian
from bilevel.linear.norms import norm
from bilevel.linear.operator import Shapes
from bilevel.linear.system import Candidate, LinearSystem, Memory


@final
@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    r"""Sums the first terms of the series for A^-1 b, and says what the rest would have been.

    $$
    u = a \sum_{j \le K} (I - a (A + \text{damping}\, I))^j\, b
    $$

    K terms are what unrolling K + 1 gradient steps of size a from the optimum gives, exactly. With `rtol=None` exactly
    K terms are added; otherwise fewer once they suffice. From an initial the series is of its residual. Every
    eigenvalue $\lambda$ has to lie within $|1 - a \lambda| < 1$: A positive definite, or at least real parts above 0.

    Costs K products, 1 for the residual, 1 for an initial, and `power_steps` at every `every`th system; memory for 3
    vectors. The error of an SPD system falls by 1 - 1/k a step for condition number k: thousands of terms where
    conjugate gradients take dozens. With few terms and rtol=None the answer is heavily damped, and nothing warns.
    Source: Lorraine, Vicol & Duvenaud, arXiv 1911.02590.

    Args:
        max_steps: K; 0 is a b.
        step_size: a; None is $1 / \lambda$ for the largest eigenvalue as power iterations see it, a little from below.
        power_steps: Power iterations, to find a `step_size` or to check that of a symmetric A; 0 checks nothing.
        every: So many systems in a row share the eigenvalue, where the caller keeps the solver's memory, as `Implicit`
            does. It is found anew before that if a residual grows: Hessians move little in a leader's step.
        seed: Where power iterations begin.
        rtol: Relative tolerance of the residual; None asks for no accuracy; worse than 0 still warns.
        atol: Absolute tolerance of the residual.
        damping: Added to the diagonal of A.
        strict: Raise where it would warn.

    Raises:
        ConvergenceError: If the series diverges, or would: step_size > $2 / \lambda$.

    Examples:
        >>> from bilevel.linear import LinearOperator
        >>> operator = LinearOperator(lambda v: 0.5 * v, symmetric=True)
        >>> found = Neumann(max_steps=2, step_size=1.0, rtol=None).solve(operator, torch.tensor([8.0]))
        >>> found.solution, found.residual_norm
        (tensor([14.]), tensor(1.))
    """

    max_steps: int = 100
    step_size: float | None = None
    power_steps: int = 10
    every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        super().__post_init__()
        self._require("max_steps", self.max_steps >= 0, "at least 0, which is step_size * b")
        positive = self.step_size is None or 0.0 < self.step_size < math.inf
        self._require("step_size", positive, "a positive number, or None to have it estimated")
        least = 1 if self.step_size is None else 0
        self._require("power_steps", self.power_steps >= least, f"at least {least} with step_size={self.step_size}")
        self._require("every", self.every >= 1, "at least 1, which is anew for each system")

    @property
    def tells_indefinite(self) -> bool:
        """It diverges."""
        return True

    @property
    def takes_random(self) -> bool:
        """Yes: of independent samples of A, the mean of the K terms is the K terms of A's mean."""
        return True

    @property
    def remedy(self) -> str:
        """More terms."""
        return "more max_steps"

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """The largest eigenvalue, 0 while it is not known, and for how many systems it has served."""
        return {"largest": like.new_zeros(()), "served": torch.zeros((), dtype=torch.int64)}

    @property
    def takes_parts(self) -> bool:
        """Yes."""
        return True

    def iterate(self, system: LinearSystem) -> Candidate:
        """The series, with the eigenvalue that is kept; where its residual grows, with one that is found anew."""
        return self._series(system, anew=False) or self._series(system, anew=True)  # type: ignore[return-value]

    def _series(self, system: LinearSystem, *, anew: bool) -> Candidate | None:
        """The sum; None where its residual grows by a kept eigenvalue, which is too small then."""
        start = system.start()
        rhs, size, left = system.rhs, system.rhs_norm, start.residual_norm
        adding = self._adding(left, system.tolerance)
        if not concrete(adding):
            return start
        step, memory, kept = self._step(system, anew=anew)
        # Only a symmetric residual that grows at all proves divergence. Against |b| too, for a start that was close.
        most_growth = 2.0 if system.symmetric else 100.0
        random = system.operator.random
        if random:  # one sample may be large, and a residual by it
            most_growth = 1e4
        ceiling = most_growth * torch.maximum(left, size)
        ceiling = torch.where(ceiling > 0.0, ceiling, 1.0)  # a zero system among others in a batch
        # Of a symmetric residual no step may make more, but for what rounding makes of a small one.
        noise = torch.finfo(rhs.dtype).eps ** 0.5
        watched = kept and system.symmetric and not random
        single = not transforms_active() and not torch.is_grad_enabled()  # then vectors of its own are written over
        solution, residual, found = start.solution, start.residual, None
        del start
        for number in range(self.max_steps + 1):
            # u + a (b - A u) adds the series' next term to u: the same products, and the true residual at every step.
            length = step if single else torch.where(adding, step, 0.0)
            over = single and number > 0  # both vectors are its own by then
            if number == 0 and system.initial is None:
                solution = length * residual
            else:
                solution = torch.addcmul(solution, length, residual, out=solution if over else None)
            if watched:
                ceiling = torch.maximum((1.0 + noise) * left, noise * size)
            if number == self.max_steps:
                residual = rhs  # lets its own go before the largest product
                found = system.measure(solution)
                left = found.residual_norm
            else:
                residual = system.residual(solution, out=residual if over else None)
                left = norm(residual)
            growth = concrete(left / ceiling)
            if not growth <= 1.0 and kept and not random:
                return None
            if not growth <= 1.0:
                raise ConvergenceError(
                    f"Neumann diverges: after {system.products} products the residual is over "
                    f"{most_growth * growth:.2g} times its start. An eigenvalue of A + damping I is negative or above "
                    f"2 / step_size (step_size={self.step_size}). Use a smaller step_size, some damping, or GMRES()."
                )
            if self.rtol is not None:
                adding = adding & self._adding(left, system.tolerance)
                if not concrete(adding):
                    break
        return replace(found or system.with_residual(solution, residual, left), memory=memory)

    def _adding(self, size: Tensor, tolerance: Tensor) -> Tensor:
        return torch.ones_like(size, dtype=torch.bool) if self.rtol is None else size > tolerance

    def _step(self, system: LinearSystem, *, anew: bool) -> tuple[Tensor, Memory, bool]:
        """The step size, a 0-d tensor; the memory of what it was made of; and whether an earlier system made that."""
        given, memory = self.step_size, system.memory
        # |A v| / |v| bounds the largest eigenvalue from below only when A is symmetric.
        unchecked = self.power_steps == 0 or not system.symmetric or system.operator.random
        if given is not None and unchecked:
            return system.rhs.new_full((), given), memory, False
        served = int(memory["served"])
        kept = not anew and 0 < served < self.every
        largest = memory["largest"] if kept else self._largest_eigenvalue(system)
        served = served + 1 if kept else 1
        memory = {"largest": largest, "served": torch.full_like(memory["served"], served)}
        if given is None:
            if -concrete(-largest) <= 0.0:
                raise ConvergenceError(
                    "Neumann found no step_size: the products of a random vector with A vanish. Add some damping."
                )
            return 1.0 / largest, memory, kept
        largest_seen = concrete(largest)
        bound = 2.0 / largest_seen if largest_seen > 0.0 else math.inf
        if given > bound:
            raise ConvergenceError(
                f"Neumann(step_size={given:g}) diverges: the largest eigenvalue, {largest_seen:.3g} or more, "
                f"bounds it by {bound:.3g}. Take half of that, or None to have it estimated."
            )
        return system.rhs.new_full((), given), memory, kept

    def _largest_eigenvalue(self, system: LinearSystem) -> Tensor:
        vector = gaussian(tuple(system.rhs.shape), system.rhs, self.seed)
        size = norm(vector)
        for _ in range(self.power_steps):
            vector = system.matvec(vector / torch.where(size > 0.0, size, 1.0))
            size = norm(vector)
        return size
