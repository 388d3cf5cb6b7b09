"""A learned map as a function of its numbers: w0, a network's parameters, and a displacement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel.autodiff import transforms_left
from bilevel.networks.flat import FlatNetwork, ModuleFactory, Parameters, Uncentred
from bilevel.networks.leafwise import LeafNetwork
from bilevel.randomness import random_kept
from bilevel.tree import Structure

Network = FlatNetwork | LeafNetwork | Uncentred | nn.Module | ModuleFactory
"""What may be given as a learned response's network."""


class LearnedMap(ABC):
    """y(u), the follower's leaves at a displacement u of the others' variables, in units of a perturbation's length."""

    centred: bool
    """Whether y(0) is w0, whatever the parameters are."""

    @property
    @abstractmethod
    def batched(self) -> bool:
        """Whether u may be `[rows, inputs]`; the leaves are then `[rows, *shape]`."""

    @abstractmethod
    def __call__(self, w0: Sequence[Tensor], parameters: Parameters, u: Tensor) -> list[Tensor]:
        """The leaves at `u: [inputs]`; differentiable in w0, with the slope held, in the parameters and in u."""


def learned_map(network: Network, inputs: int, form: Structure) -> LearnedMap:
    """The map by a network from `inputs` entries to leaves of a form."""
    centred = not isinstance(network, Uncentred)
    network = network.network if isinstance(network, Uncentred) else network
    if isinstance(network, LeafNetwork):
        return LeafMap(network)
    if isinstance(network, FlatNetwork):
        return FlatMap(network, form, centred)
    return FlatMap(ModuleNetwork(module_form(network, inputs, form.size)), form, centred)


def start(network: Network, inputs: int, form: Structure) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters that a network starts with, and a module's buffers, which are constants."""
    network = network.network if isinstance(network, Uncentred) else network
    if isinstance(network, FlatNetwork):
        return _tensors(network, network.parameters(inputs, form.size)), {}
    if isinstance(network, LeafNetwork):
        return _tensors(network, network.parameters(inputs, form.shapes)), {}
    module = _module(network, inputs, form.size)
    return dict(module.named_parameters()), dict(module.named_buffers())


def start_on_meta(network: Network, inputs: int, form: Structure) -> dict[str, Tensor]:
    """The parameters' shapes, on the meta device where they take no memory."""
    network = network.network if isinstance(network, Uncentred) else network
    if isinstance(network, FlatNetwork | LeafNetwork):
        try:
            with torch.device("meta"):
                return start(network, inputs, form)[0]
        except RuntimeError:
            # Who computes with numbers of its own can only start for real.
            with random_kept():
                return start(network, inputs, form)[0]
    return dict(module_form(network, inputs, form.size).named_parameters())


def module_form(network: nn.Module | ModuleFactory, inputs: int, outputs: int) -> nn.Module:
    """A module whose numbers do not matter: the given one itself, or one that is made on the meta device."""
    if isinstance(network, nn.Module):
        return network
    # A vmap would refuse the numbers that a module draws while it is made.
    with transforms_left():
        try:
            with torch.device("meta"):
                return _module(network, inputs, outputs)
        except RuntimeError:
            # Who computes with numbers of its own while it is made can only be made whole.
            with random_kept():
                return _module(network, inputs, outputs).to("meta")


def shown(network: object) -> str:
    """A network as the user knows it: what makes one by its repr, a module by its kind, for its repr is a page."""
    return type(network).__name__ if isinstance(network, nn.Module) else repr(network)


def _module(network: nn.Module | ModuleFactory, inputs: int, outputs: int) -> nn.Module:
    module = network if isinstance(network, nn.Module) else network(inputs, outputs)
    if not isinstance(module, nn.Module):
        raise TypeError(f"Hypernetwork: network {shown(network)} made a {type(module).__name__}; expected a module.")
    return module


def _tensors(network: FlatNetwork | LeafNetwork, parameters: object) -> dict[str, Tensor]:
    if not isinstance(parameters, dict) or not all(isinstance(p, Tensor) for p in parameters.values()):
        raise TypeError(
            f"Hypernetwork: {network!r}.parameters(...) returned a {type(parameters).__name__}; expected a dict of "
            "tensors by name."
        )
    return parameters


@final
@dataclass(frozen=True)
class ModuleNetwork(FlatNetwork):
    """A module as a function of its parameters and buffers."""

    module: nn.Module

    def parameters(self, inputs: int, outputs: int) -> dict[str, Tensor]:
        """The module's own."""
        return dict(self.module.named_parameters())

    def __call__(self, parameters: Parameters, u: Tensor) -> Tensor:
        """The module, with these numbers in place of its own."""
        return functional_call(self.module, dict(parameters), (u,))  # type: ignore[no-any-return]


@final
@dataclass(frozen=True)
class FlatMap(LearnedMap):
    """By a network from `[rows, inputs]` to one flat vector `[rows, n]` of all leaves."""

    network: FlatNetwork
    form: Structure
    centred: bool

    @property
    def batched(self) -> bool:
        """It may."""
        return True

    def __call__(self, w0: Sequence[Tensor], parameters: Parameters, u: Tensor) -> list[Tensor]:
        """w0 + net(u) - net(0), or w0 + net(u) when it is not centred."""
        rows = u.reshape(-1, u.shape[-1])
        if self.centred:
            # The origin rides along as one more row: a second pass would cost a second gradient of every weight.
            moved = self.network(parameters, torch.cat([rows, torch.zeros_like(rows[:1])]))
            moved = moved[:-1] - moved[-1]
        else:
            moved = self.network(parameters, rows)
        parts = torch.split(moved, [shape.numel() for shape in self.form.shapes], dim=-1)
        return [leaf + part.reshape((*u.shape[:-1], *leaf.shape)) for leaf, part in zip(w0, parts, strict=True)]


@final
@dataclass(frozen=True)
class LeafMap(LearnedMap):
    """By a network that moves each leaf by itself, and is w0 at u = 0."""

    network: LeafNetwork
    centred: bool = field(default=True, init=False)

    @property
    def batched(self) -> bool:
        """One displacement at a time: a second one would be a second set of all leaves."""
        return False

    def __call__(self, w0: Sequence[Tensor], parameters: Parameters, u: Tensor) -> list[Tensor]:
        """The network's leaves, each with the identity as its derivative in w0."""
        moved = self.network(parameters, u, [leaf.detach() for leaf in w0])
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
