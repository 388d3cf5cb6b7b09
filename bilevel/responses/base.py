"""The library's one noun: a response, a differentiable map from the others' variables to a follower's own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel._root import refuse_captures
from bilevel.autodiff import concrete, gradient, transforms_active
from bilevel.errors import NonFiniteError
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.inner.torch_optim import OptimizerFactory, build, player_parameters
from bilevel.many import Games
from bilevel.randomness import random_kept, random_state
from bilevel.responses.promise import Behaviour, Promise, Report, Size
from bilevel.tree import Structure, Variables, flatten, join, leaves, map_leaves, structure_of

State = dict[str, Any]
"""A response's state: a dict of tensors, numbers and strings that `torch.save` writes and `weights_only=True` reads."""


class Response(ABC):
    """How a follower answers, as configuration; its state is an argument and a return value.

        state = response.init(game)
        weights, state = response(game, {"decay": decay}, state, batch)
        game.loss("decay", {"decay": decay, "weights": weights}).backward()
        state = response.after_backward(state, weights)

    The variables returned are differentiable in the others' variables: a loss of them, and plain autograd, give the
    leader's hypergradient. Nothing that is passed is changed, and a state never changes after it was returned: what
    the backward pass learned (a linear solve's answer, which is the next one's start, and its residual) comes by
    `after_backward`. Inside a `torch.func` transform a response is a pure function of the others' variables at the
    given state, and returns that state as it came.

    A response that says `in_place` is the exception, for size: a call moves on the very state that it is passed.
    """

    @property
    def in_place(self) -> bool:
        """Whether a call writes into the state that it is passed, and returns that one."""
        return False

    @property
    @abstractmethod
    def promise(self) -> Promise:
        """What its derivative is the derivative of: `Optimum()`, `Steps()`, or an `Estimate(...)` with its bias."""

    @property
    def budget(self) -> int | None:
        """The steps of the follower that a call may take; None where there is nothing to set."""
        return None

    def with_budget(self, steps: int) -> Response:
        """The same response, with so many steps of the follower a call; raises `TypeError` where it has no budget."""
        raise TypeError(f"{type(self).__name__} has no budget of steps to set; override budget and with_budget.")

    @property
    def behaviour(self) -> Behaviour:
        """How it behaves from call to call; override what is not so."""
        return Behaviour()

    @property
    def inner_optimizer(self) -> OptimizerFactory | None:
        """The torch.optim optimiser that steps the follower's variables; None where there is none."""
        return None

    def with_inner_optimizer(self, optimizer: OptimizerFactory) -> Response:
        """The same response, with another optimiser for its steps; raises `TypeError` where it has none."""
        raise TypeError(
            f"{type(self).__name__} has no torch.optim optimiser to replace; override inner_optimizer and "
            "with_inner_optimizer."
        )

    def after_backward(self, state: State, answer: Variables) -> State:
        """The state with what the backward pass through `answer`, a call's variables, has learned.

        `state` is the one that the call returned, and is left as it is. Without this call the next one starts as if
        there had been no backward pass, and its products are not counted.
        """
        return state

    def report(self, state: State) -> Report:
        """What a state says of the calls so far: work, stationarity, and what is left of the derivative's equation."""
        return Report(int(state["gradients"]), int(state["products"]), state["stationarity"])

    @abstractmethod
    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call, for the named follower (default: the last player in order of play)."""

    @abstractmethod
    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The follower's variables in answer to `others`, and the next state.

        `batch` is used for every step when it is given; else batches are drawn from the player's data, from the
        place that the state remembers.
        """


