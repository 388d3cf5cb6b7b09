"""Flat networks of a learned response: from a displacement of the others' variables to one of the follower's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bilevel.errors import require_kinds

Parameters = Mapping[str, Tensor]
"""A network's numbers, by names of its own."""


class FlatNetwork(ABC):
    """A map from a vector of all the others' entries to one of all the follower's, as configuration.

    Its numbers are an argument. Those that it starts with should make it zero, so that a response starts where its
    follower does. A module, or a function that makes one, serves as well: see `Hypernetwork(network=)`. For millions
    of weights take a `LeafNetwork`.
    """

    @abstractmethod
    def parameters(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """The numbers that it starts with; random ones come from torch's global generator."""

    @abstractmethod
    def __call__(self, parameters: Parameters, u: Tensor) -> Tensor:
        """From rows `u: [rows, inputs]`, each of norm about one, to `[rows, outputs]`; differentiable in both."""


ModuleFactory = Callable[[int, int], nn.Module]
"""A function of (inputs, outputs) that makes a module from `[rows, inputs]` to `[rows, outputs]`."""


@final
@dataclass(frozen=True)
class Uncentred:
    r"""A flat network whose value at the leader's present variables is learned along with its slope.

    $$
    y(x) = w_0 + \operatorname{net}(x / s) \quad\text{in place of}\quad
    w_0 + \operatorname{net}\big((x - x_0) / s\big) - \operatorname{net}(0).
    $$

    For one map over a whole range, with a `sampler=` that draws from it. Fitted locally its slope is unreliable, and
    `Hypernetwork` warns of it. Raises `TypeError` for a `LeafNetwork`, which is centred by its nature.

    Examples:
        >>> Uncentred(MLP((32,)))
        Uncentred(network=MLP(hidden=(32,)))
    """

    network: FlatNetwork | nn.Module | ModuleFactory

    def __post_init__(self) -> None:
        if isinstance(self.network, type) or not (isinstance(self.network, FlatNetwork) or callable(self.network)):
            raise TypeError(
                f"Uncentred: network={self.network!r}; expected a flat one such as MLP((50,)), or a module."
            )


@final
@dataclass(frozen=True)
class Linear(FlatNetwork):
    r"""A dense matrix: the best response of every quadratic game, and to first order of every smooth one.

    $$
    \operatorname{net}(u) = W u, \qquad W \in \mathbb{R}^{\text{outputs} \times \text{inputs}}.
    $$

    It takes 0.25 GB for 7,850 x 7,850 entries in float32, 1 GB with its gradient and Adam's memory, and 1.7 GB with the
    copies of a call.
    """

    def parameters(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """A matrix of zeros."""
        return {"weight": torch.zeros(outputs, inputs)}

    def __call__(self, parameters: Parameters, u: Tensor) -> Tensor:
        """By one product."""
        return linear(u, parameters["weight"])


@final
@dataclass(frozen=True)
class LowRank(FlatNetwork):
    r"""A linear map through a bottleneck, which tells at most `rank` directions of the others' variables apart.

    $$
    \operatorname{net}(u) = P Q u, \qquad P \in \mathbb{R}^{\text{outputs} \times k},\;
    Q \in \mathbb{R}^{k \times \text{inputs}}.
    $$

    P starts at zero. Raises `ValueError` for a rank below 1. Source: Lorraine and Duvenaud 2018, section 4.3
    (arXiv 1802.09419).
    """

    rank: int = 10

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.rank < 1:
            raise ValueError(f"LowRank: rank={self.rank}; expected at least 1, the directions that it tells apart.")

    def parameters(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """Q as torch's linear layers start, P at zero."""
        first = nn.Linear(inputs, self.rank, bias=False)
        return {"first": first.weight.detach(), "last": torch.zeros(outputs, self.rank)}

    def __call__(self, parameters: Parameters, u: Tensor) -> Tensor:
        """By two products."""
        return linear(linear(u, parameters["first"]), parameters["last"])


@final
@dataclass(frozen=True)
class MLP(FlatNetwork):
    """A network with hidden layers of ReLU units, for a response over a wide range.

    Its last layer starts at zero. Raises `ValueError` for a layer without units, which would hide the leader from the
    answer. Source: Algorithm 2 of Lorraine and Duvenaud 2018 (arXiv 1802.09419).
    """

    hidden: tuple[int, ...] = (50,)

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"MLP: hidden={self.hidden}; expected widths of at least 1.")

    def parameters(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """As torch's linear layers start, and the last layer at zero."""
        found: dict[str, Tensor] = {}
        for index, width in enumerate(self.hidden):
            layer = nn.Linear(inputs, width)
            found |= {f"{index}.weight": layer.weight.detach(), f"{index}.bias": layer.bias.detach()}
            inputs = width
        return found | {"last.weight": torch.zeros(outputs, inputs), "last.bias": torch.zeros(outputs)}

    def __call__(self, parameters: Parameters, u: Tensor) -> Tensor:
        """Layer by layer."""
        for index in range(len(self.hidden)):
            u = linear(u, parameters[f"{index}.weight"], parameters[f"{index}.bias"]).relu()
        return linear(u, parameters["last.weight"], parameters["last.bias"])


@final
@dataclass(frozen=True)
class Elementwise(FlatNetwork):
    r"""Each of the follower's entries answers its own hyperparameter alone: a diagonal Jacobian.

    $$
    \operatorname{net}(u)_i = a_i u_i.
    $$

    For one hyperparameter a weight (decay, say), laid out alike; interactions between weights are left out. `init` of
    the response raises `ValueError` where the two are not equally many.
    """

    def parameters(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """Slopes of zero."""
        if inputs != outputs:
            raise ValueError(
                f"Elementwise pairs each hyperparameter with one of the follower's entries, but there are {inputs} "
                f"and {outputs}. Use Linear(), LowRank(rank) or your own network."
            )
        return {"slope": torch.zeros(inputs)}

    def __call__(self, parameters: Parameters, u: Tensor) -> Tensor:
        """Entry by entry."""
        return u * parameters["slope"]
