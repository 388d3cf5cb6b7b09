"""Mixtures of Gaussians in the plane, on which a generator's lost modes can be counted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """Equal shares of N(centre, std^2 I); `centres` `[k, 2]`. `name` is what tables call it."""

    name: str
    centres: Tensor
    std: float

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws `[count, 2]`."""
        which = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[which] + self.std * torch.randn(count, 2, generator=generator)

    def quality(self, samples: Tensor) -> Quality:
        """How samples `[n, 2]` compare; costs n * k distances. Raises `ValueError` for NaN, infinity or no samples."""
        if samples.ndim != 2 or len(samples) == 0 or not bool(samples.isfinite().all()):
            raise ValueError(f"Mixture.quality: samples of shape {list(samples.shape)}; expected finite [n, 2], n > 0.")
        distance, nearest = torch.cdist(samples, self.centres.to(samples)).min(1)
        good = distance <= 3.0 * self.std
        count, modes = len(samples), len(self.centres)
        counts = torch.bincount(nearest[good], minlength=modes)
        hit = counts >= max(1.0, 0.1 * count / modes)
        shares = counts.double() / max(1, int(good.sum()))
        present = shares[shares > 0.0]
        reverse_kl = float((present * (present * modes).log()).sum()) if len(present) else math.inf
        offsets = samples[good] - self.centres.to(samples)[nearest[good]]
        ratio = float(offsets.square().sum(1).mean()) / (2.0 * self.std**2) if len(offsets) else math.nan
        return Quality(int(hit.sum()), float(good.double().mean()), reverse_kl, ratio)


@dataclass(frozen=True)
class Quality:
    """What a generator's samples are worth.

    `modes`: centres that receive at least a tenth of their fair share of samples within 3 standard deviations.
    `high_quality`: the share of samples within 3 standard deviations of a centre (of real ones .989).
    `reverse_kl`: KL(shares of those samples by centre || equal shares), in nats: 0 is right, log k a single centre.
    `covariance_ratio`: their mean square distance to the centre over the real one: 1 is right (.95 for real samples,
    which lose their tails too), 0 a point.
    """

    modes: int
    high_quality: float
    reverse_kl: float
    covariance_ratio: float


def ring(count: int = 8, *, radius: float = 1.0, std: float = 0.01) -> Mixture:
    """Centres on a circle.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...
    >>> real = ring().quality(ring().sample(10_000))
    >>> real.modes, round(real.high_quality, 2), round(real.reverse_kl, 2), round(real.covariance_ratio, 2)
    (8, 0.99, 0.0, 0.95)
    """
    angles = torch.arange(count) * (2.0 * math.pi / count)
    return Mixture(f"ring of {count}", radius * torch.stack([angles.cos(), angles.sin()], 1), std)


def grid(side: int = 5, *, spacing: float = 2.0, std: float = 0.05) -> Mixture:
    """Centres on a square, `side` in a row."""
    line = spacing * (torch.arange(side) - 0.5 * (side - 1))
    return Mixture(f"grid of {side * side}", torch.cartesian_prod(line, line), std)
