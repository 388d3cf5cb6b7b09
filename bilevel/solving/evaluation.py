"""The players' losses in one step, as often as the rule of play asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.randomness import random_state, set_random_state
from bilevel.second_order import differentiated_twice
from bilevel.solving.followers import Answers
from bilevel.solving.leaders import Leaders
from bilevel.tree import Variables

Point = Mapping[str, list[Tensor]]


@dataclass(frozen=True)
class FirstEvaluation:
    """What a step's record tells: the losses where the players are, not where a rule of play looked ahead."""

    losses: Mapping[str, Tensor]
    variables: Mapping[str, Variables]
    states: dict[str, Any]
    buffers: Buffers


class StepEvaluator:
    """One step's evaluations, all on the same batches, random numbers and states.

    `respond` maps the leaders' variables to `Answers`; `only_once`, when not empty, is why it may not be asked again.
    """

    def __init__(
        self,
        game: Game,
        leaders: Leaders,
        respond: Callable[[Mapping[str, Variables]], Answers],
        batches: Mapping[str, Batch],
        only_once: str,
    ) -> None:
        self.game, self.leaders, self.batches = game, leaders, batches
        self._respond, self._only_once = respond, only_once
        self._random = random_state(game.device)
        self._first: FirstEvaluation | None = None
        self.gradients = 0

    @property
    def first(self) -> FirstEvaluation:
        """The first evaluation, where the players are."""
        if self._first is None:
            raise RuntimeError("a rule of play gave directions without asking for a gradient")
        return self._first

    def slopes(self, point: Point, wanted: Sequence[str], differentiable: bool) -> dict[str, list[Tensor]]:
        """The wanted leaders' own gradients at a point."""
        with torch.enable_grad(), differentiated_twice(differentiable):
            losses, slopes = self._play(point, wanted), {}
            for name in wanted:
                grads = torch.autograd.grad(
                    losses[name],
                    point[name],
                    retain_graph=differentiable or name != wanted[-1],
                    create_graph=differentiable,
                    allow_unused=True,
                    materialize_grads=False,
                )
                slopes[name] = self._required(name, point[name], grads)
                self.gradients += 1
        return slopes

    def _required(self, name: str, point: list[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients, zeros where one is missing; all may be where the loss names neither it nor a follower."""
        followers = [other for other in self.game.names if other not in self.leaders.names]
        if all(grad is None for grad in grads) and self.game.reaches(name, followers):
            raise NonFiniteError(
                f"Player {name!r}: its hypergradient is missing, not zero: no path leads from its loss to its "
                "variables. Its loss must use them, or a follower's variables that respond to them."
            )
        return [torch.zeros_like(p) if g is None else g for p, g in zip(point, grads, strict=True)]

    def losses(self, point: Point) -> dict[str, Tensor]:
        """Every leader's loss at a point, differentiable."""
        self.gradients += len(self.leaders.names)
        with torch.enable_grad(), differentiated_twice():
            return self._play(point, self.leaders.names)

    def _play(self, point: Point, wanted: Sequence[str]) -> dict[str, Tensor]:
        first = self._first is None
        if not first:  # the same dropout masks as the first time
            if self._only_once:
                raise ValueError(self._only_once)
            set_random_state(self._random, self.game.device)
        variables, states, buffers = self._respond(self.leaders.trees(point))
        losses, values, advanced = {}, {}, buffers
        for name in self.leaders.names if first else wanted:
            values[name], after = self.game.evaluate(name, variables, self.batches[name], buffers)
            losses[name] = self.game.total(values[name])
            advanced = {n: b for n, b in after.items() if n in self.leaders.names and b}
        if first:
            self._first = FirstEvaluation(
                {name: value.detach() for name, value in values.items()}, variables, states, advanced
            )
        return losses
