"""The follower takes k optimiser steps, and the leader differentiates through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import transforms_active
from bilevel.errors import require_kinds
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.inner.optimizer import TorchOptimizer, torch_optimizer
from bilevel.inner.refusals import refuse_unprojected
from bilevel.inner.schedule import place_alone
from bilevel.inner.torch_optim import OptimizerFactory, kept_memory
from bilevel.responses.base import FartherLook, Response, State, at_start, fresh_state, require_second_derivative
from bilevel.responses.promise import Behaviour, Estimate, Promise
from bilevel.responses.promise import Steps as StepsPromise
from bilevel.responses.unrolled.differentiation import Differentiation, Followed, Point, ReverseMode, Steps
from bilevel.responses.unrolled.hyperparameters import refuse_lost
from bilevel.responses.unrolled.recipe import Recipe
from bilevel.responses.unrolled.segments import Segments
from bilevel.tree import Variables, leaf_names, leaves, map_leaves


@final
@dataclass(frozen=True)
class Unrolled(Response):
    r"""The follower's variables after `steps` optimiser steps, differentiated through every one of them.

    $$y_{k+1} = y_k - \mathrm{step}(\nabla_y f(x, y_k)), \qquad \frac{dy_K}{dx}$$

    The trajectory is torch's own, of an *unmodified* optimiser: SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam,
    Adamax, Adadelta or ASGD, with any of their options and parameter groups, or a subclass that leaves the step alone;
    one of your own is a `bl.inner.DifferentiableOptimizer`. Clipping, schedules and accumulated gradients are options:
    `Unrolled(bl.inner.TorchOptimizer(factory, clip_norm=1.0, scheduler=...))`.

    An option that is a tensor, `lr`, `momentum`, `betas`, `weight_decay`, receives its exact gradient. Further
    parameters of a factory of your own that are named after players receive those players' variables:
    `Unrolled(lambda params, lr: SGD(params, lr=lr.exp()), steps=20)`.

    The derivative is exact for `steps` steps from the start, which is what the leader then anticipates; it is the
    best response's only as the steps converge, with an error like k rho^k. Costs `steps` gradients, as many
    Hessian-vector products in backward, and by `ReverseMode` the memory of every step's graph.
    Source: Maclaurin et al. 2015 (arXiv 1502.03492); Franceschi et al. 2017 (arXiv 1703.01785).

    Args:
        optimizer: A callable from a list of tensors to a torch.optim optimiser, or a `TorchOptimizer` with options.
        steps: The optimiser's steps in a call.
        backprop_steps: Differentiate only the last so many steps (truncated: biased towards short horizons).
        warm_start: Continue from the last call's variables, optimiser memory and place in the schedule; else each call
            starts at `init`. A player with `start=` starts there in every call, and the derivative begins with that.
        differentiation: Selects how the derivative is computed; only memory and time change. `ReverseMode()` holds the
            graph of every step; `Segments(memory=...)` takes most of them again in backward, for a small part of the
            memory; `ForwardMode()` carries the derivatives along, for a few leader's entries and any number of steps.
        tolerance: In leader steps 16, 64, 256, ... `solve` compares the hypergradient with one of four times the
            horizon, and warns where more than this share of the longer one's is missing, on minibatches in the mean of
            five looks and beyond their noise; None compares nothing.

    Raises:
        TypeError: For optimisers that cannot be differentiated (LBFGS, Adafactor, Rprop, a subclass that overrides
            `step`), for step hooks, and for a player whose derivative torch's optimiser would lose.
        NonFiniteError: In a call, when a loss or a gradient became NaN or infinite; it says in which step.

    Examples:
        >>> from functools import partial
        >>> Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3).steps
        3
    """

    optimizer: OptimizerFactory | TorchOptimizer
    steps: int = 100
    backprop_steps: int | None = None
    warm_start: bool = True
    differentiation: Differentiation = field(default_factory=ReverseMode)
    tolerance: float | None = 0.9

    def __post_init__(self) -> None:
        require_kinds(self)
        torch_optimizer("Unrolled", self.optimizer)
        if self.steps < 1:
            raise ValueError(f"Unrolled: steps={self.steps}; expected at least 1.")
        if self.backprop_steps is not None and not 1 <= self.backprop_steps <= self.steps:
            raise ValueError(
                f"Unrolled: backprop_steps={self.backprop_steps}; expected 1 to steps={self.steps}, or None."
            )
        if self.tolerance is not None and not self.tolerance > 0.0:
            raise ValueError(f"Unrolled: tolerance={self.tolerance}; expected a number > 0, or None.")
        if not isinstance(self.differentiation, Differentiation):
            raise TypeError(
                f"Unrolled: differentiation={self.differentiation!r}; expected ReverseMode(), Segments(...) or "
                "ForwardMode()."
            )

    @property
    def promise(self) -> Promise:
        """The derivative of its steps; with `backprop_steps` an estimate of it."""
        if self.backprop_steps is None or self.backprop_steps == self.steps:
            return StepsPromise()
        return Estimate(StepsPromise(), reason=f"differentiates the last {self.backprop_steps} of {self.steps} steps")

    @property
    def budget(self) -> int:
        """Steps a call."""
        return self.steps

    def with_budget(self, steps: int) -> Unrolled:
        """The same with so many steps a call, of which no more are differentiated than were."""
        last = self.backprop_steps
        return replace(self, steps=steps, backprop_steps=None if last is None else min(steps, last))

    @property
    def farther(self) -> FartherLook | None:
        """Four times the steps, or four times as many of them differentiated."""
        if self.tolerance is None:
            return None
        last, many = self.backprop_steps, 4 * self.steps
        if last is not None and last < self.steps:
            longer = replace(self, backprop_steps=min(4 * last, self.steps))
            told = f"differentiates {last} steps; {longer.backprop_steps}"
        else:
            longer, told = replace(self, steps=many, backprop_steps=None), f"looks {self.steps} steps ahead; {many}"
        if isinstance(self.differentiation, ReverseMode):  # at the memory of fewer steps than its own
            longer = replace(longer, differentiation=Segments())
        return FartherLook(longer, self.tolerance, told)

    @property
    def behaviour(self) -> Behaviour:
        """It starts where it stopped if `warm_start`."""
        return Behaviour(warm=self.warm_start)

    @property
    def inner_optimizer(self) -> OptimizerFactory:
        """That of `optimizer`."""
        return torch_optimizer("Unrolled", self.optimizer).factory

    def with_inner_optimizer(self, optimizer: OptimizerFactory) -> Unrolled:
        """The same with another optimiser, and the same options around it."""
        options = torch_optimizer("Unrolled", self.optimizer)
        return replace(self, optimizer=optimizer if options.plain else replace(options, factory=optimizer))

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call; refuses an optimiser that cannot be differentiated."""
        state = fresh_state(game, follower, seed, many=True, from_start=True)
        alone = game.starts_alone(state["follower"])
        if alone and self.backprop_steps not in (None, self.steps):
            raise ValueError(
                f"Unrolled: backprop_steps={self.backprop_steps} of steps={self.steps} does not reach back to the "
                f"start, by which alone {alone[0]} acts on player {state['follower']!r}: its gradient would be zero. "
                "Leave backprop_steps out; Segments() takes less memory."
            )
        settings = torch_optimizer("Unrolled", self.optimizer)
        start = at_start(game, state, settings.players(game.names))
        start.refuse_mixing("Unrolled", settings.factory)
        named = settings.option_players(game.names)
        game.require_shared("Unrolled with options that are functions of players", named)
        self.differentiation.require(game)
        require_second_derivative(start, state)
        self.differentiation.require_follower(start)
        if start.rests.projects:
            self._refuse_unprojected(start, state)
        refuse_lost(settings, start, leaves(state["variables"]), self.steps)
        return state | {"optimizer": None, "schedule": None, "loss": None}

    def _refuse_unprojected(self, start: Follower, state: State) -> None:
        y = leaves(state["variables"])
        optimizer = torch_optimizer("Unrolled", self.optimizer).build(
            [leaf.detach().clone() for leaf in y], leaf_names(state["variables"], start.name), start.others
        )
        refuse_unprojected("Unrolled", start.name, start.rests, optimizer)

    def adopt(self, saved: State, start: State) -> State:
        """With the optimiser's memory, where it is such as this one's; a schedule goes on at its step."""
        y, factory = start["variables"], self.inner_optimizer
        kept = kept_memory(factory, leaves(y), saved.get("optimizer"), leaf_names(y, start["follower"]))
        return super().adopt(saved, start) | {"optimizer": kept, "schedule": place_alone(saved.get("schedule"))}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The variables after `steps` steps, and the state to continue from.

        Work is counted when it is called, as for one backward pass.
        """
        settings = torch_optimizer("Unrolled", self.optimizer)
        follower = game.follower(others, state, batch, further=settings.players(others))
        y, kept = follower.begins(state, warm=self.warm_start)
        lift = _lifting([*follower.xs, *leaves(follower.batch)]) if transforms_active() else torch.clone
        if transforms_active() or not any(leaf.requires_grad for leaf in y):
            y = [lift(leaf) for leaf in y]  # what is on a graph a step copies before it writes
        memory = state["optimizer"] if kept else None
        lifted = None if memory is None else [map_leaves(_only_tensors(lift), slot) for slot in memory]
        place = state.get("schedule") if kept else None
        recipe = Recipe.of(settings, follower, y, place, self.steps)
        steps = Steps(recipe, follower, follower.inputs)
        differentiated = self.steps if self.backprop_steps is None else self.backprop_steps
        if torch.is_grad_enabled():
            start = steps.stand_still(Point(y, lifted), self.steps - differentiated)
            followed = self.differentiation.follow(steps, start, differentiated)
        else:
            followed = Followed(steps.stand_still(Point(y, lifted), self.steps), 0, 0)
        y, after = followed.end.y, followed.end.memory or ()
        steps.require_finite(y)
        variables = follower.form.build(y)
        if transforms_active():
            return variables, state
        state = follower.next_state(state, y, steps.slopes, gradients=followed.gradients, products=followed.products)
        memory = [map_leaves(_only_tensors(lambda t: t.detach().clone()), slot) for slot in after]
        seen = steps.loss if follower.tells_its_loss else None
        return variables, state | {"optimizer": memory, "schedule": recipe.place_after, "loss": seen}


def _only_tensors(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf


def _lifting(inputs: list[Any]) -> Callable[[Tensor], Tensor]:
    """Make a tensor a citizen of the transforms that a call's inputs are in; they refuse writes to outsiders."""
    zeros = [torch.zeros_like(x, dtype=torch.float32).sum() for x in inputs if isinstance(x, Tensor)]
    return lambda tensor: sum((zero.to(tensor) for zero in zeros), tensor)