class Follower:
    """One follower during one call: its loss as a function of its leaves, its batches, its module's buffers.

    Lives as long as the call; what should outlast it (`position`, `buffers`, `gradient_count`) goes into the next
    state.
    """

    def __init__(self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch) -> None:
        self.game, self.name = game, str(state["follower"])
        for name in others:
            if name not in game.names or name == self.name:
                raise ValueError(
                    f"The response of player {self.name!r} was given variables of {name!r}; expected those of the "
                    f"other players, {[n for n in game.names if n != self.name]}."
                )
            game.check(name, others[name])
        missing = [n for n in game.arguments(self.name) if n != self.name and n not in others]
        missing = [n for n in missing if n not in game.anticipated]
        if missing:
            raise ValueError(
                f"The response of player {self.name!r} needs the variables of {missing}; given are {sorted(others)}."
            )
        self.inputs = dict(others)
        self.xs: list[Tensor] = leaves(self.inputs)
        """The leaves of the others' variables."""
        self.input_form = structure_of(self.inputs)
        self.form: Structure = game.structure(self.name)
        self.position = state["data"]
        self.buffers: Buffers = {self.name: state["buffers"]} if state["buffers"] else {}
        self.gradient_count = 0
        self.fixed = batch is not None
        self.batch = batch
        if batch is None:
            self.advance()

    @property
    def others(self) -> dict[str, Variables]:
        """The other players' variables, detached."""
        return self.input_form.build([x.detach() for x in self.xs])  # type: ignore[no-any-return]

    def advance(self) -> None:
        """Move on to the next batch, unless one batch was given for the whole call."""
        if not self.fixed:
            self.batch, self.position = self.game.draw(self.name, self.position)

    def loss(self, y: Variables, others: Mapping[str, Variables], *, advance_buffers: bool = False) -> Tensor:
        """The follower's loss on the present batch."""
        variables = {**others, self.name: y}
        loss, buffers = self.game.evaluate(self.name, variables, self.batch, self.buffers)
        if advance_buffers and self.buffers:
            self.buffers = {self.name: buffers[self.name]}
        return loss

    def gradients(self, y: list[Tensor], others: Mapping[str, Variables] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of the follower's leaves on the present batch; its module's buffers advance."""
        given = self.others if others is None else others
        loss, slopes, after = self.game.own_gradients(self.name, y, given, self.batch, self.buffers)
        if self.buffers:
            self.buffers = {self.name: after[self.name]}
        self.gradient_count += 1
        return loss, slopes

    @property
    def joint(self) -> bool:
        """Whether it is several players, who answer together and have no single loss."""
        return self.game.members(self.name) != (self.name,)

    @property
    def batch_dims(self) -> Any:
        """Of many games: which leaves of the batch differ from game to game, as `in_dims` of vmap."""
        return self._many().batch_dims(self.name, self.batch)

    def single(self, index: int) -> Follower:
        """Of many games: one game's follower, on its part of the present batch for good."""
        games = self._many()
        if games.anticipated:
            raise TypeError(
                f"Player {self.name!r}: its inner solver takes many games one after the other, but "
                f"{sorted(games.anticipated)} answers for all at once. Use a torch.optim optimiser that moves each "
                "entry by itself, such as SGD or Adam."
            )
        buffers, others = map_leaves(lambda leaf: leaf[index], (self.buffers.get(self.name, {}), self.others))
        state = {"follower": self.name, "data": self.position, "buffers": buffers}
        return Follower(games.game(index), others, state, games.batch_of(self.name, self.batch, index))

    def _many(self) -> Games:
        if not isinstance(self.game, Games):
            raise TypeError(f"Player {self.name!r} plays one game; this is for the followers of many.")
        return self.game

    def held_residual(self) -> HeldResidual:
        """F(y, *xs), the own gradients, for ever on the present batch, buffers and random numbers."""
        return HeldResidual(self)

    def norm(self, slopes: Sequence[Tensor]) -> Size:
        """A gradient's norm; of many games one each."""
        if self.game.count is not None:
            return self.game.norms(slopes).detach()
        return concrete(self.game.norms(slopes))

    def relative(self, slopes_norm: Size, state: State) -> Size:
        """A gradient's norm in units of the one at the start of the game."""
        reference: Size = state["reference"]
        return slopes_norm / reference

    def require_finite(self, y: list[Tensor], advice: str, loss: float = 0.0) -> None:
        """Raise `NonFiniteError` when a solution holds NaN or infinity, or the loss at it is neither.

        Outside a loss's domain, beyond a logarithmic barrier say, the loss is NaN and its gradient may still be 0.
        """
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"Player {self.name!r}: its loss became {loss} in its inner steps{self._among_losses(y)}: they left "
                f"its domain. {advice}"
            )
        if not math.isfinite(sum(concrete(torch.linalg.vector_norm(leaf)) for leaf in y)):
            where = "" if self.game.count is None else among(self.game.norms(y))
            raise NonFiniteError(
                f"Player {self.name!r}: its variables became NaN or infinite in its inner steps{where}. {advice}"
            )

    def _among_losses(self, y: list[Tensor]) -> str:
        if self.game.count is None:
            return ""
        with torch.no_grad(), random_kept(self.game.device):
            return among(self.loss(self.form.build(y), self.others))


