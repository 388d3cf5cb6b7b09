"""The matrix itself: exact, and affordable for a few hundred unknowns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.errors import NonFiniteError, SingularSystemError
from bilevel.linear.base import LinearSolver
from bilevel.linear.norms import norm
from bilevel.linear.system import Candidate, LinearSystem


@final
@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """Solves any non-singular system to rounding, by writing its matrix down: LU with the n columns of A.

    Costs n + 1 products, n^2 memory, n^3 work. It takes no initial. In float32 a condition number above 1e5 shows as a
    warning.

    Raises:
        SingularSystemError: If the smallest singular value is n eps times the largest or less: no digit of the solution
            is known then.

    Examples:
        >>> from bilevel.linear import LinearOperator
        >>> operator = LinearOperator(torch.tensor([[0.0, 2.0], [1.0, 0.0]]).mv)
        >>> found = Dense().solve(operator, torch.tensor([2.0, 3.0]))
        >>> found.solution, found.products
        (tensor([3., 1.]), 3)
    """

    @property
    def remedy(self) -> str:
        """What it misses is rounding."""
        return "float64"

    def iterate(self, system: LinearSystem) -> Candidate:
        """By LU."""
        rhs = system.rhs
        # One at a time: vmap over matvec would forbid the retained graphs that products are taken from.
        basis = torch.eye(rhs.numel(), dtype=rhs.dtype, device=rhs.device)
        matrix = torch.stack([system.matvec(column) for column in basis], dim=1)
        self._refuse_singular(matrix)
        # One more product: a matvec that is not linear shows in the residual, and nowhere else.
        return system.measure(torch.linalg.solve(matrix, rhs))

    def _refuse_singular(self, matrix: Tensor) -> None:
        n = matrix.shape[0]
        if not math.isfinite(concrete(norm(matrix))):
            raise NonFiniteError(f"Dense met NaN or infinite entries in the matrix [{n}, {n}] of its products.")
        values = torch.linalg.svdvals(matrix)
        ratio = -concrete(-values[-1] / torch.where(values[0] > 0.0, values[0], 1.0))
        if ratio <= n * torch.finfo(matrix.dtype).eps:
            raise SingularSystemError(
                f"Dense was given a singular matrix [{n}, {n}]: its smallest singular value is {ratio:.1g} of its "
                f"largest (damping={self.damping:g}). Add damping=, or make the follower's optimum unique."
            )
