"""A follower's steps, and how the derivative of where they end is found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import require_kinds
from bilevel.game import Follower, Game
from bilevel.inner.optimizer import require_finite
from bilevel.inner.torch_optim import Memory
from bilevel.responses.unrolled.first_fault import FirstFault
from bilevel.responses.unrolled.recipe import InnerStep, Recipe
from bilevel.second_order import once_only
from bilevel.tree import Variables, leaves, map_leaves, structure_of


@dataclass(frozen=True)
class Point:
    """Where a follower is between two steps: its leaves, its optimiser's memory, None before the first step.

    `taken` is how many steps of this call came before.
    """

    y: list[Tensor]
    memory: Memory | None
    taken: int = 0

    def detached(self) -> Point:
        """The same values, outside any graph."""
        return Point([leaf.detach() for leaf in self.y], detach_memory(self.memory), self.taken)


def detach_memory(memory: Memory | None) -> Memory | None:
    """An optimiser's memory, outside any graph."""
    if memory is None:
        return None
    return [map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, slot) for slot in memory]


@dataclass(frozen=True)
class Followed:
    """Where the steps end, attached to what they depend on, and the work that its derivative takes.

    `gradients` are those beyond one a step and batch; `products` are Hessian-vector products, made now or in one
    backward pass.
    """

    end: Point
    gradients: int
    products: int


class Steps:
    """The steps of one call: they draw batches, advance buffers and are counted in `follower`.

    What it holds of them is outside any graph: a graph that leads to what holds it is never freed.
    """

    def __init__(self, recipe: Recipe, follower: Follower, others: Mapping[str, Variables]) -> None:
        self.recipe, self.follower, self.others = recipe, follower, others
        self.loss: Tensor
        self.slopes: list[Tensor]
        self._fault = FirstFault(follower.game.device)
        self._drawn = True  # the first step's batch is there already

    @property
    def batches(self) -> int:
        """How many batches a step takes the mean gradient of."""
        return self.recipe.settings.accumulate

    def stepper(self, point: Point, others: Mapping[str, Variables]) -> InnerStep:
        """The optimiser at a point, its hyperparameters taken from `others`."""
        return self.recipe.stepper(point.y, point.memory, point.taken, others)

    def draw(self) -> None:
        """Move on to the next step's batch, unless it is there already."""
        if not self._drawn:
            self.follower.advance()
        self._drawn = True

    def take(self) -> None:
        """Begin the next step, or a step's next batch."""
        self.draw()
        self._drawn = False

    def note(self, losses: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        """Take note of a step's losses, whose mean it tells, and of F there, as a rule its mean gradient."""
        self.loss = losses[0].detach() if len(losses) == 1 else torch.stack([loss.detach() for loss in losses]).mean(0)
        self.slopes = [slope.detach() for slope in slopes]
        self._fault.see(losses, self.follower.sizes(self.slopes))

    def require_finite(self, y: Sequence[Tensor]) -> None:
        """Raise `NonFiniteError` when a loss or a gradient was NaN or infinite, and say in which step."""
        advice = "Lower the learning rate of its inner optimiser."
        follower, fault = self.follower, self._fault.found()
        if fault is not None:
            where = follower.where_loss_not_finite(y) or follower.where_not_finite(follower.game.norms(y))
            step, loss, size = fault
            require_finite(follower.name, loss, size, step, self.recipe.count, where, advice)
        follower.require_finite(list(y), advice, concrete(self.loss))

    def gradients(
        self, y: list[Tensor], others: Mapping[str, Variables], noted: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """A step's gradient, the mean over its batches; `noted` is called before each."""
        losses, total = [], None
        for _ in range(self.batches):
            self.draw()
            noted()
            self.take()
            loss, slopes = self.follower.field(y, others)
            losses.append(loss)
            total = slopes if total is None else [a + b for a, b in zip(total, slopes, strict=True)]
        mean = self.recipe.settings.mean(total or [])
        with torch.no_grad():
            self.note(losses, self.follower.at_rest(y, mean, others) if self.follower.rests.projects else mean)
        return mean

    def alone(self, start: Point, count: int, noted: Callable[[], None] = lambda: None) -> Point:
        """Where `count` steps lead, bit for bit as with their graphs, keeping none.

        `noted` is called before each batch. With grad enabled torch takes other kernels for some derivatives, twice
        differentiable ones: so it is here.
        """
        here = start.detached()
        stepper, y = self.stepper(here, self.follower.others), [leaf.clone() for leaf in here.y]
        stepper.own_memory()
        for _ in range(count):
            slopes = [slope.detach() for slope in self.gradients(y, self.follower.others, noted)]
            # The graph, which holds the y that is written over, is gone by now.
            y = stepper.step_in_place(y, slopes)
        return Point(y, stepper.memory, start.taken + count).detached()

    def stand_still(self, point: Point, count: int) -> Point:
        """Where `count` steps lead, nothing of them differentiated."""
        if not count:
            return point
        stepper = self.stepper(point, self.follower.others)
        y = point.y
        for _ in range(count):
            with torch.no_grad():
                y = [leaf.detach() for leaf in y]
                y = stepper.step(y, self.gradients(y, self.follower.others))
        return Point(y, stepper.memory, point.taken + count).detached()

    def stored(self, point: Point, count: int) -> Point:
        """Where `count` steps lead, with the graph of every one of them."""
        others, y = self.others, point.y
        if not transforms_active():
            kernels = self.follower.game.kernels(self.follower.name)
            if kernels.third:
                others = structure_of(others).build(once_only(self.follower.name, kernels, leaves(others)))
                y = once_only(self.follower.name, kernels, y)
        stepper = self.stepper(replace(point, y=y), others)
        for _ in range(count):
            y = stepper.step(y, self.gradients(y, others))
        return Point(y, stepper.memory, point.taken + count)


class Differentiation(ABC):
    """How `Unrolled` differentiates its steps: the derivative is the same, memory and time are not."""

    @abstractmethod
    def follow(self, steps: Steps, start: Point, count: int) -> Followed:
        """Where `count` steps from `start` lead, differentiable in the others' variables."""

    def require(self, game: Game) -> None:  # noqa: B027 - as a rule there is nothing to refuse
        """Refuse a game that this way cannot differentiate."""

    def require_follower(self, follower: Follower) -> None:  # noqa: B027
        """Refuse a follower whose steps this way cannot differentiate."""


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

    def __post_init__(self) -> None:
        require_kinds(self)

    def follow(self, steps: Steps, start: Point, count: int) -> Followed:
        """Where the steps lead, with the graph of every one of them."""
        away = self.offload and steps.follower.game.device.type != "cpu"
        with save_on_cpu(pin_memory=True) if away else nullcontext():
            end = steps.stored(start, count)
        return Followed(end, 0, count * steps.batches if any(leaf.requires_grad for leaf in end.y) else 0)
