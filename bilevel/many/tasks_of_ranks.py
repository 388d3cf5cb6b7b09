"""Tasks that several processes play together: each has a share of every batch of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import ParallelError
from bilevel.game import Buffers
from bilevel.game.data import Batch, Position
from bilevel.game.processes import refuse_lone_rank
from bilevel.many.task_batch import TaskBatch
from bilevel.many.task_data import count_of
from bilevel.many.tasks import Tasks
from bilevel.parallel.agreement import glanced
from bilevel.parallel.batches import is_sharded, part_of
from bilevel.parallel.data_parallel import DataParallel, shared
from bilevel.parallel.game import averaged, own_numbers
from bilevel.parallel.pair import entered, weighted_mean
from bilevel.parallel.ranks import Ranks
from bilevel.parallel.trial import tried
from bilevel.tree import Variables, leaves, map_leaves, structure_of


@final
class TasksOfRanks(Tasks):
    r"""Tasks whose leaders' losses are means over all ranks' tasks:

    $$f(x) = \frac{1}{\sum_r T_r} \sum_r \sum_{t \le T_r} f\bigl(x, y_t(x)\bigr)$$

    `DataParallel().game(tasks)` makes it. A rank's followers are its own, and answer without a message; what enters
    them, and the leaders' losses, are the two places where ranks meet.
    """

    ranks: Ranks
    _dealt: bool

    @classmethod
    def of(cls, tasks: Tasks, ranks: Ranks, dealt: bool) -> TasksOfRanks:
        """The same tasks on these ranks; `dealt` says that each rank's batches are its own already."""
        found = cls.__new__(cls)
        vars(found).update(vars(tasks))
        found.ranks, found._dealt = ranks, dealt
        return found

    @property
    def sharded(self) -> frozenset[str]:
        """Players whose data are a part of their own on each rank."""
        return frozenset(self._parts.streams) if self._dealt else frozenset()

    # Which tasks are whose --------------------------------------------------------------------------------------------

    def draw_tasks(self, position: Position) -> tuple[dict[str, Batch], Position]:
        """The tasks of the batch at a position that are this rank's, and the next position."""
        batch, after = super().draw_tasks(position)
        if not self._dealt and self.ranks.size > 1:
            self.ranks.read = (31 * self.ranks.read + glanced(batch)) % 2**62
        return self._own(batch), after

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's part of this rank's tasks, and the next position."""
        batch, after = super().draw(player, position)
        return (None if batch is None else self._own(batch)), after

    def _own(self, batch: Any) -> Any:
        if self._dealt or self.ranks.size == 1:
            return batch
        count = count_of({"": batch})
        if count < self.ranks.size:
            raise ParallelError(
                f"A batch of tasks holds {count}, and there are {self.ranks.size} ranks; expected one task for each at "
                "least. Give larger batches, or drop_last=True."
            )
        return part_of("tasks", batch, self.ranks.rank, self.ranks.size, sharded=False, examples=None).batch

    def together(self, batch: Any) -> TaskBatch:
        """The tasks of a batch as a game of this rank's own."""
        found = super().together(batch)
        found._parts = replace(found._parts, alone=True)
        return found

    # Where ranks meet ------------------------------------------------------------------------------------------------

    def entered(self, variables: Mapping[str, Variables]) -> Mapping[str, Variables]:
        """The leaders' variables, whose derivatives are summed over ranks."""
        given = dict(variables)
        return dict(structure_of(given).build(entered(self.ranks, leaves(given))))

    def apart(self) -> AbstractContextManager[object]:
        """With random numbers of this rank's own."""
        return own_numbers(self.ranks.rank, self.device)

    def of_all(self, rows: Variables) -> Variables:
        """What is `[tasks, ...]` here, of all ranks' tasks, in order."""
        return map_leaves(self._gathered, rows)

    def _gathered(self, rows: Any) -> Any:
        if not isinstance(rows, Tensor) or not rows.ndim or self.ranks.size == 1:
            return rows
        sizes = [row[0] * rows[0].numel() for row in self.ranks.rows([len(rows)])]
        parts = self.ranks.parts(rows.detach().reshape(-1), sizes)
        return torch.cat(parts).reshape(-1, *rows.shape[1:])

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss, the mean over all ranks' tasks, and the buffers after it."""
        leading = self.entered({name: tree for name, tree in variables.items() if name != self.task})
        following = {name: tree for name, tree in variables.items() if name == self.task}
        with self.apart():
            share, after = super().evaluate(player, {**leading, **following}, batch, buffers)
        weight = float(self._count(variables, batch))
        mean = weighted_mean(self.ranks, share, weight, [*leaves(dict(leading)), *leaves(following)])
        return mean, self._averaged(after, weight)

    def _averaged(self, after: Buffers, weight: float) -> Buffers:
        """The leaders' buffers, which are means over tasks, as means over all ranks' tasks."""
        places = [(owner, name) for owner, tree in after.items() if owner != self.task for name in tree]
        return averaged(self.ranks, after, places, weight)

    # What a run asks -------------------------------------------------------------------------------------------------

    def alike(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The place in the data, and the clients' followers: the others are each rank's own."""
        return {key: state[key] for key in ("data", "next", "kept", "stationarity")}

    def given_back(self, variables: Mapping[str, Variables]) -> dict[str, Variables]:
        """With the followers of all ranks' tasks."""
        return {name: self.of_all(tree) if name == self.task else tree for name, tree in variables.items()}

    def require_ranks(self, asker: str) -> None:
        """Raise `ValueError` where they were made for one process, and this one has become one of several since."""
        refuse_lone_rank(asker, alone=self.ranks.size > 1)


@shared.register
def _(game: Tasks, ranks: Ranks, parallel: DataParallel) -> TasksOfRanks:
    """A stream of tasks, each of whose batches is dealt out."""
    if type(game) is not Tasks:
        raise TypeError(f"DataParallel: the game is {type(game).__name__}; expected Tasks.")
    for name in game.names:
        # Means over tasks are so by themselves; but nothing may come in beside the players.
        tried(game.together(game.draw_tasks(game.start_of_tasks())[0]).game(0), name, examples=None, coupled=True)
    dealt = is_sharded(game.source) if parallel.sharded is None else parallel.sharded
    return TasksOfRanks.of(game, ranks, dealt)
