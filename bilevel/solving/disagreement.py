"""Whether two ways to a hypergradient, looked at a few times, disagree by more than their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOOKS = 5
"""So many looks at most where a hypergradient is noisy."""

BEYOND = 2.0
"""In standard errors: what is further from zero than that is no noise."""

SMALLEST = 1e-3
"""A hypergradient so many times below the first step's says that the leader has arrived, and not which way to go."""

RIGHT_WAY = 0.9
"""A cosine above which a hypergradient that is too long leads where it should."""


@dataclass(frozen=True)
class Disagreement:
    """By how much the mean of the nearer hypergradients is another one than the mean of the farther ones.

    Args:
        missing: the share of the farther one's norm by which they differ.
        cosine: between them.
        near: norm of the nearer one.
        far: norm of the farther one.
    """

    missing: float
    cosine: float
    near: float
    far: float


def disagreement(
    near: Sequence[Tensor], far: Sequence[Tensor], tolerance: float, first: float, *, smallest: float = SMALLEST
) -> Disagreement | None:
    """That of looks `[n]` by either way, where it is more than `tolerance`; `first` is the norm in the first step."""
    a, b = mean_of(near), mean_of(far)
    size, own = float(torch.linalg.vector_norm(b)), float(torch.linalg.vector_norm(a))
    if not smallest * first < size < math.inf:
        return None
    missing = float(torch.linalg.vector_norm(b - a)) / size
    if not missing > tolerance:
        return None
    cosine = float(a @ b) / (own * size or 1.0)
    if cosine > RIGHT_WAY and own > size:  # longer, the same way: no edge lies there
        return None
    return Disagreement(missing, cosine, own, size)


def beyond_noise(near: Sequence[Tensor], far: Sequence[Tensor], tolerance: float, games: int = 1) -> bool:
    r"""Whether noisy looks know both the farther hypergradient, and that more than `tolerance` of it is missing.

    Products of different looks have no bias by noise, as squares have: with differences $d_l$ and farther
    hypergradients $f_l$ the means of $d_l^\top d_m - \tau^2 f_l^\top f_m$ and of $f_l^\top f_m$ over $l \ne m$ have the
    expectations $|E d|^2 - \tau^2 |E f|^2$ and $|E f|^2$. Both are to lie beyond their standard errors. Those are
    twice those of a look's mean with the others (Hoeffding 1948). Among many `games` some are beyond any bound by
    chance: Student's t of five looks exceeds a bound c with a probability that falls as $c^{-4}$, and the bound grows
    so that all games together exceed it no oftener than one.
    """
    b = torch.stack(list(far)).double()
    d = b - torch.stack(list(near)).double()
    bound = BEYOND * games ** (1.0 / (LOOKS - 1))
    return _sure(d @ d.T - tolerance**2 * (b @ b.T), bound) and _sure(b @ b.T, bound)


def mean_of(looks: Sequence[Tensor]) -> Tensor:
    """Their mean `[n]`."""
    return torch.stack(list(looks)).mean(0)


def _sure(products: Tensor, bound: float) -> bool:
    """Whether the mean of `products: [looks, looks]` off the diagonal is positive beyond its spread."""
    count = len(products)
    rows = (products.sum(1) - products.diagonal()) / (count - 1)
    return float(rows.mean()) > bound * 2.0 * float(rows.std()) / math.sqrt(count)
