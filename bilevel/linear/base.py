"""What every linear solver takes and gives: products in, a solution with its residual out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.errors import ConvergenceError, NonConvergenceWarning, NotSymmetricError


@dataclass(frozen=True)
class LinearOperator:
    """A square matrix A `[n, n]` known only through its products.

    `matvec` maps `v: [n]` to `A v: [n]`. `symmetric` is a promise of the caller that A equals its transpose; solvers
    that need it refuse an operator without it.
    """

    matvec: Callable[[Tensor], Tensor]
    symmetric: bool = False

    def damped(self, damping: float) -> LinearOperator:
        """A + damping * I."""
        if damping == 0.0:
            return self
        return LinearOperator(lambda v: self.matvec(v) + damping * v, self.symmetric)


@dataclass(frozen=True)
class LinearSolution:
    """What a solver found for (A + damping I) u = b.

    `solution`: u `[n]`. `residual_norm`: |b - (A + damping I) u|, a 0-d tensor, computed from u itself. `products`:
    how many products with A it took. `converged`: whether the residual meets the tolerance that was asked for.
    """

    solution: Tensor
    residual_norm: Tensor
    products: int
    converged: bool


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Solves (A + damping I) u = b from products with A.

    Converged means |b - (A + damping I) u| <= max(rtol |b|, atol). With `rtol=None` no accuracy is asked for: the
    answer is what the method's definition makes it, its residual is reported, and nothing warns. A solver that
    stops short of its tolerance issues a `NonConvergenceWarning` with the residual and the wanted tolerance, or
    raises `ConvergenceError` when `strict`.
    """

    rtol: float | None = 1e-6
    atol: float = 0.0
    damping: float = 0.0
    strict: bool = False

    @abstractmethod
    def solve(self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None) -> LinearSolution:
        """u `[n]` with (A + damping I) u = rhs, started from `initial: [n]` where the method can use it."""

    def tolerance(self, rhs: Tensor) -> Tensor:
        """The residual norm below which a solution counts as converged, a 0-d tensor."""
        relative = 0.0 if self.rtol is None else self.rtol
        return torch.clamp(relative * torch.linalg.vector_norm(rhs), min=self.atol)

    def _require_symmetric(self, operator: LinearOperator) -> None:
        if not operator.symmetric:
            raise NotSymmetricError(
                f"{type(self).__name__} needs a symmetric system; this operator says symmetric=False. Use GMRES(), "
                "or Dense() for a few hundred unknowns."
            )

    def _conclude(self, solution: Tensor, residual: Tensor, rhs: Tensor, products: int) -> LinearSolution:
        """Judge `residual: [n]` = rhs - (A + damping I) solution: warn or raise when it misses the tolerance."""
        norm = torch.linalg.vector_norm(residual)
        excess = concrete(norm - self.tolerance(rhs))
        converged = self.rtol is not None and excess <= 0.0
        if self.rtol is not None and not converged:
            size = concrete(torch.linalg.vector_norm(rhs))
            message = (
                f"{type(self).__name__} stopped after {products} products at a residual of {concrete(norm):.3g} "
                f"(|b| = {size:.3g}); wanted max({self.rtol:g} |b|, {self.atol:g}). Give it more max_steps, some "
                "damping, a better start, or accept a larger rtol."
            )
            if self.strict:
                raise ConvergenceError(message)
            warnings.warn(message, NonConvergenceWarning, stacklevel=3)
        return LinearSolution(solution, norm, products, converged)
