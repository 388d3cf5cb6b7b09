"""The truth that every learned curve is drawn against: weights retrained to convergence at each penalty."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from games.cross_validation import CrossValidation, grid
from games.experiments.data import DigitSource
from games.experiments.experiment import Result
from games.paper.seed_game import seed_game

TRAIN, VALID = 10, 2500
"""The paper's ten training images; its 10,000 validation images are half of the sample here."""


def cross_validated(source: DigitSource, *, values: Sequence[float], seed: int) -> Result:
    """Algorithm 1 on the paper's game, in float64: both losses at each log penalty of `values`."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed, dtype=torch.float64)
    game = seed_game(digits.train, digits.valid, start=1.0, seed=seed)
    found = CrossValidation()(game, grid(game, {"decay": values}))
    return {
        "values": [float(value) for value in values],
        "valid": found.leader_losses,
        "train": found.follower_losses,
        "stationarity": found.stationarity,
        "gradients": found.gradients,
        "best": found.best["decay"],
    }


def evenly_spaced(count: int, low: float = -1.0, high: float = 3.0) -> list[float]:
    """`count` evenly spaced log penalties, ends included."""
    return [round(low + (high - low) * index / (count - 1), 6) for index in range(count)]