class HeldResidual:
    """F(y, *xs), a follower's own gradients, for ever on one batch, buffers and random numbers.

    Maps `y: [n]` and the leaves of the others' variables to `[n]`; differentiable. `loss` is the loss at the last call.
    """

    def __init__(self, follower: Follower) -> None:
        self._follower, self._batch, self._buffers = follower, follower.batch, follower.buffers
        self._random = random_state(follower.game.device)
        self.loss = math.nan

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """F there."""
        follower = self._follower
        game, name = follower.game, follower.name
        others = follower.input_form.build(xs)

        def loss(y: Tensor) -> Tensor:
            variables = {**others, name: follower.form.unflatten(y)}
            return game.total(game.loss(name, variables, self._batch, self._buffers))

        # Hold the dropout mask as well as the batch: a linear solver needs one fixed operator.
        with random_kept(game.device, start=self._random):
            if follower.joint:
                y_leaves = follower.form.split(y)
                value, slopes, _ = game.own_gradients(name, y_leaves, others, self._batch, self._buffers)
                slope = join(slopes)
            else:
                value, (slope,) = gradient(loss, y)
        if not transforms_active():
            self.loss = float(value.detach())
        return slope


def among(values: Tensor) -> str:
    """Which of many games' `values: [count]` are not finite, in words."""
    wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
    return f" in {len(wrong)} of {len(values)} games, the first being game {wrong[0]}" if wrong else ""


def fresh_state(game: Game, follower: str | None, seed: int, *, many: bool = False) -> State:
    """What every response's state holds before its first call.

    `follower`, the player's name; `variables`, its init; `data`, its place in its batches, and `buffers`, its module's;
    `gradients` and `products`, evaluations so far; `stationarity`, its |gradient| at the answer over `reference`, that
    at the start. `many`: whether the response can answer for many games at once (`Games`), with sizes `[count]`; who
    does not say so is refused there.
    """
    name = game.names[-1] if follower is None else follower
    if name not in game.names:
        raise ValueError(f"There is no player {name!r} to respond; players are {list(game.names)}.")
    if game.names.index(name) == 0:
        raise ValueError(
            f"Player {name!r} moves first and has nobody to respond to. A follower is declared after its leader in "
            f"Game(...); players in order of play: {list(game.names)}."
        )
    if game.count is not None and not many:
        raise TypeError(
            f"The response of player {name!r} answers for one game, not for {game.count} at once as Unrolled and "
            "Implicit do. Use one of these, or solve the games one by one: solve(games.game(i), ...)."
        )
    state: State = {
        "follower": name,
        "variables": game.initial(name),
        "data": game.start(name, seed),
        "buffers": game.buffers()[name],
        "gradients": 0,
        "products": 0,
        "stationarity": math.nan,
        "reference": 1.0,
    }
    start = Follower(
        game, {n: game.initial(n) for n in game.names if n != name and n not in game.anticipated}, state, None
    )
    with random_kept(game.device), torch.no_grad():
        _, slopes = start.gradients(leaves(state["variables"]))
    # Stationarity is told in units of the gradient at the start, so that a loss's scale does not matter.
    if game.count is not None:
        norms = game.norms(slopes)
        return state | {"reference": torch.where(norms > 0.0, norms, 1.0)}
    norm = float(game.norms(slopes))
    return state | {"reference": norm if norm > 0.0 else 1.0}


def refuse_captured(game: Game, state: State) -> None:
    """Raise `CapturedTensorError` when the follower's objective captures a tensor that requires grad.

    Only Unrolled would give it a gradient; everybody else's answer does not see it.
    """
    name = state["follower"]
    others = {n: game.initial(n) for n in game.names if n != name and n not in game.anticipated}
    start = Follower(game, others, state, None)
    refuse_captures(start.held_residual(), flatten(state["variables"]), start.xs)


def refuse_optimizer_hyper(response: object, game: Game, follower: str, factory: OptimizerFactory | None) -> None:
    """Raise `TypeError` when the inner optimiser itself depends on a leader.

    A follower's optimum does not depend on how it is found: the hypergradient would be zero, in silence.
    """
    name = type(response).__name__
    way_out = "A follower's optimum does not depend on its optimiser; only Unrolled differentiates through the steps."
    declared = [other for other, player in game.players.items() if player.optimizer_hyper]
    used = [] if factory is None or not callable(factory) else player_parameters(factory, dict.fromkeys(game.names))
    if declared or used:
        raise TypeError(
            f"{name} cannot tune {(declared or used)[0]!r}, a hyperparameter of the inner optimiser. {way_out}"
        )
    if factory is None:
        return
    optimizer = build(factory, [leaf.detach().clone() for leaf in leaves(game.initial(follower))])
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise TypeError(f"{name} was given an optimiser whose {key} is a tensor that requires grad. {way_out}")
