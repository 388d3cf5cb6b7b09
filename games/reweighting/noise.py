"""Label noise and class imbalance, made on purpose, with the truth kept."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric(labels: Tensor, rate: float, *, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels `[n]` of which a share `rate` is replaced by another class, all alike; and which those are `[n]`, bool.

    >>> noisy, wrong = symmetric(torch.zeros(1000, dtype=torch.long), 0.4, classes=10)
    >>> int(wrong.sum()), bool((noisy[wrong] != 0).all())
    (400, True)
    """
    chosen, generator = _chosen(labels, rate, seed)
    moves = torch.randint(1, classes, labels.shape, generator=generator)
    return torch.where(chosen, (labels + moves) % classes, labels), chosen


def class_dependent(labels: Tensor, rate: float, *, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels `[n]` of which a share `rate` is replaced by the next class; and which those are `[n]`, bool."""
    chosen, _ = _chosen(labels, rate, seed)
    return torch.where(chosen, (labels + 1) % classes, labels), chosen


def long_tailed(labels: Tensor, ratio: float, *, classes: int, seed: int = 0) -> Tensor:
    """Which examples to keep `[kept]` so that class sizes fall geometrically, the last 1 / `ratio` of the first."""
    if not ratio >= 1.0:
        raise ValueError(f"long_tailed: ratio={ratio}; expected at least 1.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = []
    for label in range(classes):
        rows = order[labels[order] == label]
        share = ratio ** (-label / (classes - 1))
        kept.append(rows[: max(1, round(share * len(rows)))])
    return torch.cat(kept).sort().values


def _chosen(labels: Tensor, rate: float, seed: int) -> tuple[Tensor, torch.Generator]:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"label noise: rate={rate}; expected a share from 0 to below 1.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]] = True
    return chosen, generator
