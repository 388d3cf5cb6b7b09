"""A follower's steps, and how the derivative of where they end is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from bilevel.game import Follower, Game
from bilevel.inner.differentiable import DifferentiableOptimizer
from bilevel.inner.torch_optim import Memory, OptimizerFactory
from bilevel.tree import Variables, map_leaves


@dataclass(frozen=True)
class Point:
    """Where a follower is between two steps: its leaves and its optimiser's memory, None before the first step."""

    y: list[Tensor]
    memory: Memory | None

    def detached(self) -> Point:
        """The same values, outside any graph."""
        return Point([leaf.detach() for leaf in self.y], detach_memory(self.memory))


def detach_memory(memory: Memory | None) -> Memory | None:
    """An optimiser's memory, outside any graph."""
    if memory is None:
        return None
    return [map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, slot) for slot in memory]


@dataclass(frozen=True)
class Followed:
    """Where the steps end, attached to what they depend on, and the work that its derivative takes.

    `gradients` are those beyond one a step; `products` are Hessian-vector products, made now or in one backward pass.
    """

    end: Point
    gradients: int
    products: int


class Steps:
    """The steps of one call: they draw batches, advance buffers and are counted in `follower`."""

    def __init__(self, factory: OptimizerFactory, follower: Follower, others: Mapping[str, Variables]) -> None:
        self.factory, self.follower, self.others = factory, follower, others
        self.loss: Tensor
        self.slopes: list[Tensor]
        self._drawn = True  # the first step's batch is there already

    def stepper(self, point: Point, others: Mapping[str, Variables]) -> DifferentiableOptimizer:
        """The optimiser at a point, its hyperparameters taken from `others`."""
        players = {name: value for name, value in others.items() if name in self.follower.game.names}
        return DifferentiableOptimizer(self.factory, point.y, players, point.memory)

    def draw(self) -> None:
        """Move on to the next step's batch, unless it is there already."""
        if not self._drawn:
            self.follower.advance()
        self._drawn = True

    def take(self) -> None:
        """Begin the next step, on its batch."""
        self.draw()
        self._drawn = False

    def step(self, stepper: DifferentiableOptimizer, y: list[Tensor], others: Mapping[str, Variables]) -> list[Tensor]:
        """The leaves after one step; the memory after it is the stepper's."""
        self.take()
        self.loss, self.slopes = self.follower.gradients(y, others)
        return stepper.step(y, self.slopes)

    def alone(self, start: Point, count: int, noted: Callable[[], None] = lambda: None) -> Point:
        """Where `count` steps lead, bit for bit as with their graphs, keeping none; `noted` is called before each.

        With grad enabled torch takes other kernels for some derivatives, twice differentiable ones: so it is here.
        """
        here = start.detached()
        stepper, y = self.stepper(here, self.follower.others), [leaf.clone() for leaf in here.y]
        stepper.own_memory()
        for _ in range(count):
            self.draw()
            noted()
            self.take()
            loss, slopes = self.follower.gradients(y, self.follower.others)
            self.loss, self.slopes = loss.detach(), [slope.detach() for slope in slopes]
            del loss, slopes  # their graph holds y, which is written over
            y = stepper.step_in_place(y, self.slopes)
        return Point(y, stepper.memory).detached()

    def stand_still(self, point: Point, count: int) -> Point:
        """Where `count` steps lead, nothing of them differentiated."""
        if not count:
            return point
        stepper = self.stepper(point, self.others)
        y = point.y
        for _ in range(count):
            with torch.no_grad():
                y = self.step(stepper, [leaf.detach() for leaf in y], self.follower.others)
        return Point(y, stepper.memory).detached()

    def stored(self, point: Point, count: int) -> Point:
        """Where `count` steps lead, with the graph of every one of them."""
        stepper = self.stepper(point, self.others)
        y = point.y
        for _ in range(count):
            y = self.step(stepper, y, self.others)
        return Point(y, stepper.memory)


class Differentiation(ABC):
    """How `Unrolled` differentiates its steps: the derivative is the same, memory and time are not."""

    @abstractmethod
    def follow(self, steps: Steps, start: Point, count: int) -> Followed:
        """Where `count` steps from `start` lead, differentiable in the others' variables."""

    def require(self, game: Game) -> None:  # noqa: B027 - as a rule there is nothing to refuse
        """Refuse a game that this way cannot differentiate."""


@final
@dataclass(frozen=True)
class ReverseMode(Differentiation):
    r"""Backward through every step, from a graph that holds all of them.

        a_k = (dy_{k+1}/dy_k)^T a_{k+1},    hypergradient = sum_k (dy_{k+1}/dx)^T a_{k+1}

    The fastest for any number of leader's entries, and the most memory: K graphs for K steps. Derivatives of any order
    and `torch.func` transforms. `offload=True` keeps the graphs of a game on a GPU in the CPU's (pinned) memory, and
    pays for their transfer; for a game on the CPU it changes nothing. Raises nothing of its own.
    Source: Maclaurin et al. 2015 (arXiv 1502.03492); Franceschi et al. 2017 (arXiv 1703.01785).

    >>> ReverseMode()
    ReverseMode(offload=False)
    """

    offload: bool = False

    def follow(self, steps: Steps, start: Point, count: int) -> Followed:
        """Where the steps lead, with the graph of every one of them."""
        away = self.offload and steps.follower.game.device.type != "cpu"
        with save_on_cpu(pin_memory=True) if away else nullcontext():
            end = steps.stored(start, count)
        return Followed(end, 0, count if any(leaf.requires_grad for leaf in end.y) else 0)
