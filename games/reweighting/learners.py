"""What is trained on weighted examples: a softmax classifier at its optimum, or a small network by plain steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl


class Learner(ABC):
    """How a model of `features` to `classes` is made, trained at fixed weights, and followed as these move.

    All three minimise the same loss: sum_i w_i CE_i / sum_i w_i + `decay` |z|^2.
    """

    decay: float
    batch_size: int | None

    @abstractmethod
    def model(self, features: int, classes: int, dtype: torch.dtype) -> nn.Module:
        """A model that nobody has trained, always the same one."""

    @abstractmethod
    def trained(self, inputs: Tensor, labels: Tensor, weights: Tensor, classes: int) -> nn.Module:
        """The model trained on `inputs: [n, features]`, `labels: [n]` at `weights: [n]`."""

    @abstractmethod
    def response(self) -> bl.Response | None:
        """For `reweight`; None is its default, the optimum."""


@final
@dataclass(frozen=True)
class Softmax(Learner):
    """A linear softmax classifier at its optimum, in float64: in less, L-BFGS stalls."""

    decay: float = 1e-2
    batch_size: int | None = None

    def model(self, features: int, classes: int, dtype: torch.dtype) -> nn.Module:
        """From zero."""
        made = nn.Linear(features, classes, dtype=dtype)
        for parameter in made.parameters():
            nn.init.zeros_(parameter)
        return made

    def trained(self, inputs: Tensor, labels: Tensor, weights: Tensor, classes: int) -> nn.Module:
        """By L-BFGS, to a thousandth of the gradient at zero."""
        inputs, weights = inputs.double(), weights.double()
        zero = torch.zeros((), dtype=inputs.dtype)

        def loss(unused: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            losses = cross_entropy(inputs @ weight.T + bias, labels, reduction="none")
            return (weights * losses).sum() / weights.sum() + self.decay * (weight.square().sum() + bias.square().sum())

        model = self.model(inputs.shape[1], classes, torch.float64)
        game = bl.Game(
            unused=bl.Player(lambda unused: unused**2, zero),
            model=bl.Player(lambda unused, model: loss(unused, **model) + 0.0 * unused, model),
        )
        response = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-3)
        answer, _ = response(game, {"unused": zero}, response.init(game))
        model.load_state_dict({name: tensor.detach() for name, tensor in answer.items()})
        return model

    def response(self) -> bl.Response | None:
        """The optimum."""
        return None


@final
@dataclass(frozen=True)
class Perceptron(Learner):
    """One hidden layer of ReLUs, trained by `epochs` of SGD with momentum, its rate falling to 0 along a cosine.

    Followed by `unrolled` steps of the same SGD at its full rate from where the model was.
    """

    hidden: int = 64
    decay: float = 1e-4
    batch_size: int | None = 128
    rate: float = 0.1
    epochs: int = 40
    unrolled: int = 20

    def model(self, features: int, classes: int, dtype: torch.dtype) -> nn.Module:
        """torch's own weights, of seed 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = nn.Sequential(nn.Linear(features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, classes))
        return made.to(dtype)

    def trained(self, inputs: Tensor, labels: Tensor, weights: Tensor, classes: int) -> nn.Module:
        """By plain torch."""
        model, chance = self.model(inputs.shape[1], classes, inputs.dtype), torch.Generator().manual_seed(0)
        size = self.batch_size or len(labels)
        optimizer = self._optimizer(model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * -(-len(labels) // size))
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(labels), generator=chance), size):
                losses = cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
                penalty = torch.stack([p.square().sum() for p in model.parameters()]).sum()
                # By the mean weight of all: a batch may have none.
                loss = (weights[rows] * losses).mean() / weights.mean() + self.decay * penalty
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        return model

    def response(self) -> bl.Response | None:
        """Its own steps, differentiated."""
        return bl.Unrolled(self._optimizer, steps=self.unrolled)

    @property
    def _optimizer(self) -> partial[torch.optim.SGD]:
        return partial(torch.optim.SGD, lr=self.rate, momentum=0.9)
