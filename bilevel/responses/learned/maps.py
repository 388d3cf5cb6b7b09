"""A learned map as a function of its numbers: w0, a network's weights, and a displacement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel.tree import Structure

Weights = Mapping[str, Tensor]


class LearnedMap(ABC):
    """y(u), the follower's leaves at a displacement u of the others' variables, in units of a perturbation's length."""

    centred: bool
    """Whether y(0) is w0, whatever the weights are."""

    @property
    @abstractmethod
    def batched(self) -> bool:
        """Whether u may be `[rows, inputs]`; the leaves are then `[rows, *shape]`."""

    @abstractmethod
    def __call__(self, w0: Sequence[Tensor], weights: Weights, u: Tensor) -> list[Tensor]:
        """The leaves at `u: [inputs]`; differentiable in w0, with the slope held, in the weights and in u."""


@final
@dataclass(frozen=True)
class FlatMap(LearnedMap):
    """By a network from `[..., inputs]` to one flat vector `[..., n]` of all leaves."""

    network: nn.Module
    form: Structure
    centred: bool

    @property
    def batched(self) -> bool:
        """It may."""
        return True

    def __call__(self, w0: Sequence[Tensor], weights: Weights, u: Tensor) -> list[Tensor]:
        """w0 + net(u) - net(0), or w0 + net(u) when it is not centred."""
        rows = u.reshape(-1, u.shape[-1])
        if self.centred:
            # The origin rides along as one more row: a second pass would cost a second gradient of every weight.
            moved = functional_call(self.network, dict(weights), (torch.cat([rows, torch.zeros_like(rows[:1])]),))
            moved = moved[:-1] - moved[-1]
        else:
            moved = functional_call(self.network, dict(weights), (rows,))
        parts = moved.split([shape.numel() for shape in self.form.shapes], dim=-1)
        return [leaf + part.reshape((*u.shape[:-1], *leaf.shape)) for leaf, part in zip(w0, parts, strict=True)]


@final
@dataclass(frozen=True)
class LeafMap(LearnedMap):
    """By a network that moves each leaf by itself, and is w0 at u = 0."""

    network: nn.Module
    centred: bool = field(default=True, init=False)

    @property
    def batched(self) -> bool:
        """One displacement at a time: a second one would be a second set of all leaves."""
        return False

    def __call__(self, w0: Sequence[Tensor], weights: Weights, u: Tensor) -> list[Tensor]:
        """The network's leaves, each with the identity as its derivative in w0."""
        moved = functional_call(self.network, dict(weights), (u, [leaf.detach() for leaf in w0]))
        return [_Held.apply(leaf, answer) for leaf, answer in zip(w0, moved, strict=True)]  # type: ignore[no-untyped-call]


class _Held(torch.autograd.Function):
    """The answer, as though it were w0 plus a displacement that does not depend on w0.

    W0 then steps along the follower's gradient at the answer, whatever the network takes its directions from, and no
    tensor of the leaf's size is written for it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(leaf: Tensor, answer: Tensor) -> Tensor:
        return answer.view_as(answer)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        return slope, slope
