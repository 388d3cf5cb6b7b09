"""Adversarial games whose answers are known: the Gaussian discriminator and the Dirac-GAN."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl


def gaussian_game(shift: float = 0.5, *, points: int = 40, dtype: torch.dtype = torch.float64) -> bl.Game:
    """A generator of N(t, 1) against data of N(0, 1), and a discriminator with the logit a x + b.

        discriminator: min over (a, b) of E_N(0,1) softplus(-(a x + b)) + E_N(t,1) softplus(a x + b)
        generator:     min over t of minus the discriminator's loss

    The best discriminator's logit is the log ratio of the densities, -t x + t^2 / 2: the exact response is
    t -> (a, b) = (-t, t^2 / 2). Expectations are Gauss-Hermite sums of `points` terms, exact far beyond float64's
    needs for |t| of a few units. Players: `t`, 0-d, and `discriminator` `[2]`.

    >>> game = gaussian_game()
    >>> exact = {"t": torch.tensor(0.8).double(), "discriminator": exact_discriminator(torch.tensor(0.8).double())}
    >>> bool(bl.certify(game, exact).by_name["follower's first order"].value < 1e-8)
    True
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    x = torch.tensor(nodes, dtype=dtype)
    share = torch.tensor(weights / math.sqrt(2.0 * math.pi), dtype=dtype)

    def discriminate(t: Tensor, discriminator: Tensor) -> Tensor:
        a, b = discriminator.unbind(-1)
        real, fake = a * x + b, a * (x + t) + b
        return (share * (softplus(-real) + softplus(fake))).sum()

    return bl.Game(
        t=bl.Player(lambda t, discriminator: -discriminate(t, discriminator), torch.tensor(shift, dtype=dtype)),
        discriminator=bl.Player(discriminate, torch.zeros(2, dtype=dtype)),
    )


def exact_discriminator(t: Tensor) -> Tensor:
    """(-t, t^2 / 2), `[2]`."""
    return torch.stack([-t, 0.5 * t.square()])


def dirac_game(penalty: float = 0.0) -> bl.Game:
    r"""The Dirac-GAN: data at 0, a generator at theta, a discriminator psi x, and an R1 gradient penalty.

        generator: softplus(-psi theta),    discriminator: softplus(psi theta) + penalty / 2 psi^2

    At its equilibrium (0, 0) the field's Jacobian has eigenvalues g / 2 +- sqrt(g^2 / 4 - 1) in units of 1/2 (for
    the sigmoid, whose slope at 0 is 1/2; g = 2 `penalty`): without a penalty plain play circles for ever.
    Source: Mescheder et al. 2018 (arXiv 1801.04406).
    """
    if not penalty >= 0.0:
        raise ValueError(f"dirac_game: penalty={penalty}; expected a number >= 0.")
    half = torch.tensor(0.5, dtype=torch.float64)
    return bl.Game(
        theta=bl.Player(lambda theta, psi: softplus(-psi * theta), half),
        psi=bl.Player(lambda theta, psi: softplus(psi * theta) + 0.5 * penalty * psi.square(), half),
    )
