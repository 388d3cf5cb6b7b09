"""Flat networks for a learned response: from a displacement of the others' variables to one of the follower's.

Each is a callable `(inputs, outputs) -> nn.Module` that maps `[..., inputs]` to `[..., outputs]`; write your own the
same way. All start at zero output, so that a response starts where the follower does. For millions of weights see
`leafwise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn


@final
@dataclass(frozen=True)
class Linear:
    """A dense matrix: the best response of every quadratic game, and to first order of every smooth one.

    inputs * outputs parameters: 0.25 GB for 7,850 x 7,850 in float32, 1 GB with gradient and Adam's memory, and 1.7 GB
    with the copies of a call.
    """

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        """The network."""
        return _zeroed(nn.Linear(inputs, outputs, bias=False))


@final
@dataclass(frozen=True)
class LowRank:
    """A linear map through a bottleneck: (inputs + outputs) * rank parameters (arXiv 1802.09419, section 4.3).

    It can only tell `rank` directions of the others' variables apart.
    """

    rank: int = 10

    def __post_init__(self) -> None:
        """Refuse a rank that tells nothing apart."""
        if self.rank < 1:
            raise ValueError(f"LowRank: rank={self.rank}; expected at least 1, the directions that it tells apart.")

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        """The network."""
        return nn.Sequential(
            nn.Linear(inputs, self.rank, bias=False), _zeroed(nn.Linear(self.rank, outputs, bias=False))
        )


@final
@dataclass(frozen=True)
class MLP:
    """A ReLU network with hidden layers, for a response over a wide range (Algorithm 2 of arXiv 1802.09419)."""

    hidden: tuple[int, ...] = (50,)

    def __post_init__(self) -> None:
        """Refuse a layer without units, which would hide the leader from the answer."""
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"MLP: hidden={self.hidden}; expected widths of at least 1.")

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        """The network."""
        layers: list[nn.Module] = []
        for width in self.hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, _zeroed(nn.Linear(inputs, outputs)))


class _Elementwise(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.slope


@final
@dataclass(frozen=True)
class Elementwise:
    """Each of the follower's entries answers its own hyperparameter alone: a diagonal Jacobian, n parameters.

    For one hyperparameter a weight (decay, say), laid out alike. Interactions between weights are left out.
    """

    def __call__(self, inputs: int, outputs: int) -> nn.Module:
        """The network; raises `ValueError` unless there is one input for each output."""
        if inputs != outputs:
            raise ValueError(
                f"Elementwise pairs each hyperparameter with one of the follower's entries, but there are {inputs} "
                f"and {outputs}. Use Linear(), LowRank(rank) or your own network."
            )
        return _Elementwise(inputs)


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
