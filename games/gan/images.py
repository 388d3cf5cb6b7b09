"""Generators of digits, judged by a classifier's features: how far are they from real ones, and real from real?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from games.experiments.data import Digits, DigitSource, scikit_digits
from games.experiments.experiment import Result
from games.gan.adversarial import Draws, adversarial_game, perceptron
from games.gan.methods import Setting
from games.gan.run import run_method

LATENT, SHOWN = 16, 20
PENALTY = 1.0
"""Of the discriminator's slope at real images, for every method: without it digits are lost as play goes on."""

SIZES = {"digits": (898, 899), "mnist": (2500, 2500)}
"""How many real examples the generator and the classifier see, and how many are held out to judge by."""


@dataclass(frozen=True, eq=False)
class Judge:
    """A classifier of real images, its features, and what real images themselves score.

    `features(images)` `[n, 32]` are its last hidden layer. `frechet(images)` is the Frechet distance between Gaussians
    of those features, of the images and of held-out real ones: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), as of Heusel
    et al. 2017 (arXiv 1706.08500), whose network is another: numbers compare only under one judge. `floor` is that of
    the real training images, as many as the samples; `accuracy` the classifier's on held-out ones.
    """

    body: nn.Module
    head: nn.Module
    real: Tensor
    floor: float
    accuracy: float

    @torch.no_grad()
    def frechet(self, images: Tensor) -> float:
        """Of images `[n, pixels]`."""
        return frechet(self.body(images).double(), self.body(self.real).double())

    @torch.no_grad()
    def classes(self, images: Tensor) -> int:
        """How many classes at least a tenth of their fair share of images is taken for."""
        predicted = self.head(self.body(images)).argmax(1)
        shares = torch.bincount(predicted, minlength=10).double() / len(images)
        return int((shares >= 0.1 / len(shares)).sum())


def frechet(first: Tensor, second: Tensor) -> float:
    """The Frechet distance of the Gaussians fitted to two samples of features `[n, k]`, float64.

    >>> x = torch.randn(1000, 3, dtype=torch.float64)
    >>> round(frechet(x, x + 2.0), 6)  # means 2 apart in each of 3 directions
    12.0
    """
    a, b = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(a)
    half = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(half @ b @ half).clamp(min=0.0).sqrt().sum()
    apart = (first.mean(0) - second.mean(0)).square().sum()
    return float(apart + a.trace() + b.trace() - 2.0 * cross)


def judged(train: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor, *, epochs: int = 60) -> Judge:
    """Train the classifier on real images `[n, pixels]`, always from the same weights; some seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = perceptron([train.shape[1], 128, 32, 32])[:-1]
        head = nn.Linear(32, 10)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-4)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(train)), 64):
                loss = cross_entropy(head(body(train[rows])), labels[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
    body.requires_grad_(False)
    head.requires_grad_(False)
    with torch.no_grad():
        accuracy = float((head(body(held)).argmax(1) == held_labels).double().mean())
        floor = frechet(body(train).double(), body(held).double())
    return Judge(body, head, held, floor, accuracy)


@cache
def _setup(source: DigitSource, images: str) -> tuple[Digits, Judge]:
    train, test = SIZES[images]
    if images == "digits":
        digits = scikit_digits(train=train - 10, valid=10, test=test)
    else:
        digits = source.digits(train=train - 10, valid=10, test=test)
    return digits, judged(digits.train.images, digits.train.labels, digits.test.images, digits.test.labels)


def image_run(
    source: DigitSource,
    *,
    images: str,
    method: str,
    rate: float,
    ratio: float,
    loss: str,
    seed: int,
    evaluations: int,
    moments: int = 6,
    keep_samples: bool = False,
) -> Result:
    """One generator of `images`: `moments` with `frechet` and `classes`; the judge's `floor` and `accuracy`."""
    digits, judge = _setup(source, images)
    real, pixels = digits.train.images, digits.train.images.shape[1]
    width = 128 if images == "digits" else 256
    torch.manual_seed(seed)
    generator = perceptron([LATENT, width, width, pixels], last=nn.Sigmoid())
    discriminator = perceptron([pixels, width, width, 1])

    def draw(count: int, chance: torch.Generator) -> Tensor:
        return real[torch.randint(len(real), (count,), generator=chance)]

    game = adversarial_game(generator, discriminator, Draws(draw, LATENT), loss=loss, penalty=PENALTY)
    latents = torch.randn(len(judge.real), LATENT, generator=torch.Generator().manual_seed(10_000 + seed))

    def measure(weights: dict[str, Tensor]) -> Result:
        with torch.no_grad():
            samples: Tensor = functional_call(generator, weights, (latents,))
        measured: Result = {"frechet": judge.frechet(samples), "classes": judge.classes(samples)}
        # As bytes: seven digits of a grey level show nothing.
        return measured | ({"samples": (255.0 * samples[:SHOWN]).round().int()} if keep_samples else {})

    setting = Setting(rate, ratio, loss)
    measurements = run_method(
        game, method, setting, generator, LATENT, evaluations=evaluations, seed=seed, moments=moments, measure=measure
    )
    return {
        "moments": measurements,
        "floor": judge.floor,
        "accuracy": judge.accuracy,
        "shape": list(digits.image_shape),
    }
