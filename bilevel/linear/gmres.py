"""GMRES: for systems that are not symmetric, or not definite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.errors import require_kinds
from bilevel.linear.base import LinearSolver
from bilevel.linear.norms import norm
from bilevel.linear.refinement import default_steps, refine
from bilevel.linear.system import Candidate, LinearSystem
from bilevel.sharding.tensor import entries as entries_of


@final
@dataclass(frozen=True, kw_only=True)
class GMRES(LinearSolver):
    r"""Solves any non-singular system by the smallest residual over a Krylov space, restarted to bound memory.

    $$
    u = \arg\min_{u \in u_0 + \mathcal K_k} |b - (A + \text{damping}\, I)\, u|,
    \qquad \mathcal K_k = \operatorname{span}\{r, Ar, \dots, A^{k-1} r\}
    $$

    After `restart` steps the search starts anew from the true residual. With restart >= n it is exact within n steps in
    exact arithmetic; with restart < n it can stagnate for good, as on a cyclic shift: it then stops, and warns. On a
    singular system it warns, unless the right-hand side lies in its range.

    Costs one product a step and one more a restart to measure the true residual; memory for restart + 3 vectors, and
    restart^2 n work a restart for orthogonalisation.
    Source: Saad & Schultz 1986; Gram-Schmidt twice, Giraud, Langou & Rozloznik 2005.

    Args:
        restart: Steps before it starts anew: the number of vectors that are kept.
        max_steps: Over all restarts; None is min(max(2n, 20), 1000).
        rtol: Relative tolerance of the residual; None asks for no accuracy; worse than 0 still warns.
        atol: Absolute tolerance of the residual.
        damping: Added to the diagonal of A.
        strict: Raise where it would warn.

    Raises:
        ConvergenceError: If it stops short and is `strict`.

    Examples:
        >>> from bilevel.linear import LinearOperator
        >>> operator = LinearOperator(torch.tensor([[1.0, 2.0], [-2.0, 1.0]]).mv)
        >>> found = GMRES(rtol=1e-5).solve(operator, torch.tensor([5.0, 0.0]))
        >>> found.solution.round(decimals=4), found.products
        (tensor([1., 2.]), 3)
    """

    restart: int = 30
    max_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        super().__post_init__()
        self._require("restart", self.restart >= 1, "at least 1, the number of vectors kept")
        self._require("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1, or None for 2n")

    @property
    def remedy(self) -> str:
        """More room, or more time."""
        return "a larger restart, more max_steps"

    def iterate(self, system: LinearSystem) -> Candidate:
        """Restarted, from the true residual each time."""

        def correct(residual: Tensor, left: Tensor, target: Tensor, most: int) -> tuple[Tensor, int]:
            return _correction(system.matvec, residual, left, target, min(most, self.restart))

        limit = default_steps(entries_of(system.rhs)) if self.max_steps is None else self.max_steps
        # Slow is not stalled; a restart that gains nothing will gain nothing again.
        return refine(system, correct, max_steps=limit, stalled=0.999)


def _correction(
    matvec: Callable[[Tensor], Tensor], residual: Tensor, size: Tensor, target: Tensor, most: int
) -> tuple[Tensor, int]:
    """The e `[n]` that minimises |residual - A e| over the Krylov space, and the steps taken; `size` is |residual|.

    A V_k = V_(k+1) H_k with orthonormal rows in `basis: [k+1, n]`; Givens rotations, gathered in `rotations`, make H_k
    the triangular R_k as it grows, and the last entry of the rotated right-hand side is the residual.
    """
    rounding = 10.0 * torch.finfo(residual.dtype).eps
    # Systems that are done go on with v = 0, which adds a zero column, and so nothing, to what they have found.
    searching = size > target
    basis = torch.where(searching, residual / torch.where(searching, size, 1.0), 0.0).unsqueeze(0)
    rotations = torch.ones_like(basis[:, :1])
    columns: list[Tensor] = []
    rotated: list[Tensor] = []
    steps = 0
    while True:
        w = matvec(basis[-1])
        steps += 1
        before = norm(w)
        # Classical Gram-Schmidt twice: as orthogonal as the modified one with re-orthogonalisation, in four products
        # with a matrix where that takes 4k with vectors.
        h = basis @ w
        w = w - h @ basis
        again = basis @ w
        w = w - again @ basis
        h = h + again
        length = norm(w)
        # A happy breakdown: what is left is rounding, the space holds the solution.
        length = torch.where(length <= rounding * before, 0.0, length)
        h = rotations @ h
        diagonal = torch.hypot(h[-1], length)
        # A singular A: this direction contributes nothing, and the residual stays.
        flat = diagonal <= rounding * before
        diagonal = torch.where(flat, 1.0, diagonal)
        cosine = torch.where(flat, 0.0, h[-1] / diagonal)
        sine = torch.where(flat, 1.0, length / diagonal)
        columns.append(torch.cat([h[:-1], diagonal.unsqueeze(0)]))
        rotated.append(cosine * size)
        size = -sine * size
        searching = searching & (size.abs() > target) & (length > 0.0)
        if steps == most or not concrete(searching):
            break
        v = torch.where(searching, w / torch.where(searching, length, 1.0), 0.0)
        basis = torch.cat([basis, v.unsqueeze(0)])
        last = rotations[-1:]
        corner = torch.stack([sine, cosine]).unsqueeze(1)
        kept = torch.cat([rotations[:-1], torch.zeros_like(rotations[:-1, :1])], dim=1)
        turned = torch.cat([torch.cat([cosine * last, -sine * last]), corner], dim=1)
        rotations = torch.cat([kept, turned])
    padded = [torch.cat([column, column.new_zeros(steps - len(column))]) for column in columns]
    triangle = torch.stack(padded, dim=1)
    coefficients = torch.linalg.solve_triangular(triangle, torch.stack(rotated).unsqueeze(1), upper=True)
    return coefficients.squeeze(1) @ basis, steps
