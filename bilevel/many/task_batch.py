"""A batch of tasks with one leader, as a game: the follower is all of the tasks' followers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.game import Buffers, Follower, Game, Size
from bilevel.game.data import Batch, Stream
from bilevel.game.rounding import GradientScale, least_terms, measured_terms, rounding
from bilevel.many.follower import BatchedFollower
from bilevel.many.stack import Stack
from bilevel.many.task_data import QUERY, SUPPORT
from bilevel.randomness import random_kept
from bilevel.tree import Variables, join, map_leaves, structure_of


@final
class TaskBatch(Stack):
    """The tasks of one batch, each with a follower of its own; the leaders' losses are means over them.

    A game like any other, for a loop of one's own: `tasks.together(batch)` makes it.

        stack = tasks.together(batch)
        weights, _ = response(stack, {"meta": meta}, response.init(stack))     # each leaf [tasks, ...]
        loss = stack.loss("meta", {"meta": meta, "task": weights}, batch["query"])

    The follower's variables are `[tasks, ...]`, the leaders' as they are. Its loss is `[tasks]`, a leader's 0-d.
    """

    noun = "task"

    def __init__(self, one: Game, follower: str, count: int, batch: Mapping[str, Batch], *, kept: bool = False) -> None:
        # Everything was checked when the tasks were declared. `kept` followers have been here before.
        self.kept = kept
        self._one, self._count, self._follower = one, count, follower
        self.shared = frozenset(name for name in one.names if name != follower)
        self._tasks = batch
        self._dims = dict.fromkeys(one.names, 0)
        parts = one._parts
        initial = {**parts.initial, follower: map_leaves(self._repeated, parts.initial[follower])}
        buffers = {**parts.buffers, follower: map_leaves(self._repeated, parts.buffers[follower])}
        self._parts = replace(
            parts,
            initial=initial,
            structures={**parts.structures, follower: structure_of(initial[follower])},
            buffers=buffers,
            streams={
                name: Stream(name, [batch[SUPPORT if name == follower else QUERY]], one.device)
                for name in parts.streams
            },
        )

    def game(self, index: int) -> Game:
        """One task by itself; `index` may be negative."""
        if not -self.count <= index < self.count:
            raise IndexError(f"There is no task {index} among {self.count}.")
        return self._one.derived(
            streams={
                name: Stream(
                    name,
                    [self.batch_of(name, self._tasks[SUPPORT if name == self._follower else QUERY], index)],
                    self.device,
                )
                for name in self._one._parts.streams
            }
        )

    def losses(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> Tensor:
        """A player's loss in each task, `[tasks]`."""
        return super().evaluate(player, variables, batch, buffers)[0]

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A leader's loss, the mean over the tasks, or the follower's `[tasks]`; and the buffers after it."""
        losses, after = super().evaluate(player, variables, batch, buffers)
        return (losses.mean() if player in self.shared else losses), after

    def follower(
        self,
        others: Mapping[str, Variables],
        state: Mapping[str, Any],
        batch: Batch = None,
        *,
        further: Iterable[str] = (),
    ) -> Follower:
        """The followers of all tasks at once, whose solvers keep them apart."""
        return TaskFollower(self, others, state, batch, further)

    def norms_of_others(self, tensors: Sequence[Tensor], *, summed: bool = False) -> Tensor:
        """The leaders' norm, the same for each task `[tasks]`; of a sum over the tasks, the mean one's."""
        norm: Tensor = torch.linalg.vector_norm(join(list(tensors)))
        return (norm / self.count if summed else norm).expand(self.count)

    def require_separable(self, dynamics: object) -> None:
        """Refuse to be solved: one batch is no stream of batches."""
        raise TypeError("solve: this is one batch of tasks. Give it the Tasks, with data=[batch] for this batch alone.")

    def require_one(self, asker: str) -> None:
        """Refuse who can look at one game only."""
        raise TypeError(
            f"{asker} looks at one game, not at {self.count} tasks. Use Unrolled or Implicit, or give it one task, "
            "tasks.together(batch).game(i)."
        )


class TaskFollower(BatchedFollower):
    """The followers of a batch of tasks. They are new, so that stationarity is in units of that where they begin."""

    def __init__(
        self,
        games: TaskBatch,
        others: Mapping[str, Variables],
        state: Mapping[str, Any],
        batch: Batch,
        further: Iterable[str] = (),
    ) -> None:
        super().__init__(games, others, state, batch, further)
        self._unit: Size = None
        self._measured: tuple[list[Tensor], list[int], Tensor] | None = None
        self._scale: GradientScale | None = None
        self._may_be_kept, self._cold = games.kept, True

    def norm(self, slopes: Sequence[Tensor]) -> Tensor:
        """The norm of F in each task, `[tasks]`: of the same tensors it is taken once."""
        # The unit, the search for a step that fails and the stationarity ask for it, of small tasks at a tenth of the
        # call each. Who holds the tensors knows that no other ones lie there.
        versions = [slope._version for slope in slopes]
        if self._measured is not None:
            known, then, size = self._measured
            if versions == then and all(slope.is_set_to(other) for slope, other in zip(slopes, known, strict=True)):
                return size
        found: Tensor = super().norm(slopes)
        self._measured = [slope.detach() for slope in slopes], versions, found
        return found

    def sizes(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """The largest norm, or where a square overflows the largest entries."""
        largest = self.norm(slopes).max()
        return [largest] if bool(torch.isfinite(largest)) else super().sizes(slopes)

    def begins(self, state: Mapping[str, Any], *, warm: bool) -> tuple[list[Tensor], bool]:
        """The leaves that a call begins from, and whether they are kept ones."""
        found, kept = super().begins(state, warm=warm)
        self._cold = not (kept and self._may_be_kept)
        return found, kept

    def gradients(self, y: list[Tensor], others: Mapping[str, Variables] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Losses and F in the followers' leaves; the first one where they begin is the unit of the others."""
        loss, slopes = super().gradients(y, others)
        self._take_unit(slopes)
        return loss, slopes

    def field(self, y: list[Tensor], others: Mapping[str, Variables] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Losses and what a step goes along; F at the first of them is the unit, as of `gradients`."""
        loss, slopes = super().field(y, others)
        if self._unit is None and self._cold:
            with torch.no_grad():
                self._take_unit(self.at_rest(y, slopes, others) if self.rests.projects else slopes)
        return loss, slopes

    def _take_unit(self, slopes: Sequence[Tensor]) -> None:
        if self._unit is None and self._cold:
            self._unit = self.norm([slope.detach() for slope in slopes])

    def measure(self, state: Mapping[str, Any], begins: Sequence[Tensor] | None = None) -> GradientScale:
        """The norm of F where a new follower begins, in each task `[tasks]`, and its terms if it may be rounding."""
        if self._scale is None:
            if self._unit is None:
                cold, self._cold = self._cold, True
                self._norm_at(self._first(state))
                self._cold = cold
            terms = torch.zeros_like(self._unit)
            # Those of other tasks, before: the batch is another one, and may be of another size.
            usual = float(torch.as_tensor(state["terms"]).max())
            if bool((self._unit <= 10.0 * rounding(usual, self._unit.dtype)).any()):
                with random_kept(self.game.device):
                    terms = least_terms(measured_terms(self, self.held_residual(), join(self._first(state))))
            self._scale = GradientScale(self._unit, terms, self._unit.dtype)
        return self._scale

    @torch.no_grad()
    def _first(self, state: Mapping[str, Any]) -> list[Tensor]:
        """Where new followers begin."""
        return super().begins(state, warm=False)[0]
