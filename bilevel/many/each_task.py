"""A response that answers for batch after batch of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.game import Game
from bilevel.game.data import Batch
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.many.task_batch import TaskBatch
from bilevel.many.task_data import CLIENT, SUPPORT
from bilevel.responses import Response
from bilevel.responses.base import FartherLook, State
from bilevel.responses.promise import Behaviour, Promise, Report
from bilevel.tree import Variables, leaves, map_leaves


@final
@dataclass(frozen=True)
class EachTask(Response):
    """`response` in each task of one batch after the other: what `solve` makes of a response for `Tasks`.

    Every call takes the next batch of tasks. Its followers are new: `response` has no memory of other tasks. With
    `clients` each of them has kept its variables since its last task, and nothing else.
    """

    response: Response

    @property
    def promise(self) -> Promise:
        """What `response` promises, in each task."""
        return self.response.promise

    @property
    def budget(self) -> int | None:
        """That of `response`."""
        return self.response.budget

    def with_budget(self, steps: int) -> EachTask:
        """The same with another budget."""
        return replace(self, response=self.response.with_budget(steps))

    @property
    def behaviour(self) -> Behaviour:
        """That of `response`."""
        return self.response.behaviour

    @property
    def farther(self) -> FartherLook | None:
        """That of `response`, on the same batch of tasks."""
        look = self.response.farther
        return None if look is None else replace(look, response=EachTask(look.response))

    @property
    def inner_optimizer(self) -> OptimizerFactory | None:
        """That of `response`."""
        return self.response.inner_optimizer

    def with_inner_optimizer(self, optimizer: OptimizerFactory) -> EachTask:
        """The same with another optimiser."""
        return replace(self, response=self.response.with_inner_optimizer(optimizer))

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first batch of tasks, from which no call has answered yet.

        `data` is the place of the tasks that were answered, `next` that of those which come; `fresh` is the state of
        `response` for a batch of new tasks, `inner` what the last call made of it, and `kept` the clients' followers.
        """
        tasks: Any = game
        name = tasks.task
        place = tasks.start_of_tasks(seed)
        batch, _ = tasks.draw_tasks(place)
        with tasks.apart():
            fresh = self.response.init(tasks.together(batch), follower=name, seed=seed)
        kept = None
        if tasks.clients is not None:
            if not self.response.behaviour.warm:
                raise ValueError(
                    f"Tasks: clients={tasks.clients} keeps followers, and {type(self.response).__name__} starts anew "
                    "in each call. Say warm_start=True, or leave clients= out."
                )
            kept = map_leaves(lambda leaf: leaf.expand(tasks.clients, *leaf.shape).clone(), tasks.initial(name))
        return {
            "follower": name,
            "variables": fresh["variables"],
            "buffers": fresh["buffers"],
            "data": place,
            "next": place,
            "gradients": 0,
            "products": 0,
            "stationarity": math.nan,
            "fresh": fresh,
            "inner": fresh,
            "kept": kept,
            **({"multipliers": fresh["multipliers"]} if "multipliers" in fresh else {}),
        }

    def adopt(self, saved: State, start: State) -> State:
        """What other settings leave: the place in the data, the clients' followers, and the work that was done."""
        report = {"gradients": int(saved["gradients"]), "products": int(saved["products"])}
        going_on = {key: saved[key] for key in ("data", "next", "kept", "variables", "buffers", "stationarity")}
        going_on |= {"multipliers": saved["multipliers"]} if "multipliers" in saved else {}
        return {**start, **going_on, **report}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The followers' answers `[tasks, ...]` to the next batch of tasks, or to `batch`, and the next state."""
        tasks: Any = game
        place, after = state["next"], state["next"]
        if batch is None:
            batch, after = tasks.draw_tasks(place)
        stack: TaskBatch = tasks.together(batch)
        kept, clients, given = state["kept"], batch.get(CLIENT), tasks.entered(others)
        with tasks.apart():
            fresh = state["fresh"]
            if len(leaves(fresh["variables"])[0]) != stack.count:  # as a last batch may be smaller
                fresh = self.response.init(stack, follower=state["follower"])
            if kept is not None:
                fresh = {**fresh, "variables": map_leaves(lambda leaf: leaf[clients.to(leaf.device)], kept)}
            answer, inner = self.response(stack, given, fresh, batch.get(SUPPORT))
        before = self.report(state)
        if kept is not None:
            clients, new = tasks.of_all((clients, inner["variables"]))
            kept = map_leaves(lambda all_, new: _written(all_, new, clients), kept, new)
        return answer, {
            **state,
            "variables": inner["variables"],
            "buffers": inner["buffers"],
            "data": place,
            "next": after,
            "gradients": before.gradients,
            "products": before.products,
            "stationarity": tasks.of_all(inner["stationarity"]),
            "inner": inner,
            "kept": kept,
            **({"multipliers": tasks.of_all(inner["multipliers"])} if "multipliers" in inner else {}),
        }

    def after_backward(self, state: State, answer: Variables) -> State:
        """The state with the work of the backward pass."""
        return {**state, "inner": self.response.after_backward(state["inner"], answer)}

    def report(self, state: State) -> Report:
        """What `response` reports of the last batch, with the work of all of them."""
        inner = self.response.report(state["inner"])
        work = {"gradients": state["gradients"] + inner.gradients, "products": state["products"] + inner.products}
        return replace(inner, stationarity=state["stationarity"], **work)


def _written(kept: Tensor, new: Tensor, clients: Tensor) -> Tensor:
    """The clients' variables with those who came replaced."""
    with torch.no_grad():
        return kept.index_copy(0, clients.to(kept.device), new.detach().to(kept))
