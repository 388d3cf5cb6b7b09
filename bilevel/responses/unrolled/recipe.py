"""What a follower's steps are made of, without where they are: the same in the call and when they are taken again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel.game import Follower, Residual
from bilevel.game.residual import PlayedGame
from bilevel.game.situation import Situation
from bilevel.inner.differentiable import Stepper
from bilevel.inner.optimizer import TorchOptimizer
from bilevel.inner.schedule import Changes
from bilevel.inner.torch_optim import Memory
from bilevel.tree import Structure, Variables, leaf_names

Projection = Callable[[Sequence[Tensor], Any], list[Tensor]]
"""From where a step led, and its length, to where it ends."""


@final
@dataclass(frozen=True, eq=False)
class Recipe:
    """The follower and its optimiser, and where a call's schedule begins."""

    settings: TorchOptimizer
    game: PlayedGame
    player: str
    rests: Residual
    form: Structure
    input_form: Structure
    place: Mapping[str, Any] | None
    count: int
    table: list[Changes] | None
    place_after: dict[str, Any] | None

    @staticmethod
    def of(
        settings: TorchOptimizer,
        follower: Follower,
        start: Sequence[Tensor],
        place: Mapping[str, Any] | None,
        count: int,
    ) -> Recipe:
        """For `count` steps of a follower from `start`; `place` is where its schedule was left."""
        game, form, players = follower.game, follower.form, follower.others
        names = leaf_names(form.build(list(start)), follower.name)

        def make() -> Any:
            return settings.build([leaf.detach().clone() for leaf in start], names, players)

        table, after = settings.settled(players).table(make, place, count)
        return Recipe(
            settings, game, follower.name, follower.rests, form, follower.input_form, place, count, table, after
        )

    def stepper(
        self, y: Sequence[Tensor], memory: Memory | None, taken: int, others: Mapping[str, Variables]
    ) -> InnerStep:
        """The optimiser after `taken` steps of the call, its hyperparameters taken from `others`."""
        placeholders = [leaf.detach() for leaf in y]  # to which nothing is written: who does was refused at `init`
        names = leaf_names(self.form.build(placeholders), self.player)
        stepper = Stepper(self.settings.build(placeholders, names, others), placeholders, memory)
        settled = self.settings.settled(others)
        table = self.table
        if self.settings.rates is not None:  # they may depend on the others
            table, _ = settled.table(lambda: stepper.optimizer, self.place, self.count)
        return InnerStep(stepper, settled, self.game, table, taken, self._projection(others))

    def _projection(self, others: Mapping[str, Variables]) -> Projection | None:
        """What follows a step, where the follower has a domain or a proximal map."""
        if not self.rests.projects:
            return None
        return lambda z, step: self.rests.settled(Situation(self.game, self.player, others), z, step)


class InnerStep:
    """An optimiser on its way: what clips its gradients, and what its schedule says of each step."""

    def __init__(
        self,
        stepper: Stepper,
        settings: TorchOptimizer,
        game: PlayedGame,
        table: list[Changes] | None,
        taken: int,
        projection: Projection | None,
    ) -> None:
        self.stepper, self.taken = stepper, taken
        self._settings, self._game, self._table, self._projection = settings, game, table, projection

    @property
    def memory(self) -> Memory | None:
        """What it remembers of each leaf; None before the first step."""
        return self.stepper.memory

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self.stepper.memory = memory

    @property
    def clips(self) -> bool:
        """Whether a gradient is not stepped along as it comes."""
        return self._settings.clip_norm is not None or self._settings.clip_value is not None

    def clip(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """The gradients as they are stepped along; differentiable."""
        return self._settings.clip(slopes, self._game.norms)

    def next_changes(self) -> Changes | None:
        """What the schedule sets for the step that is taken next; counts it as taken."""
        self.taken += 1
        return None if self._table is None else self._table[self.taken - 1]

    def step(self, leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """The leaves after one step along the gradients; differentiable in both and in the memory."""
        return self.move(leaves, self.clip(slopes))

    def move(self, leaves: Sequence[Tensor], clipped: Sequence[Tensor]) -> list[Tensor]:
        """The same along gradients that are clipped already."""
        return self._projected(self.stepper.step(leaves, clipped, self.next_changes()))

    def step_in_place(self, leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """The same numbers, written over the leaves and the memory, neither of which has a graph."""
        return self.move_in_place(leaves, self.clip(slopes))

    def move_in_place(self, leaves: Sequence[Tensor], clipped: Sequence[Tensor]) -> list[Tensor]:
        """The same along gradients that are clipped already."""
        return self._projected(self.stepper.step_in_place(leaves, clipped, self.next_changes()))

    def _projected(self, moved: list[Tensor]) -> list[Tensor]:
        if self._projection is None:
            return moved
        # One rate for all, or a map that does not depend on it: others were refused.
        return self._projection(moved, self.stepper.optimizer.param_groups[0]["lr"])

    def own_memory(self) -> None:
        """Copy the memory, so that steps in place write to nobody else's."""
        self.stepper.own_memory()
