"""What penalties are worth once the weights are exactly their best response, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from games.experiments.data import Digits, DigitSource
from games.experiments.experiment import Result
from games.paper.converged import TRAIN, VALID
from games.paper.exact import best_response
from games.paper.seed_game import Batch, Weights, batch_of, valid_loss


def true_loss(decay: Tensor, train: Batch, valid: Batch) -> float:
    """Validation loss of the exact best response, float64."""
    return float(valid_loss(best_response(decay, train), valid))


def true_slope(decay: Tensor, train: Batch, valid: Batch, step: float = 1e-4) -> Tensor:
    """d valid_loss(w*(decay)) / d decay by central differences of exact best responses."""
    flat = decay.double().reshape(-1)
    slopes = []
    for index in range(len(flat)):
        move = torch.zeros_like(flat)
        move[index] = step
        ends = [true_loss((flat + sign * move).reshape(decay.shape), train, valid) for sign in (1.0, -1.0)]
        slopes.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64).reshape(decay.shape)


def best_on_grid(source: DigitSource, *, size: int, seed: int, count: int) -> Result:
    """The least true loss on a grid; with a penalty a class, the classes are problems of their own."""
    exact, train, valid = float64_digits(source, seed)
    low, high = (-1.0, 3.0) if size == 1 else (-8.0, 3.0)
    values = torch.linspace(low, high, count, dtype=torch.float64)
    losses = []
    for value in values:
        if size == 1:
            losses.append([true_loss(value, train, valid)])
            continue
        weights = best_response(value.expand(size), train)
        losses.append([float(valid_loss(of_class(weights, c), (valid[0], valid[1][:, [c]]))) for c in range(size)])
    best = values[torch.tensor(losses).argmin(dim=0)]
    best = best[0] if size == 1 else best
    test = valid_loss(best_response(best, train), batch_of(exact.test))
    return {"decay": best, "valid": true_loss(best, train, valid), "test": test}


def of_class(weights: Weights, label: int) -> Weights:
    """The weights of one class."""
    return {name: value[..., label : label + 1] for name, value in weights.items()}


def float64_digits(source: DigitSource, seed: int) -> tuple[Digits, Batch, Batch]:
    """The digits in float64 with their training and validation batch: what the truth is made of."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed, dtype=torch.float64)
    return digits, batch_of(digits.train), batch_of(digits.valid)
