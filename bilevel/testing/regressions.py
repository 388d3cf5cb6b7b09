"""Regressions tuned on other examples: families of leader-follower games with known answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.testing.known import DOUBLE, KnownGame, Matrix, Numbers, constant, polished


@final
@dataclass(frozen=True)
class Ridge(KnownGame):
    r"""Ridge regression with one penalty a weight, tuned on other examples.

    $$
    f = \tfrac12 \operatorname{mean} (A w - b)^2 + \tfrac12 \sum_i e^{x_i} w_i^2, \qquad
    g = \tfrac12 \operatorname{mean} (C w - d)^2
    $$

    A is scaled so that the largest eigenvalue of $A^\top A / \text{rows}$ is 1/2; penalties in x of up to $\log
    \tfrac12$ keep the curvature below 1.

    Args:
        train: (A, b) as rows $(a_1, \dots, a_n, b)$ `[rows, n + 1]`.
        valid: (C, d) in the same form.
        at: Where the leader stands `[n]`: log penalties.
        radius: How far from its optimum the follower starts.
    """

    train: Matrix
    valid: Matrix
    at: Numbers
    radius: float = 1.0

    @property
    def x0(self) -> Tensor:
        """Where the leader stands: log penalties."""
        return constant(self.at, DOUBLE)

    def _data(self, rows: Matrix, like: Tensor) -> tuple[Tensor, Tensor]:
        table = constant(rows, like)
        inputs, outputs = table[:, :-1], table[:, -1]
        reach = torch.linalg.matrix_norm(inputs, 2) * (2.0 / len(rows)) ** 0.5
        return inputs / reach.clamp_min(1e-12), outputs

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        inputs, outputs = self._data(self.valid, x)
        loss: Tensor = 0.5 * (inputs @ y - outputs).square().mean()
        return loss

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        inputs, outputs = self._data(self.train, x)
        return 0.5 * (inputs @ y - outputs).square().mean() + 0.5 * (x.exp() * y.square()).sum()

    def best_response(self, x: Tensor) -> Tensor:
        """(A'A / rows + diag exp x)^-1 A'b / rows."""
        inputs, outputs = self._data(self.train, x)
        gram = inputs.T @ inputs / len(self.train) + torch.diag(x.exp())
        answer: Tensor = torch.linalg.solve(gram, inputs.T @ outputs / len(self.train))
        return answer


@final
@dataclass(frozen=True)
class Logistic(KnownGame):
    r"""Logistic regression with one penalty a weight, tuned on other examples.

    $$
    f = \operatorname{mean} \log(1 + e^{-b A w}) + \tfrac12 \sum_i e^{x_i} w_i^2, \qquad
    g = \operatorname{mean} \log(1 + e^{-d C w})
    $$

    A is scaled as in `Ridge`. The best response is found by Newton's method to rounding.

    Args:
        train: (A, b) as rows $(a_1, \dots, a_n, b)$ `[rows, n + 1]`, with b -1 or 1.
        valid: (C, d) in the same form.
        at: Where the leader stands `[n]`: log penalties.
        radius: How far from its optimum the follower starts.
    """

    train: Matrix
    valid: Matrix
    at: Numbers
    radius: float = 1.0

    @property
    def x0(self) -> Tensor:
        """Where the leader stands: log penalties."""
        return constant(self.at, DOUBLE)

    def _signed(self, rows: Matrix, like: Tensor) -> Tensor:
        """The inputs, each row times its label."""
        table = constant(rows, like)
        inputs = table[:, :-1]
        reach = torch.linalg.matrix_norm(inputs, 2) * (0.5 / len(rows)) ** 0.5
        signed: Tensor = table[:, -1:] * inputs / reach.clamp_min(1e-12)
        return signed

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """g."""
        return softplus(-(self._signed(self.valid, x) @ y)).mean()

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """f."""
        return softplus(-(self._signed(self.train, x) @ y)).mean() + 0.5 * (x.exp() * y.square()).sum()

    def best_response(self, x: Tensor) -> Tensor:
        """argmin f, by Newton's method."""
        inputs, count = self._signed(self.train, x), len(self.train)

        def slope(x: Tensor, y: Tensor) -> Tensor:
            return -inputs.T @ torch.sigmoid(-(inputs @ y)) / count + x.exp() * y

        def hessian(x: Tensor, y: Tensor) -> Tensor:
            share = torch.sigmoid(inputs @ y)
            return inputs.T @ ((share * (1.0 - share))[:, None] * inputs) / count + torch.diag(x.exp())

        return polished(x, torch.zeros(len(self.at), dtype=x.dtype, device=x.device), slope, hessian)
