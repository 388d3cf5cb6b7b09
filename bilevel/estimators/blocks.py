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
    that a matrix which is not A's shows. One product.
    """

    matrices: Tensor = field(repr=False)

    def iterate(self, system: LinearSystem) -> Candidate:
        """By LU of each block."""
        rhs = system.rhs.view(*self.matrices.shape[:2], 1)
        return system.measure(torch.linalg.solve(self.matrices, rhs).reshape(-1))
