"""Penalised linear models in many folds at once: Newton's method with the exact matrix of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import ConvergenceError
from bilevel.estimators.losses import RowLoss

_ENTRIES = 2**24
"""The most entries of a tensor `[blocks, n, q]` that is made at a time."""
_HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Table:
    """Rows to be fitted: `inputs: [n, q]`, the last column being ones where there is an intercept; `targets: [n, m]`.

    `groups: [p]` has the number of each penalised column's penalty, counted from 0. A `sparse` table has two for each
    group, of the squares and then of the absolute values of its weights.
    """

    inputs: Tensor
    targets: Tensor
    groups: Tensor
    loss: RowLoss
    sparse: bool = False

    @property
    def features(self) -> int:
        """How many columns are penalised, the first ones."""
        return len(self.groups)

    @property
    def size(self) -> Tensor:
        """The mean square of penalised columns that are not 0; 1 where there is none."""
        squares = self.inputs[:, : self.features].square().mean(0)
        found = squares[squares > 0.0]
        return found.mean() if len(found) else squares.new_ones(())

    @property
    def kinds(self) -> int:
        """How many penalties a group has."""
        return 2 if self.sparse else 1

    def penalties(self, logs: Tensor) -> Tensor:
        """The penalty of each weight's square `[..., q]` from logarithms `[..., kinds * groups]`."""
        return self._spread(logs, 0, self.loss.ridge)

    def lasso(self, logs: Tensor) -> Tensor | None:
        """That of each weight's absolute value, `[..., q]`; None where there is none."""
        return self._spread(logs, 1, 0.0) if self.sparse else None

    def _spread(self, logs: Tensor, kind: int, intercept: float) -> Tensor:
        groups = logs.shape[-1] // self.kinds
        own = logs[..., groups * kind + self.groups].exp()
        free = self.inputs.shape[1] - self.features
        return torch.cat([own, own.new_full((*own.shape[:-1], free), intercept)], dim=-1)

    def objective(self, weights: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
        """sum_i counts_i loss_i + penalties . weights^2 / 2, `[...]`; `weights: [..., q, m]`, `counts: [..., n]`."""
        lost = (counts * self.loss.rows(self.inputs @ weights, self.targets)).sum(-1)
        return lost + 0.5 * (penalties[..., None] * weights.square()).sum((-2, -1))


def fitted(
    table: Table, counts: Tensor, penalties: Tensor, start: Tensor, *, steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Where each block's objective is least, `[blocks, q, m]`, and its Hessian there, `[blocks, qm, qm]`.

    `counts: [blocks, n]` say how often a block counts each row, `penalties: [blocks, q]` are those of its weights.
    Raises `ConvergenceError` where Newton's method does not end.
    """
    n, q = table.inputs.shape
    at_once = max(1, _ENTRIES // (n * q))
    slices = [slice(first, first + at_once) for first in range(0, len(counts), at_once)]
    with torch.no_grad():
        found = [_newton(table, counts[some], penalties[some], start[some], steps) for some in slices]
    weights, matrices = zip(*found, strict=True)
    return torch.cat(weights), torch.cat(matrices)


def _newton(table: Table, counts: Tensor, penalties: Tensor, weights: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    value = table.objective(weights, counts, penalties)
    for _ in range(steps):
        gradient, matrices = _derivatives(table, counts, penalties, weights)
        direction = -torch.linalg.solve(matrices, gradient.flatten(1)).view_as(weights)
        if table.loss.quadratic:
            return weights + direction, matrices
        decrement = -(gradient * direction).sum((1, 2))
        # Quadratic convergence: what one more step leaves is about the square of this.
        last = bool((decrement <= 1e-14 * (1.0 + value.abs())).all())
        rate = torch.ones_like(value)
        for _ in range(_HALVINGS):
            trial = weights + rate[:, None, None] * direction
            reached = table.objective(trial, counts, penalties)
            # A rounding of the value may hide the last steps' decrease.
            wrong = reached > value - 1e-4 * rate * decrement + 1e-13 * (1.0 + value.abs())
            if not bool(wrong.any()):
                break
            rate = torch.where(wrong, 0.5 * rate, rate)
        weights, value = trial, reached
        if last:
            return weights, _derivatives(table, counts, penalties, weights)[1]
    raise ConvergenceError(
        f"Newton's method did not end in {steps} steps: a Newton step still gains {decrement.max():.2g}."
    )


def _derivatives(table: Table, counts: Tensor, penalties: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient `[blocks, q, m]` and the Hessian `[blocks, qm, qm]` of each block's objective."""
    x, (blocks, q, m) = table.inputs, weights.shape
    slopes, second = table.loss.derivatives(x @ weights, table.targets)
    gradient = x.mT @ (counts[..., None] * slopes) + penalties[..., None] * weights
    matrices = weights.new_zeros(blocks, q, m, q, m)
    for a in range(m):
        for b in range(a + 1):
            part = x.mT @ ((counts * second[..., a, b])[..., None] * x)
            matrices[:, :, a, :, b] = part
            matrices[:, :, b, :, a] = part
    matrices = matrices.view(blocks, q * m, q * m)
    matrices.diagonal(dim1=1, dim2=2).add_(penalties.repeat_interleave(m, 1))
    return gradient, matrices


def logs_of(leader: Any) -> Tensor:
    """The logarithm of each group's penalties, `[stack, kinds * groups]`: the level of a kind, and deviations from it.

    Levels are `[stack, kinds]`.
    """
    level, deviation = leader["level"], leader["deviation"]
    logs: Tensor = level.repeat_interleave(deviation.shape[1] // level.shape[1], 1) + deviation
    return logs
