"""One run of solve: its leaders, followers and states, how one step moves them, and how it is saved and ends."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.dynamics import Dynamics, Field
from bilevel.errors import CheckpointError, NonConvergenceWarning
from bilevel.game import Buffers, Game, Size
from bilevel.inner.torch_optim import OptimizerFactory, SchedulerFactory
from bilevel.many import Games
from bilevel.many.dynamics import refuse_mixing_dynamics
from bilevel.randomness import random_kept, random_state, set_random_state
from bilevel.responses import Response, State
from bilevel.responses.promise import Report
from bilevel.solving.evaluation import Answers, StepEvaluator
from bilevel.solving.gathered import Gathered, RunWarning
from bilevel.solving.leaders import Leaders
from bilevel.solving.solution import Solution
from bilevel.solving.solutions import Solutions, summary
from bilevel.tree import Variables, map_leaves

Record = dict[str, float]
"""What is told of one step."""


class Run:
    """Everything that a checkpoint holds, and how one step moves it."""

    def __init__(
        self,
        game: Game,
        responses: Mapping[str, Response],
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None,
        scheduler: SchedulerFactory | None,
        dynamics: Dynamics,
        clip_norm: float | None,
        seed: int,
    ) -> None:
        self.game, self.dynamics, self.seed = game, dynamics, seed
        for name, response in responses.items():
            if name not in game.names:
                raise TypeError(f"solve: {name!r} is neither an option nor a player; players are {list(game.names)}.")
            if not isinstance(response, Response):
                raise TypeError(
                    f"solve: {name}={response!r} is no response; expected Unrolled, Implicit, Hypernetwork, ..."
                )
        self.followers = {name: responses[name] for name in game.names if name in responses}
        leading = [name for name in game.names if name not in responses]
        if not leading or game.names[0] in responses:
            raise ValueError(f"solve: {game.names[0]!r} moves first and leads; it can have no response.")
        self._in_place = [name for name, response in self.followers.items() if response.in_place]
        if self._in_place and len(self.followers) > 1:
            raise ValueError(
                f"solve: {self._in_place} write into their states at every call, and with several followers the others "
                "call them too. Use in_place=False."
            )
        self.states: dict[str, Any] = {}
        for name, response in reversed(list(self.followers.items())):
            view = self._nest(self.states)[name]
            self.states[name] = response.init(view, follower=name, seed=seed)
        if isinstance(game, Games):
            refuse_mixing_dynamics(dynamics, game.count)
        self.leaders = Leaders(game, leading, optimizer, scheduler, clip_norm)
        self.positions = {name: game.start(name, seed) for name in leading}
        self.batches: dict[str, Any] = {}
        self.step_count, self.seconds, self.gradients, self.products = 0, 0.0, 0, 0
        self.history: list[Record] = []
        self.whole = True
        self.memory: dict[str, Any] = {}  # of the dynamics
        self.gathered = Gathered()
        # The leaders' own modules advance too when there is no follower to carry them.
        self.buffers: Buffers = {name: b for name, b in game.buffers().items() if b}

    @property
    def variables(self) -> dict[str, Variables]:
        """Everybody's present variables, detached; the followers' as they last answered."""
        leading = self.leaders.trees(self.leaders.points)
        given = {n: self.states[n]["variables"] if n in self.states else leading[n] for n in self.game.names}
        return {name: map_leaves(lambda t: t.detach().clone(), tree) for name, tree in given.items()}

    # The followers ---------------------------------------------------------------------------------------------------

    def _nest(self, states: Mapping[str, Any]) -> dict[str, Game]:
        """The game as each follower sees it: those who move after it answer by their responses, from these states."""
        views: dict[str, Game] = {}
        view = self.game
        for name, response in reversed(list(self.followers.items())):
            views[name] = view
            if name in states:

                def answer(
                    variables: Mapping[str, Variables],
                    name: str = name,
                    response: Response = response,
                    inner: Game = view,
                ) -> Variables:
                    earlier = self.game.names[: self.game.names.index(name)]
                    given = {n: v for n, v in variables.items() if n in earlier or n not in self.followers}
                    return response(inner, given, states[name])[0]

                view = view.anticipate(**{name: answer})
        return views

    def _respond(self, point: Mapping[str, Variables]) -> Answers:
        """What the followers answer to the leaders' `point`, from the present states."""
        variables, after = dict(point), dict(self.states)
        views = self._nest(self.states)
        for name, response in self.followers.items():
            given = {n: v for n, v in variables.items() if n != name}
            variables[name], after[name] = response(views[name], given, self.states[name])
        return variables, after, self._buffers(after)

    def _buffers(self, states: Mapping[str, Any]) -> Buffers:
        return {**self.buffers, **{name: state["buffers"] for name, state in states.items() if state["buffers"]}}

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self) -> Record:
        """One step of every leader."""
        began = time.perf_counter()
        positions = dict(self.positions)
        for name in self.leaders.names:
            self.batches[name], positions[name] = self.game.draw(name, self.positions[name])
        # A response that writes into its state is of two minds from its call on.
        self.whole = not self._in_place
        once = self._in_place and (
            f"solve: {self.dynamics!r} evaluates the players more than once a step, and each time {self._in_place} "
            "would move on the states that they write into. Use in_place=False."
        )
        played = StepEvaluator(self.game, self.leaders, self._respond, self.batches, once or "")
        leading = self.leaders.names
        moving = [(name,) for name in leading] if self.dynamics.alternates else [tuple(leading)]
        norms: list[Tensor] = []
        memory = self.memory
        for movers in moving:
            with self.gathered.gathering(self.step_count + 1):
                field = Field(played.slopes, self.leaders.points, movers, played.losses)
                directions, memory = self.dynamics.directions(field, memory)
            self.whole = False
            self.products += field.products
            norms += [self.leaders.apply(name, directions[name], self.step_count + 1) for name in movers]
        self.memory, self.buffers = memory, played.here.buffers
        self.states = {
            name: self.followers[name].after_backward(state, played.here.variables[name])
            for name, state in played.here.states.items()
        }
        self.positions = positions
        self.gradients += played.gradients
        self.step_count += 1
        self.whole = True
        self.seconds += time.perf_counter() - began
        self.history.append(self._record(played, norms))
        return self.history[-1]

    def _record(self, played: StepEvaluator, norms: list[Tensor]) -> Record:
        record: Record = {
            "step": self.step_count,
            **summary("gradient_norm", torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)),
        }
        shown = dict(played.here.losses)
        for name in self.followers:
            shown |= self._shown_losses(name, played.here.variables, self.states)
            shown[f"{name}.stationarity"] = self.states[name]["stationarity"]
        for name, value in shown.items():
            record |= summary(name, value)
        record |= {"gradients": self._gradients(), "products": self._products(), "seconds": self.seconds}
        return record | {"work": record["gradients"] + record["products"]}

    def _shown_losses(
        self, name: str, variables: Mapping[str, Variables], states: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """A player's own loss on its last batch, or for a follower on the one that comes next: shown, not used.

        Of a joint player, its members'.
        """
        with torch.no_grad(), random_kept(self.game.device):
            if name in self.batches:
                batch = self.batches[name]
            else:
                position = states[name]["data"] if name in states else self.positions[name]
                batch, _ = self.game.draw(name, position)
            detached, buffers = map_leaves(lambda t: t.detach(), dict(variables)), self._buffers(states)
            members = self.game.members(name)
            if members == (name,):
                return {name: self.game.loss(name, detached, batch, buffers)}
            return {m: self.game.loss(m, detached, None if batch is None else batch[m], buffers) for m in members}

    def _gradients(self) -> int:
        return self.gradients + sum(report.gradients for report in self._reports(self.states).values())

    def _products(self) -> int:
        return self.products + sum(report.products for report in self._reports(self.states).values())

    def _reports(self, states: Mapping[str, State]) -> dict[str, Report]:
        """What each follower's response says of a state of its own."""
        return {name: self.followers[name].report(state) for name, state in states.items()}

    # A checkpoint ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All of it, as tensors, numbers and strings."""
        return {
            "players": {n: [list(s) for s in self.game.structure(n).shapes] for n in self.game.names},
            "responses": {name: _told(response) for name, response in self.followers.items()},
            "seed": self.seed,
            "step": self.step_count,
            **self.leaders.state(),
            "states": self.states,
            "positions": self.positions,
            "buffers": self.buffers,
            "dynamics": _told(self.dynamics),
            "memory": self.memory,
            "random": random_state(self.game.device),
            "history": self.history,
            "warned": self.gathered.kept,
            "gradients": self.gradients,
            "products": self.products,
            "seconds": self.seconds,
        }

    def restore(self, saved: Mapping[str, Any], path: Path) -> None:
        """Go on from what `state` gave; raises `CheckpointError` when it belongs to another game."""
        own = self.state()
        for key in ("players", "responses", "dynamics", "seed"):
            if saved[key] != own[key]:
                raise CheckpointError(
                    f"{path} is a checkpoint of another run: its {key}: {saved[key]}; here: {own[key]}. "
                    "Pass another checkpoint=, or resume=False to overwrite it."
                )
        self.leaders.restore(saved)
        set_random_state(saved["random"], self.game.device)
        self.step_count, self.seconds = saved["step"], saved["seconds"]
        self.gradients, self.products = saved["gradients"], saved["products"]
        self.states, self.positions, self.buffers = saved["states"], saved["positions"], saved["buffers"]
        self.history, self.gathered.kept, self.memory = saved["history"], saved["warned"], saved["memory"]

    # The end ---------------------------------------------------------------------------------------------------------

    def solution(self) -> Solution | Solutions:
        """The leaders where they are and the followers' answer to them; warns of what still holds."""
        gathering = self.gathered.gathering(self.step_count + 1, counted=False)
        with torch.no_grad(), random_kept(self.game.device), gathering:
            variables, states, buffers = self._respond(self.leaders.trees(self.leaders.points))
        values = {k: v for name in self.game.names for k, v in self._shown_losses(name, variables, states).items()}
        told = self.gathered.told(self.step_count) + self._still_loose()
        for warning in told:
            if warning.category is not None:
                warnings.warn(warning.text, warning.category, stacklevel=3)
        # The last derivative belongs to the last step, the answer here needs none; a learned slope is judged here too.
        ends, steps = self._reports(states), self._reports(self.states)
        residuals = {n: steps[n].residual if _unknown(ends[n].residual) else ends[n].residual for n in ends}
        known: dict[str, Any] = {n: residual for n, residual in residuals.items() if residual is not None}
        ended: dict[str, Any] = {
            "variables": map_leaves(lambda t: t.detach().clone(), {name: variables[name] for name in self.game.names}),
            "history": list(self.history),
            "stationarity": {name: report.stationarity for name, report in ends.items()},
            "gradients": self.gradients + sum(report.gradients for report in ends.values()),
            "products": self._products(),
            "seconds": self.seconds,
            "warnings": tuple(warning.text for warning in told),
            "states": states,
            "buffers": buffers,
        }
        if isinstance(self.game, Games):
            warned = tuple(warning.games for warning in told)
            return Solutions(values=values, residuals=known, warned=warned, **ended)
        return Solution(
            values={n: float(value) for n, value in values.items()},
            residuals=known,
            errors={n: report.error for n, report in steps.items() if not math.isnan(report.error)},
            **ended,
        )

    def _still_loose(self) -> list[RunWarning]:
        """Followers whose last tolerances were not yet those that were asked for."""
        found = []
        for name, report in self._reports(self.states).items():
            looser = report.loosened
            if looser > 1.0:
                text = (
                    f"The run ended while the inexactness= of {name!r} was still {looser:.3g} times looser than its "
                    "tolerances: the leader's last step was taken with that. Give it more steps, or a faster schedule."
                )
                found.append(RunWarning(text, category=NonConvergenceWarning))
        return found


def _unknown(residual: Size | None) -> bool:
    return isinstance(residual, float) and math.isnan(residual)


def _told(response: Response | Dynamics) -> str:
    """A response's or a rule's configuration as text, the same from one process to the next."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(response))
