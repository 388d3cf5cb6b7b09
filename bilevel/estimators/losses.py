"""What a table's rows lose: smooth and convex in the scores, with the two derivatives that Newton's method takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True)
class RowLoss(ABC):
    """A loss of each row, from its scores `[..., n, m]` and targets `[n, m]`."""

    @abstractmethod
    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row, `[..., n]`."""

    @abstractmethod
    def derivatives(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes `[..., n, m]` and second derivatives `[..., n, m, m]` in the scores."""

    @property
    def quadratic(self) -> bool:
        """Whether one Newton step ends at the optimum."""
        return False

    @property
    def likelihood(self) -> bool:
        """Whether it is a negative log-likelihood in its own units; else it is measured in units of what is left."""
        return False

    @property
    def ridge(self) -> float:
        """The penalty of an intercept: as little as makes the optimum unique."""
        return 1e-6


@final
@dataclass(frozen=True)
class SquaredError(RowLoss):
    """Half the squared error of each output."""

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The sum over outputs."""
        return 0.5 * (scores - targets).square().sum(-1)

    def derivatives(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals, and ones."""
        slopes = scores - targets
        return slopes, torch.diag_embed(torch.ones_like(slopes))

    @property
    def quadratic(self) -> bool:
        """Yes."""
        return True

    @property
    def ridge(self) -> float:
        """None is needed."""
        return 0.0


@final
@dataclass(frozen=True)
class Logistic(RowLoss):
    """The log loss of two classes, `targets: [n, 1]` being 0 or 1."""

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        """log(1 + exp(score)) - target score."""
        return (softplus(scores) - targets * scores).sum(-1)

    def derivatives(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities less targets, and p (1 - p)."""
        found = scores.sigmoid()
        return found - targets, torch.diag_embed(found * (1.0 - found))

    @property
    def likelihood(self) -> bool:
        """Yes."""
        return True


@final
@dataclass(frozen=True)
class Softmax(RowLoss):
    """The log loss of m classes, `targets: [n, m]` being one-hot."""

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        """log sum exp(scores) less the score of the row's class."""
        return scores.logsumexp(-1) - (targets * scores).sum(-1)

    def derivatives(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities less targets, and diag(p) - p p'."""
        found = scores.softmax(-1)
        return found - targets, torch.diag_embed(found) - found[..., :, None] * found[..., None, :]

    @property
    def likelihood(self) -> bool:
        """Yes."""
        return True


@final
@dataclass(frozen=True)
class SquaredHinge(RowLoss):
    """Half the squared hinge of each class against the others, `targets: [n, m]` being -1 or 1."""

    def rows(self, scores: Tensor, targets: Tensor) -> Tensor:
        """max(0, 1 - target score)^2 / 2, summed over classes."""
        return 0.5 * (1.0 - targets * scores).clamp(min=0.0).square().sum(-1)

    def derivatives(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows within the margin; the second derivative jumps where a row enters it."""
        short = (1.0 - targets * scores).clamp(min=0.0)
        return -targets * short, torch.diag_embed((short > 0.0).to(scores))
