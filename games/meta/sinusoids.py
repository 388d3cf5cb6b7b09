"""Few-shot regression of sine curves, by the protocol of Meta-SGD (Li et al. 2017, arXiv 1707.09835)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


@final
@dataclass(frozen=True)
class Sinusoids:
    r"""Batches of tasks \(y = A \sin(\omega x + b)\), drawn anew in each pass by torch's random numbers.

    A is uniform in [0.1, 5], omega in [0.8, 1.2], b in [0, pi], and x in [-5, 5].

    Args:
        shots: Examples of a task that its follower fits.
        queries: Examples that judge it.
        tasks: In a batch.
        batches: In a pass.
    """

    shots: int
    queries: int
    tasks: int
    batches: int = 1000

    def __iter__(self) -> Iterator[Batch]:
        return (drawn(self.tasks, self.shots, self.queries) for _ in range(self.batches))


def drawn(tasks: int, shots: int, queries: int, generator: torch.Generator | None = None) -> Batch:
    """A batch of tasks, `support` and `query` with inputs and targets `[tasks, examples, 1]`."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    amplitude, frequency, phase = (uniform(*ends, tasks, 1, 1) for ends in ((0.1, 5.0), (0.8, 1.2), (0.0, math.pi)))
    inputs = uniform(-5.0, 5.0, tasks, shots + queries, 1)
    targets = amplitude * torch.sin(frequency * inputs + phase)
    return {
        "support": (inputs[:, :shots], targets[:, :shots]),
        "query": (inputs[:, shots:], targets[:, shots:]),
    }


def network(seed: int) -> nn.Module:
    """1-40-40-1 with ReLUs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
