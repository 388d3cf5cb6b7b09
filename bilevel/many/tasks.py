"""One leader and a stream of tasks, each with a follower and data of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from bilevel.game import Buffers, Follower, Game, Player
from bilevel.game.data import Batch, Position, Stream
from bilevel.game.passes import Source
from bilevel.game.player import check_data, kind
from bilevel.many.each_task import EachTask
from bilevel.many.stack import rows_of
from bilevel.many.task_batch import TaskBatch
from bilevel.many.task_data import QUERY, SUPPORT, TaskForm, count_of
from bilevel.randomness import random_kept
from bilevel.responses import Response
from bilevel.tree import Variables, detached, leaves, map_leaves

Kind = TypeVar("Kind")


class Tasks(Game):
    r"""One leader, and in each step a batch of tasks: each has a follower and data of its own.

    $$\min_x \; \frac1T \sum_t f\bigl(x, y_t(x), \text{query}_t\bigr), \qquad
      y_t(x) \text{ answers to } g\bigl(x, \cdot, \text{support}_t\bigr)$$

        tasks = Tasks(
            meta=Player(query_loss, init=net), task=Player(fit, init=net, start=lambda meta: meta), data=loader
        )
        solution = solve(tasks, task=Unrolled(partial(SGD, lr=0.1), steps=1), steps=1000)
        tasks.adapted(solution.variables, held_out, task=Unrolled(partial(SGD, lr=0.1), steps=10)).losses["meta"]

    The last player follows, all others lead. Objectives are written for *one* task; `torch.func.vmap` runs them over a
    batch. `batch` is the task's support in the follower's functions, its query in the leaders'.

    Args:
        data: A re-iterable of batches of tasks, or a function that makes one for each pass. A batch is
            `{"support": ..., "query": ...}`, every tensor `[tasks, ...]`, as a DataLoader collates tasks that are such
            dicts; or a list of single tasks, which are stacked. A step takes one batch, in order; its size may differ.
        clients: None: every task is new, and its follower begins at its `start` or `init` and is forgotten, its
            optimiser's memory too, whatever `warm_start` says. A number: so many clients keep one follower each, which
            goes on from where it was when its client comes again; each batch then has whole numbers `client: [tasks]`.
        **players: In order of play, without data of their own.

    A module's buffers: each follower has its own, which begin anew; a leader's become the mean over the tasks.

    Raises:
        ValueError, TypeError: For a batch without support or query, for tasks of different shapes, for a follower that
            no leader reaches, for a leader with functions as constraints, and for an objective that vmap cannot run;
            with the task's number where a loss is not finite.

    Costs one vmapped evaluation for all tasks of a batch, and the memory of all of them.
    Source: Finn et al. 2017 (arXiv 1703.03400).

    Examples:
        >>> def fit(meta, task, batch): return ((task - batch) ** 2).sum() + ((task - meta) ** 2).sum()
        >>> tasks = Tasks(
        ...     meta=Player(lambda task, batch: ((task - batch) ** 2).sum(), torch.zeros(2)),
        ...     task=Player(fit, torch.zeros(2)),
        ...     data=[{"support": torch.ones(3, 2), "query": torch.ones(3, 2)}],
        ... )
        >>> tasks.loss("meta", {"task": torch.zeros(3, 2)}, torch.ones(3, 2))
        tensor(2.)
    """

    def __init__(self, *, data: Source, clients: int | None = None, **players: Player) -> None:
        if len(players) < 2:
            raise ValueError(
                f"Tasks: players are {list(players)}; expected at least a leader and, last, the one who follows in "
                "each task."
            )
        for name, player in players.items():
            if not isinstance(player, Player):
                raise TypeError(f"Tasks: {name!r} is {kind(player)}; expected a Player(objective, init=...).")
            if player.data is not None:
                raise ValueError(f"Tasks: player {name!r} has data=; expected none: each task brings its own.")
        for name, player in players.items():
            if player.option_players:
                raise TypeError(
                    f"Tasks: player {name!r} has a domain or prox that depends on others; expected a domain of "
                    "numbers. Write it as inequality= of the one who follows, or a projection as residual=."
                )
            if player.constraints and name != list(players)[-1]:
                raise TypeError(
                    f"Tasks: {name!r} leads and has functions that constrain it, {sorted(player.constraints)}; each "
                    "task would have its own. Give it a domain, or put them into its loss."
                )
        check_data("Tasks: data", data)
        *leaders, follower = players
        if clients is not None and clients < 1:
            raise ValueError(f"Tasks: clients={clients}; expected how many there are, or None where every task is new.")
        if clients is not None and players[follower].start is not None:
            raise ValueError(
                f"Tasks: clients={clients} keeps followers from step to step, and the start= of {follower!r} begins "
                "anew in each. Leave one of them out."
            )
        takers = {name for name, player in players.items() if _takes_batch(player)}
        parts = ([SUPPORT] if follower in takers else []) + ([QUERY] if takers & set(leaders) else [])
        if not parts:
            raise ValueError("Tasks: no objective takes `batch`, so that all tasks would be the same.")
        self._form, self._clients, self._last = TaskForm(tuple(parts), clients), clients, follower
        self._source = data
        self._tasks = Stream("tasks", data).mapped(self._form.batch)
        first = self._tasks.draw(Stream.start())[0]
        part = {name: SUPPORT if name == follower else QUERY for name in players}
        one = {name: [rows_of(first[part[name]], 0, 0)] if name in takers else None for name in players}
        self._one = Game(**{name: replace(player, data=one[name]) for name, player in players.items()})
        self._one.require_follower(follower)
        self._one.require_whole("Tasks")
        self._parts = replace(
            self._one._parts,
            streams={name: self._tasks.mapped(_Part(part[name])) for name in players if name in takers},
        )
        self._try(self.together(first), first)

    # The tasks ------------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> int | None:
        """How many keep a follower; None where every task is new."""
        return self._clients

    @property
    def source(self) -> Source:
        """Its data, as they were given."""
        return self._source

    @property
    def task(self) -> str:
        """The player who follows in each task."""
        return self._last

    def start_of_tasks(self, seed: int = 0) -> Position:
        """The position of the first batch of tasks."""
        return Stream.start(seed)

    def draw_tasks(self, position: Position) -> tuple[dict[str, Batch], Position]:
        """The batch of tasks at a position, and the next position."""
        return self._tasks.draw(position)

    def entered(self, variables: Mapping[str, Variables]) -> Mapping[str, Variables]:
        """The leaders' variables as the followers of these tasks take them."""
        return variables

    def apart(self) -> AbstractContextManager[object]:
        """While something is done for these tasks: of the ranks of a process group each does it for its own."""
        return nullcontext()

    def of_all(self, rows: Variables) -> Variables:
        """What is `[tasks, ...]`, of all the tasks of a batch."""
        return rows

    def together(self, batch: Any) -> TaskBatch:
        """The tasks of a batch as a game, for a loop of one's own."""
        found = self._form.batch(batch)
        return TaskBatch(self._one, self._last, count_of(found), found, kept=self._clients is not None)

    def adapted(self, variables: Mapping[str, Variables], batch: Any, **response: Response) -> Adapted:
        """New followers' answers to a batch of tasks, such as held-out ones, and how well they do.

        Args:
            variables: the leaders', such as `solution.variables`.
            batch: of tasks, in the form of `data`.
            **response: the follower's name and how it answers, as in `solve`; it may take more steps than there.
        """
        if list(response) != [self._last]:
            raise TypeError(
                f"Tasks.adapted: expected one response, {self._last}=Unrolled(...); came {sorted(response)}."
            )
        found = self._form.batch(batch)
        stack = self.together(found)
        leading = {name: detached(variables[name]) for name in self.names if name != self._last}
        with random_kept(self.device), torch.no_grad():
            answer = response[self._last]
            state = answer.init(stack, follower=self._last)
            own, state = answer(stack, leading, state, found.get(SUPPORT))
            everybody, buffers = {**leading, self._last: own}, {self._last: state["buffers"]}
            losses = {
                name: stack.losses(name, everybody, found.get(SUPPORT if name == self._last else QUERY), buffers)
                for name in self.names
            }
        return Adapted(detached(own), losses)

    # What a game answers, for a batch of tasks ----------------------------------------------------------------------

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss, the mean over a batch of tasks, and the buffers after it."""
        count = self._count(variables, batch)
        stack = TaskBatch(self._one, self._last, count, {SUPPORT: batch, QUERY: batch})
        losses, after = stack.evaluate(player, variables, batch, buffers)
        return losses.mean(), after

    def member_moments(
        self, member: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
    ) -> dict[str, Tensor]:
        """In each task its own follower's."""
        stack = TaskBatch(self._one, self._last, self._count(variables, batch), {SUPPORT: batch, QUERY: batch})
        return stack.member_moments(member, variables, batch, buffers)

    def check(self, player: str, variables: Variables) -> None:
        """Refuse variables of another form; the follower's are `[tasks, ...]`."""
        if player == self._last:
            variables = map_leaves(lambda leaf: leaf[0] if leaf.ndim else leaf, variables)
        super().check(player, variables)

    def _count(self, variables: Mapping[str, Variables], batch: Batch) -> int:
        trees = [variables[self._last]] if self._last in variables else [batch]
        sizes = [len(leaf) for tree in trees for leaf in leaves(tree) if isinstance(leaf, Tensor)]
        if not sizes:
            raise ValueError(f"Tasks: expected the variables of {self._last!r}, each leaf [tasks, ...], or a batch.")
        return sizes[0]

    def response_of(self, player: str, response: Kind) -> Kind:
        """The response as it answers for batch after batch of tasks."""
        if player != self._last:
            raise ValueError(f"solve: {player!r} leads all tasks; the one with a response is {self._last!r}.")
        if not isinstance(response, Response) or isinstance(response, EachTask):
            return response  # what is no response is told by who asked
        each: Any = EachTask(response)
        return each  # type: ignore[no-any-return]

    def refuse_mixing(self, asker: str, player: str, optimizer: Callable[..., Any]) -> None:
        """Refuse to move the followers as if they led."""
        if player == self._last:
            raise TypeError(
                f"{asker}: {player!r} follows in each task and has no response. Give it one, such as "
                f"{player}=Unrolled(partial(SGD, lr=0.1), steps=5)."
            )

    @property
    def record_keys(self) -> tuple[str, ...]:
        """Stationarity is told of the median task and of the worst."""
        return ("", ".worst")

    def position_of_answer(self, leader: str, states: Mapping[str, Any]) -> Position | None:
        """Where the query of those tasks lies whose followers answered."""
        place: Position | None = states[self._last]["data"]
        return place if leader in self._parts.streams else None

    def follower(
        self,
        others: Mapping[str, Variables],
        state: Mapping[str, Any],
        batch: Batch = None,
        *,
        further: Iterable[str] = (),
    ) -> Follower:
        """There is one for each batch of tasks."""
        raise TypeError(
            "A response answers for a batch of tasks: give it the game tasks.together(batch), and solve the Tasks."
        )

    def joined(self, **groups: Sequence[str]) -> Tasks:
        """Refused: one player follows in each task."""
        raise TypeError(f"Tasks: one player follows in each task, {self._last!r}; there is nobody to join.")

    def require_one(self, asker: str) -> None:
        """Refuse who looks at one game."""
        raise TypeError(f"{asker} looks at one game: give it one task, tasks.together(batch).game(0).")

    def _try(self, stack: TaskBatch, batch: Mapping[str, Batch]) -> None:
        """Evaluate each objective once for a batch of tasks."""
        variables = {name: stack.initial(name) for name in self.names}
        for name in self.names:
            part = batch.get(SUPPORT if name == self._last else QUERY)
            with random_kept(self.device), torch.no_grad():
                try:
                    losses = stack.losses(name, variables, part)
                except Exception as error:
                    raise ValueError(
                        f"Player {name!r}: torch.func.vmap cannot run its objective for {stack.count} tasks at once: "
                        f"{error}\nWrite it with torch.where in place of `if`, without .item(), and without writing "
                        "into tensors from outside."
                    ) from error
            wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(
                    f"Player {name!r}: its loss at init is {losses[wrong[0]].item()} in task {wrong[0]} of the first "
                    f"batch, and not finite in {len(wrong)} in all; expected finite numbers."
                )


@final
@dataclass(frozen=True, eq=False)
class Adapted:
    """Followers after they have answered to a batch of tasks, outside any graph.

    Args:
        variables: the followers', each leaf `[tasks, ...]`.
        losses: player -> its loss in each task `[tasks]`: a leader's on the query, the follower's on the support.
    """

    variables: Variables
    losses: Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class _Part:
    """Takes the support or the query out of a batch of tasks."""

    part: str

    def __call__(self, batch: Mapping[str, Batch]) -> Batch:
        return batch[self.part]


def _takes_batch(player: Player) -> bool:
    own = () if player.residual is None else player.own_residual.names
    functions = [name for function in player.constraints.values() for name in player.parameters(function)]
    return "batch" in (*player.names, *own, *functions, *player.start_names)
