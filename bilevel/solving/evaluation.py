"""The players' losses in one step, as often as the rule of play asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import gradients_of
from bilevel.dynamics.play import OpenedStep
from bilevel.errors import NonFiniteError
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch, Position
from bilevel.randomness import random_kept, random_state, set_random_state
from bilevel.second_order import differentiated_twice
from bilevel.solving.followers import Answers, with_followers
from bilevel.solving.leader_functions import LeaderFunctions, Values
from bilevel.solving.leaders import Leaders
from bilevel.tree import Variables, join, leaves, map_leaves

Point = Mapping[str, list[Tensor]]


@dataclass(frozen=True)
class FirstEvaluation:
    """What a step's record tells: the losses where the players are, not where a rule of play looked ahead."""

    losses: Mapping[str, Tensor]
    variables: Mapping[str, Variables]
    states: dict[str, Any]
    buffers: Buffers
    functions: Mapping[str, Values]


class StepEvaluator:
    """One step's evaluations, on the same batches and random numbers unless told to `advance`, and the same states.

    `positions` are those of the leaders' next batches. `respond` maps the leaders' variables to `Answers`; `only_once`,
    when not empty, is why it may not be asked again. `functions` are those that constrain leaders, and `term` is what
    a leader's loss gets in their place.
    """

    def __init__(
        self,
        game: Game,
        leaders: Leaders,
        respond: Callable[[Mapping[str, Variables]], Answers],
        drawn: Mapping[str, tuple[Batch, Position | None]],
        buffers: Buffers,
        only_once: str,
        functions: Mapping[str, LeaderFunctions],
        term: Callable[[str, Values], Tensor],
    ) -> None:
        self.game, self.leaders, self._buffers = game, leaders, buffers
        self.batches = {name: batch for name, (batch, _) in drawn.items()}
        self.positions = {name: position for name, (_, position) in drawn.items()}
        self._began = dict(self.batches)
        self._respond, self._only_once = respond, only_once
        self._functions, self._term = functions, term
        self._random = random_state(game.device)
        self._first: FirstEvaluation | None = None
        self._answered: Mapping[str, Variables] = {}
        self._states: Mapping[str, Any] = {}
        self.gradients = 0

    @property
    def first(self) -> FirstEvaluation:
        """The first evaluation, where the players are; made to be shown when no rule has asked for it."""
        if self._first is None:
            present, self.batches = self.batches, self._began
            with random_kept(self.game.device, start=self._random), torch.no_grad():
                self._play(self.leaders.points, ())
            self.batches = present
        assert self._first is not None
        return self._first

    def slopes(self, point: Point, wanted: Sequence[str], differentiable: bool) -> dict[str, list[Tensor]]:
        """The wanted leaders' own gradients at a point."""
        if differentiable:
            self._require_twice()
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

    def programme(self, name: str) -> dict[str, Tensor]:
        """A leader's programme where it is: loss f, its `slope` `[n]`, functions c and e, their Jacobians A and E."""
        point = self.leaders.points[name]
        with torch.enable_grad():
            variables, states, buffers = self._respond(self.leaders.trees(self.leaders.points))
            buffers = {**buffers, **self.game.statistics(variables, states)}
            loss, after = self.game.evaluate(name, variables, self.batches[name], buffers)
            values = self._functions[name].values(variables, self.batches[name], buffers)
            rows = [part[0] for part in self._functions[name].rows(values)] if values else [loss.new_zeros(0)] * 2
            jacobians = [self._jacobian(part, point) for part in rows]
            # The loss comes last, so that what a response learns in its backward pass is of it.
            grads = torch.autograd.grad(loss, point, allow_unused=True)
        slope = join(self._required(name, point, grads))
        self.gradients += 1
        self._first = FirstEvaluation(
            {name: loss.detach()}, variables, states, {name: after[name]} if after.get(name) else {},
            map_leaves(Tensor.detach, {name: values} if values else {}),
        )  # fmt: skip
        return {"f": loss, "slope": slope, "c": rows[0], "e": rows[1], "A": jacobians[0], "E": jacobians[1]}

    def _jacobian(self, rows: Tensor, point: list[Tensor]) -> Tensor:
        """One backward pass for each function."""
        found = [join(gradients_of(row, point, retain_graph=True)) for row in rows]
        self.gradients += len(found)
        return torch.stack(found) if found else rows.new_zeros(0, sum(leaf.numel() for leaf in point))

    def _required(self, name: str, point: list[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients, zeros where one is missing; all may be where the loss names neither it nor a follower."""
        if all(grad is None for grad in grads) and self._reaches(name):
            raise NonFiniteError(
                f"Player {name!r}: its hypergradient is missing, not zero: no path leads from its loss to its "
                "variables. Its loss must use them, or a follower's variables that respond to them."
            )
        return [torch.zeros_like(p) if g is None else g for p, g in zip(point, grads, strict=True)]

    def _reaches(self, name: str) -> bool:
        """Whether a leader's loss was seen to depend on its own variables, or on a follower's."""
        leading = set(self.leaders.names)
        return self.game.reaches(name, [other for other in self.game.names if other not in leading])

    def losses(self, point: Point) -> dict[str, Tensor]:
        """Every leader's loss at a point, differentiable."""
        self._require_twice()
        self.gradients += len(self.leaders.names)
        with torch.enable_grad(), differentiated_twice():
            return self._play(point, self.leaders.names)

    def _require_twice(self) -> None:
        for name in self.leaders.names:
            self.game.require_twice(name)

    # As the step that a rule of play may look into: `dynamics.field.Play` --------------------------------------------

    def open(self, point: Point) -> OpenedStep:
        """The followers' answers at a point, and the leaders' losses as functions of everybody's variables."""
        cut: dict[str, list[Tensor]] = {}

        def apart(variables: Mapping[str, Variables]) -> dict[str, Variables]:
            for name, tree in variables.items():
                cut[name] = [leaf.detach().requires_grad_() for leaf in leaves(tree)]
            return {name: self.tree(name, cut[name]) for name in variables}

        self._require_twice()
        self.gradients += len(self.leaders.names)
        with torch.enable_grad(), differentiated_twice():
            losses = self._play(point, self.leaders.names, apart)
        return OpenedStep({name: leaves(tree) for name, tree in self._answered.items()}, cut, losses)

    def own(self, name: str, leaves: Mapping[str, Sequence[Tensor]], batch: tuple[Batch] | tuple[()] = ()) -> Tensor:
        """A leader's loss at everybody's leaves, on its present batch or another."""
        self.gradients += 1
        set_random_state(self._random, self.game.device)
        variables = {other: self.tree(other, leaves[other]) for other in leaves}
        seen = batch[0] if batch else self.batches[name]
        return self.game.total(self.game.evaluate(name, variables, seen, self._moved(name, variables))[0])

    def _moved(self, name: str, variables: Mapping[str, Variables]) -> Buffers:
        """Everybody's buffers; running statistics of those whose modules a loss runs move with their variables."""
        found = with_followers(self._buffers, self._states)
        for other in self.game.arguments(name):
            if other != name and self.game.moves_statistics(other, variables):
                here = other in self.batches
                batch = self.batches[other] if here else self.game.draw(other, self._states[other]["data"])[0]
                found = {**found, **self.game.moving(other, variables, batch, found)}
        return found

    def batch(self, name: str) -> tuple[Batch, int | None]:
        """A leader's present batch, and its pass."""
        position = self.positions[name]
        return self.batches[name], position["epoch"] if position is not None and "epoch" in position else None

    def advance(self, names: Sequence[str]) -> None:
        """On to the next batches, and to other random numbers."""
        if self._first is None:
            self.first  # noqa: B018 - it is told of the step's first batches
        for name in names:
            self.batches[name], self.positions[name] = self.game.draw(name, self.positions[name])
        self._random = random_state(self.game.device)

    def whole_pass(self, name: str, asker: str) -> Iterator[Batch]:
        """All the batches of a leader's present pass."""
        return self.game.whole_pass(name, self.positions[name], asker)

    def pass_length(self, name: str) -> int | None:
        """How many batches a pass of a leader's has, as far as its data say."""
        return self.game.pass_length(name)

    def tree(self, name: str, leaves: Sequence[Any]) -> Variables:
        """Leaves in the form of a player's variables."""
        return self.game.structure(name).build(leaves)

    def require_minimum(self, asker: str, name: str) -> None:
        """Refuse a player that minimises no loss of its own."""
        if not self.game.residual(name).minimises:
            raise TypeError(
                f"{asker} goes by the loss of player {name!r}, who is several players together or rests where a "
                "residual of its own vanishes. Use Implicit with GMRES(), which follows the residual."
            )

    def _play(
        self,
        point: Point,
        wanted: Sequence[str],
        apart: Callable[[Mapping[str, Variables]], Mapping[str, Variables]] = lambda variables: variables,
    ) -> dict[str, Tensor]:
        first = self._first is None
        if not first:  # the same dropout masks as the first time
            if self._only_once:
                raise ValueError(self._only_once)
            set_random_state(self._random, self.game.device)
        variables, states, buffers = self._respond(self.leaders.trees(point))
        self._answered, self._states = variables, states
        seen = apart(variables)
        buffers = {**buffers, **self.game.statistics(seen, states)}
        losses, values = {}, {}
        advanced: Buffers = {}
        found: dict[str, Values] = {}
        for name in self.leaders.names if first else wanted:
            values[name], after = self.game.evaluate(name, seen, self.batches[name], buffers)
            losses[name] = self.game.total(values[name])
            if name in self._functions:
                found[name] = self._functions[name].values(seen, self.batches[name], buffers)
                losses[name] = losses[name] + self._term(name, found[name])
            if after.get(name):  # in its own loss a module is in training mode
                advanced[name] = after[name]
        if first:
            self._first = FirstEvaluation(
                {name: value.detach() for name, value in values.items()},
                variables,
                states,
                advanced,
                map_leaves(Tensor.detach, found),
            )
        return losses
