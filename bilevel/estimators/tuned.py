"""Penalties that follow the hypergradient of a cross-validated loss: many stacks of folds, each with its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bilevel.constraints import L1
from bilevel.errors import KinkWarning
from bilevel.estimators.blocks import KnownBlocks
from bilevel.estimators.newton import Table, fitted, logs_of
from bilevel.estimators.sparse import fitted_sparse
from bilevel.game import Game, Player
from bilevel.inner import ClosedForm
from bilevel.responses import Implicit

LOWEST, HIGHEST = 1e-5, 1e6
"""The range of a single penalty, in units of the rows' total count: features have variance 1."""
_FARTHEST = 12.0
_LEVELS = 2.0
"""The standard deviation of the common level of a likelihood's log penalties, around that of weights of variance 1."""


@dataclass(frozen=True, eq=False)
class Stack:
    r"""Cross-validated losses, each with penalties of its own, as one game.

    The leader has the logarithms of the penalties, the follower the weights in all folds:

    $$
    \min_{l, \delta}\; \frac{1}{c_s} \sum_k \sum_{i \in \text{fold } k} \ell(x_i^\top w_k^*, y_i)
        + \frac{|\delta|^2}{2 \sigma_s^2} + \frac{(l - \log v)^2}{2 \cdot 2^2}
    \qquad
    w_k^* = \arg\min_w \sum_{i \notin \text{fold } k} \ell(x_i^\top w, y_i) + \frac12 \sum_j e^{l + \delta_{g(j)}} w_j^2
    $$

    The last term, of the level, v being the features' mean square, is there for a likelihood alone: a model that
    separates the held-out rows of its folds loses the less the weaker its penalty is, whatever it makes of other rows.

    The follower of a sparse table has a term $\sum_j e^{l' + \delta'_{g(j)}} |w_j|$ as well, by its proximal map, with
    a level and deviations of its own.

    Args:
        table: The rows.
        train: How often fold k of stack s counts each row while it is fitted, `[stack, folds, n]`.
        valid: The same, while it is judged.
        spread: sigma, `[stack]`; 0 holds all deviations at 0.
        unit: c, `[stack]`: 1 for a negative log-likelihood.
    """

    table: Table
    train: Tensor
    valid: Tensor
    spread: Tensor
    unit: Tensor

    def optimum(self, logs: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weights `[stack, folds, q, m]` at penalties `logs: [stack, kinds * groups]`, and the folds' Hessians."""
        stack, folds, n = self.train.shape
        shape = (stack * folds, self.table.inputs.shape[1], self.table.targets.shape[1])
        begun = self.train.new_zeros(shape) if start is None else start.reshape(shape)
        counts, own = self.train.reshape(-1, n), self.table.penalties(logs).repeat_interleave(folds, 0)
        lasso = self.table.lasso(logs)
        if lasso is None:
            weights, matrices = fitted(self.table, counts, own, begun)
        else:
            with torch.no_grad():
                weights, matrices = fitted_sparse(self.table, counts, own, lasso.repeat_interleave(folds, 0), begun)
        return weights.view(stack, folds, *shape[1:]), matrices

    def losses(self, weights: Tensor) -> Tensor:
        """What all held-out rows lose together, `[stack]`."""
        rows = self.table.loss.rows(self.table.inputs @ weights, self.table.targets)
        lost: Tensor = (self.valid * rows).sum((-2, -1))
        return lost

    def prior(self, level: Tensor) -> Tensor:
        """What a common level `[..., kinds]` costs by itself, `[...]`: it is judged in units of the features' size."""
        if not self.table.loss.likelihood:
            return level.new_zeros(level.shape[:-1])
        return 0.5 * ((level - self.table.size.log()) / _LEVELS).square().sum(-1)

    def game(self, level: Tensor, deviation: Tensor) -> Game:
        """The game from these logarithms: `level: [stack, kinds]`, `deviation: [stack, kinds * groups]`."""
        # A deviation that is held has no term, whatever number stands here.
        spread = torch.where(self.spread > 0.0, self.spread, 1.0)[:, None]

        def held_out(penalties: Any, weights: Tensor) -> Tensor:
            prior = 0.5 * (penalties["deviation"] / spread).square().sum(-1) + self.prior(penalties["level"])
            total: Tensor = (self.losses(weights) / self.unit + prior).sum()
            return total

        def penalised(penalties: Any, weights: Tensor) -> Tensor:
            own = self.table.penalties(logs_of(penalties))[:, None]
            return self.table.objective(weights, self.train, own).sum()

        def absolute(penalties: Any) -> Tensor:
            lasso = self.table.lasso(logs_of(penalties))
            assert lasso is not None
            return lasso[:, None, :, None]

        start = torch.zeros(*self.train.shape[:2], self.table.inputs.shape[1], self.table.targets.shape[1])
        return Game(
            penalties=Player(held_out, {"level": level, "deviation": deviation}),
            weights=Player(penalised, start.to(self.train), prox=L1(absolute) if self.table.sparse else None),
        )

    def hypergradient(
        self, game: Game, level: Tensor, deviation: Tensor, start: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The leader's total loss, its derivatives by name, and the weights, from which the next call may start.

        The weights are exact, and so is the linear solve: Newton's last matrices are the folds' own. The response
        measures both.
        """
        leader = {"level": level.clone().requires_grad_(), "deviation": deviation.clone().requires_grad_()}
        found, matrices = self.optimum(logs_of({"level": level, "deviation": deviation}), start)
        response = Implicit(ClosedForm(lambda: found), tolerance=1e-6, linear_solver=KnownBlocks(matrices=matrices))
        state = response.init(game)
        if self.table.sparse:
            known = KnownBlocks(matrices=self._on_support(matrices, found, leader, float(state["scale"])))
            response = replace(response, linear_solver=known)
        with warnings.catch_warnings():
            # A loss with kinks mostly has its least value at one: a search ends there, by one-sided derivatives.
            warnings.simplefilter("ignore", KinkWarning)
            weights, _ = response(game, {"penalties": leader}, state)
        loss = game.loss("penalties", {"penalties": leader, "weights": weights}, None)
        slopes = torch.autograd.grad(loss, list(leader.values()))
        return loss.detach(), dict(zip(leader, slopes, strict=True)), found

    def _on_support(self, matrices: Tensor, weights: Tensor, penalties: Mapping[str, Tensor], step: float) -> Tensor:
        """The transposed derivative of the prox residual in the weights, from Hessians `[blocks, q, q]`.

        Where a step from a weight leads away from 0 the residual is its slope, as the sign of the absolute value does
        not move; else it is the weight itself over the step. A weight of 0 whose slope is the penalty, up to what the
        fit leaves, is at a kink: then the step decides, as it does in the residual.
        """
        blocks, counts = weights.flatten(0, 1)[..., 0], self.train.flatten(0, 1)
        lasso = self.table.lasso(logs_of({name: log.detach() for name, log in penalties.items()}))
        assert lasso is not None
        threshold = step * lasso.repeat_interleave(len(blocks) // len(lasso), 0)
        correlated = (self.table.inputs.mT @ (counts[..., None] * self.table.targets))[..., 0]
        slopes = (matrices @ blocks[..., None])[..., 0] - correlated
        moves = (blocks - step * slopes).abs() > threshold
        out = torch.eye(matrices.shape[1], dtype=matrices.dtype) / step
        return torch.where(moves[:, :, None], matrices, out).mT

    def descended(self, level: Tensor, deviation: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
        """Level and deviations where L-BFGS ends, from these."""
        game, moves = self.game(level, deviation), (self.spread > 0.0)[:, None]
        weights: Tensor | None = None
        stack, kinds = level.shape

        def evaluated(flat: Any) -> tuple[float, Any]:
            nonlocal weights
            both = torch.from_numpy(np.ascontiguousarray(flat)).to(level).view(stack, -1)
            loss, slopes, weights = self.hypergradient(game, both[:, :kinds], both[:, kinds:] * moves, weights)
            slope = torch.cat([slopes["level"], slopes["deviation"] * moves], dim=1)
            return float(loss), slope.reshape(-1).numpy()

        start = torch.cat([level, deviation * moves], dim=1)
        size = float(self.train[0].sum(-1).max())
        low, high = np.log(LOWEST * size), np.log(HIGHEST * size)
        bounds = [(low, high) if j < kinds else (-_FARTHEST, _FARTHEST) for j in range(start.shape[1])] * stack
        done = minimize(
            evaluated,
            start.reshape(-1).numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": steps, "ftol": 1e-9, "gtol": 1e-4},
        )
        both = torch.from_numpy(done.x).to(level).view(stack, -1)
        return both[:, :kinds], both[:, kinds:] * moves


def best_level(stack: Stack, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The point of `grid: [points, kinds]` of least cross-validated loss and prior, `[stack, kinds]`, and these.

    Each point's optimum starts at that of the one before: strong penalties, which end near 0, should come first.
    """
    groups = int(stack.table.groups.max()) + 1
    losses, weights = [], None
    for point in grid:
        weights, _ = stack.optimum(point.repeat_interleave(groups).expand(len(stack.train), -1), weights)
        losses.append(stack.losses(weights) + stack.prior(point))
    found = torch.stack(losses).min(0)
    return grid[found.indices], found.values
