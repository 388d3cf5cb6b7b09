"""A linear solver for what falls into equal blocks whose matrices are known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bilevel.linear import Candidate, LinearSolver, LinearSystem


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class KnownBlocks(LinearSolver):
    """Solves A = diag(A_1, ..., A_count) by matrices that somebody knows: those of folds that do not see each other.

    `matrices: [count, size, size]` are believed for the answer alone: its residual is measured by a product with A, so
    that a matrix which is not A's shows. One product, and a second where an ill-conditioned block's residual is above
    the tolerance: the residual is solved for once more.
    """

    matrices: Tensor = field(repr=False)

    def iterate(self, system: LinearSystem) -> Candidate:
        """By LU of each block."""
        found = system.measure(self._solved(system.rhs))
        if bool(found.residual_norm <= system.tolerance):
            return found
        refined = system.measure(found.solution + self._solved(found.residual))
        return refined if bool(refined.residual_norm < found.residual_norm) else found

    def _solved(self, rhs: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve(self.matrices, rhs.reshape(*self.matrices.shape[:2], 1)).reshape(-1)
        return found
