"""A batch of tasks as data give it, brought into one form, or refused in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.game.data import Batch
from bilevel.game.player import kind
from bilevel.tree import leaves, named_leaves

SUPPORT, QUERY, CLIENT = "support", "query", "client"

_FORM = "a dict of `support` and `query`, each with a leading dimension for the tasks, or a list of single tasks"


@final
@dataclass(frozen=True)
class TaskForm:
    """What a batch of tasks must hold.

    Args:
        parts: `support` and `query`, those of them that some objective takes.
        clients: how many clients there are, one of whom each task names; None where every task is new.
    """

    parts: tuple[str, ...]
    clients: int | None

    def batch(self, given: Any) -> dict[str, Batch]:
        """The batch, `{"support": ..., "query": ...}`, each tensor `[tasks, ...]`; of a list of tasks the stack.

        Raises `ValueError` or `TypeError` for a part that is missing, and for tasks of different shapes.
        """
        found = self._stacked(given) if isinstance(given, list | tuple) else self._parted(given, "A batch of tasks")
        sizes = {
            f"{part}{path}": leaf.shape[0] if leaf.ndim else None
            for part, tree in found.items()
            for path, leaf in named_leaves(tree)
            if isinstance(leaf, Tensor)
        }
        if not sizes:
            raise ValueError(f"A batch of tasks holds no tensors; expected {_FORM}.")
        first, count = next(iter(sizes.items()))
        for name, size in sizes.items():
            if size is None or size != count:
                came = "no dimension" if size is None else f"a leading dimension of {size}"
                expected = "one entry a task" if count is None else f"{count}, one entry a task as in its {first}"
                raise ValueError(
                    f"A batch of tasks: its {name} has {came}; expected {expected}. What all tasks share is a constant "
                    "of the objective."
                )
        if count == 0:
            raise ValueError("A batch of tasks holds no task; expected at least one.")
        self._check_clients(found)
        return found

    def _parted(self, given: Any, told: str) -> dict[str, Batch]:
        if not isinstance(given, Mapping):
            raise TypeError(f"{told} is {kind(given)}; expected {_FORM}.")
        wanted = (*self.parts, *([CLIENT] if self.clients is not None else []))
        for part in wanted:
            if part not in given:
                why = {
                    SUPPORT: "the followers fit it",
                    QUERY: "the leaders are judged by it after the followers have adapted",
                    CLIENT: "clients= keeps one follower for each, and it says whose task this is",
                }[part]
                raise ValueError(f"{told} has no {part!r}, only {list(given)}: {why}. Expected {_FORM}.")
        return {part: given[part] for part in wanted}

    def _stacked(self, tasks: Sequence[Any]) -> dict[str, Batch]:
        if not tasks:
            raise ValueError("A batch of tasks holds no task; expected at least one.")
        single = [self._parted(task, f"Task {number} of a batch") for number, task in enumerate(tasks)]
        form = pytree.tree_structure(single[0])
        for number, task in enumerate(single):
            if pytree.tree_structure(task) != form:
                raise ValueError(f"A batch of tasks: task {number} is not nested as task 0.")
            for (path, leaf), (_, like) in zip(_tensors(task), _tensors(single[0]), strict=True):
                if leaf.shape != like.shape or leaf.dtype != like.dtype:
                    raise ValueError(
                        f"A batch of tasks: {path} of task {number} is {list(leaf.shape)} of {leaf.dtype}, and that of "
                        f"task 0 {list(like.shape)} of {like.dtype}. The tasks of one batch are stacked: put tasks of "
                        "one shape into a batch, or pad them and give their weights in the loss."
                    )
        rows = zip(*(leaves(task) for task in single), strict=True)
        values = [torch.stack(list(row)) if isinstance(row[0], Tensor) else _equal(row) for row in rows]
        found: dict[str, Batch] = pytree.tree_unflatten(values, form)
        return found

    def _check_clients(self, found: Mapping[str, Batch]) -> None:
        if self.clients is None:
            return
        numbers = found[CLIENT]
        if not isinstance(numbers, Tensor) or numbers.ndim != 1 or numbers.is_floating_point():
            raise TypeError(f"A batch of tasks: its client is {kind(numbers)}; expected whole numbers [tasks].")
        if int(numbers.min()) < 0 or int(numbers.max()) >= self.clients:
            raise ValueError(
                f"A batch of tasks: its clients are {numbers.tolist()}; expected numbers from 0 to {self.clients - 1}, "
                f"as clients={self.clients} says."
            )
        if len(set(numbers.tolist())) != len(numbers):
            raise ValueError(
                f"A batch of tasks: its clients are {numbers.tolist()}, one of them twice; each has one follower. Put "
                "a client's tasks into different batches."
            )


def _equal(row: Sequence[Any]) -> Any:
    """What is no tensor is the same in all tasks."""
    if any(value != row[0] for value in row):
        raise ValueError(
            f"A batch of tasks: {row[0]!r} of task 0 is no tensor, and is not the same in every task. Make it a tensor."
        )
    return row[0]


def _tensors(task: Mapping[str, Batch]) -> list[tuple[str, Tensor]]:
    pairs = [(f"{part}{path}", leaf) for part, tree in task.items() for path, leaf in named_leaves(tree)]
    return [(path, leaf) for path, leaf in pairs if isinstance(leaf, Tensor)]


def count_of(batch: Mapping[str, Batch]) -> int:
    """How many tasks a batch holds."""
    return next(len(leaf) for leaf in leaves(dict(batch)) if isinstance(leaf, Tensor))
