"""Where an example's weight comes from: a number of its own, or a network that sees the example and its label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.tree import Variables


class Weighting(ABC):
    """The leader of a reweighting game: its variables, and the weight that they give an example."""

    optimizer: OptimizerFactory

    @abstractmethod
    def init(self, inputs: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> Variables:
        """The leader's variables before the first step, at which all examples of a class weigh the same."""

    def penalty(self, variables: Variables) -> Tensor | float:
        """What is added to the clean loss, against overfitting the clean set."""
        return 0.0

    @abstractmethod
    def weights(self, variables: Variables, index: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Weights `[batch]` in (0, 1) of examples `index: [batch]` with `inputs: [batch, ...]`, `labels: [batch]`."""


@final
@dataclass(frozen=True)
class PerExample(Weighting):
    """sigmoid(x_i), one free number for each example.

    It can weigh only the examples that it was trained with, and overfits the clean set as steps go on: with n numbers
    and a few hundred clean examples, the first steps carry most of what there is to know. Hence plain SGD, which moves
    each number by its own hypergradient; Adam would move all alike. The hypergradient of one weight is of the order
    1 / n: `optimizer`'s learning rate is in units of n.
    """

    optimizer: OptimizerFactory = field(default_factory=lambda: partial(torch.optim.SGD, lr=0.1, momentum=0.5))

    def init(self, inputs: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> Variables:
        """Zeros `[n]`: every weight 1/2."""
        return torch.zeros(len(labels), dtype=inputs.dtype, device=inputs.device)

    def weights(self, variables: Variables, index: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """sigmoid(n x_i), so that a step does not depend on how many examples there are."""
        return torch.sigmoid(variables.shape[0] * variables[index])


@final
@dataclass(frozen=True)
class LabelNetwork(Weighting):
    """softmax(network(inputs))[label]: how much a network believes the label that an example came with.

    It generalises: an example that was not there in training gets its weight from what it looks like. `network` maps
    `[batch, ...]` to `[batch, classes]`; None is a linear map of the flattened inputs, from zero. `decay` times its
    squared norm is added to the clean loss, so that it does not learn a few hundred clean examples by heart.
    """

    network: nn.Module | None = None
    decay: float = 1e-3
    optimizer: OptimizerFactory = field(default_factory=lambda: partial(torch.optim.Adam, lr=0.02))

    def init(self, inputs: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> Variables:
        """The network's own parameters, or zeros: every weight 1 / classes."""
        if self.network is not None:
            return {name: p.detach().clone() for name, p in self.network.named_parameters()}
        features = inputs[0].numel()
        return {"weight": inputs.new_zeros(classes, features), "bias": inputs.new_zeros(classes)}

    def penalty(self, variables: Variables) -> Tensor | float:
        """Squared norm."""
        return self.decay * torch.stack([p.square().sum() for p in variables.values()]).sum()

    def weights(self, variables: Variables, index: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """The label's share of the softmax."""
        if self.network is None:
            scores = nn.functional.linear(inputs.flatten(1), variables["weight"], variables["bias"])
        else:
            scores = functional_call(self.network, variables, (inputs,))
        return torch.softmax(scores, 1).gather(1, labels[:, None])[:, 0]
