"""A Gaussian process that sees values and slopes, with an additive kernel and a product beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (0.1, 0.2, 0.35, 0.6, 1.0, 1.8, 3.0)
ADDITIVE = (1.0, 0.7, 0.2)
NOISE = (1e-8, 1e-5, 1e-3, 1e-1)
CONSTANT = 100.0
"""What the likelihood chooses from: lengths in units of the box, the additive part's share unless told otherwise, noise
relative to the signal's variance. `CONSTANT` is the prior variance of the mean, in the same units."""


@dataclass(frozen=True)
class Kernel:
    r"""The covariance of values and slopes at points of the unit box.

    $$
    k(x, x') = c + \frac{s}{d} \sum_i e^{-(x_i - x_i')^2 / 2 \ell^2} + (1 - s)\, e^{-|x - x'|^2 / 2 d \ell^2}
    $$

    The sum lets a slope that was seen in one coordinate speak for it everywhere; the product has the interactions.
    Of a category only whether it is the same counts: in the sum 1 or 0, in the product a factor of \(e^{-1/d}\) for
    each that differs (their Hamming distance).

    `categories: [d]` says by True which coordinates are; default: none.
    """

    length: float
    additive: float
    categories: Tensor | None = None

    def blocks(self, a: Tensor, b: Tensor) -> Tensor:
        """Covariances of (value, slopes) at `a: [n, d]` and `b: [m, d]`: `[n, 1 + d, m, 1 + d]`."""
        n, m, d = len(a), len(b), a.shape[1]
        apart = a[:, None] - b[None]
        differs = torch.zeros_like(apart)
        if self.categories is not None:
            differs[:] = (apart != 0.0) & self.categories
            apart = apart.masked_fill(self.categories, 0.0)
        eye = torch.eye(d, dtype=a.dtype)
        ours, theirs = self.additive / d, 1.0 - self.additive
        narrow, wide = self.length**-2, self.length**-2 / d
        each = ours * (-0.5 * narrow * apart.square()).exp() * (1.0 - differs)
        whole = theirs * (-0.5 * wide * apart.square().sum(-1) - differs.sum(-1) / d).exp()
        found = a.new_empty(n, 1 + d, m, 1 + d)
        found[:, 0, :, 0] = CONSTANT + each.sum(-1) + whole
        first = narrow * apart * each + wide * apart * whole[..., None]  # d/db; d/da is its negative
        found[:, 0, :, 1:] = first
        found[:, 1:, :, 0] = -first.transpose(1, 2)
        own = torch.diag_embed((narrow - narrow**2 * apart.square()) * each)
        outer = wide * eye - wide**2 * apart[..., :, None] * apart[..., None, :]
        found[:, 1:, :, 1:] = (own + outer * whole[..., None, None]).transpose(1, 2)
        return found


@dataclass(frozen=True)
class Process:
    """The process after its observations: its mean, and the mean's slope, anywhere.

    `factor: [k, k]` is the Cholesky factor of what was seen, entries `known: [n (1 + d)]` of all values and slopes;
    `variance` scales the kernel.
    """

    kernel: Kernel
    points: Tensor
    weights: Tensor
    centre: float
    factor: Tensor
    known: Tensor
    variance: float

    def mean(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean `[m]` and its slopes `[m, d]` at `x: [m, d]`."""
        blocks = self.kernel.blocks(x, self.points).flatten(2)
        found = blocks @ self.weights
        return self.centre + found[:, 0], found[:, 1:]

    def doubt(self, x: Tensor, y: Tensor) -> Tensor:
        """The standard deviations `[m]` of the differences between the values at `x: [m, d]` and at `y: [m, d]`."""
        m, both = len(x), torch.cat([x, y])
        prior = self.kernel.blocks(both, both)[:, 0, :, 0]
        seen = self.kernel.blocks(both, self.points)[:, 0].flatten(1)[:, self.known]
        explained = torch.linalg.solve_triangular(self.factor, (seen[:m] - seen[m:]).T, upper=False).square().sum(0)
        spread = prior.diagonal()[:m] + prior.diagonal()[m:] - 2.0 * prior.diagonal(m)
        found: Tensor = (self.variance * (spread - explained).clamp(min=0.0)).sqrt()
        return found


def fitted(
    points: Tensor,
    values: Tensor,
    slopes: Tensor,
    categories: Tensor | None = None,
    additive: Sequence[float] = ADDITIVE,
) -> Process:
    """The process of the largest marginal likelihood, its variance in closed form.

    `points: [n, d]` in the unit box, `values: [n]`, `slopes: [n, d]`; NaN is a slope that was not seen, as all of
    `categories: [d]` are. `additive` has the shares to choose from. Costs 28 Cholesky factors of at most n (1 + d) rows
    for each of these.
    """
    centre = float(values.mean())
    seen = torch.cat([values[:, None] - centre, slopes], 1).reshape(-1)
    known = ~seen.isnan()
    told = seen[known]
    best, most = None, -math.inf
    for length, share in itertools.product(LENGTHS, additive):
        kernel = Kernel(length, share, categories)
        covariance = kernel.blocks(points, points).reshape(len(seen), len(seen))[known][:, known]
        # A slope's noise is in a slope's units.
        scale = covariance.diagonal().clone()
        scale[torch.arange(len(seen))[known] % (1 + points.shape[1]) == 0] = 1.0
        for noise in NOISE:
            factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag(noise * scale))
            if failed:
                continue
            weights = torch.cholesky_solve(told[:, None], factor)[:, 0]
            variance = float(told @ weights) / len(told)
            likelihood = -0.5 * len(told) * math.log(max(variance, 1e-300)) - float(factor.diagonal().log().sum())
            if likelihood > most:
                most, best = likelihood, (kernel, weights, factor, variance)
    if best is None:
        raise RuntimeError("No covariance of these points has a Cholesky factor.")  # the largest noise forbids it
    kernel, weights, factor, variance = best
    whole = torch.zeros_like(seen)
    whole[known] = weights
    # Losses that are all the same leave doubt all the same.
    return Process(kernel, points, whole, centre, factor, known, max(variance, 1e-20))
