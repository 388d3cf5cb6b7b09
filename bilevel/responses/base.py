"""The library's one noun: a response, a differentiable map from the others' variables to a follower's own."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel._returned import Lent, both, described
from bilevel._root import refuse_captures
from bilevel.autodiff import transforms_active
from bilevel.errors import BilevelWarning
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.game.others import Others
from bilevel.inner.optimizer import TorchOptimizer, torch_optimizer
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.randomness import random_kept
from bilevel.responses.own_functions import warn_of_second
from bilevel.responses.promise import Behaviour, Promise, Report
from bilevel.second_order import differentiated_twice, require_custom_second, require_second
from bilevel.tree import Variables, leaf_names, leaves, map_leaves


@dataclass(frozen=True)
class FartherLook:
    """What a response that looks only so far ahead is held against.

    Args:
        response: the same with a longer horizon.
        tolerance: the share of the longer horizon's hypergradient that the response's own may miss.
        told: what is compared, in words.
    """

    response: Response
    tolerance: float
    told: str


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

    A response that says `in_place` is the exception, for size: a call overwrites its input state and returns it.
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

    @property
    def steps_a_call(self) -> int | None:
        """The follower's steps in each call after the first, at most; None where it cannot be told."""
        return self.budget

    def with_budget(self, steps: int) -> Response:
        """The same response, with so many steps of the follower a call; raises `TypeError` where it has no budget."""
        raise TypeError(f"{type(self).__name__} has no budget of steps to set; override budget and with_budget.")

    @property
    def farther(self) -> FartherLook | None:
        """The same response with a longer horizon, to hold it against now and then; None where it has no horizon."""
        return None

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

    def adopt(self, saved: State, start: State) -> State:
        """The state to go on from, of `saved`, which a response with other settings left; `start` is this one's own.

        What has the form that it has in `start` is kept. What `start` does not know yet, such as an optimiser's memory,
        begins anew; override to keep more of it.
        """
        return {key: _adopted(saved.get(key), entry) for key, entry in start.items()}

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


def answered(
    response: Response, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
) -> tuple[Variables, State]:
    """What a response returns, held to its contract; `solve` and the checks call responses by this.

    Raises:
        TypeError, ValueError: For what is no tuple of variables in the form of the follower's init and a state with all
            that the last one held; for variables without a derivative in others that require grad; and for a response
            that wrote into its state or into the others' variables.
    """
    name = str(state["follower"])
    told = f"The response of player {name!r}, {type(response).__name__},"
    lent = Lent()
    given = others
    if not transforms_active():
        if isinstance(others, Others):
            given = others.noting(lambda other, found: lent.note(f"the variables of player {other!r}", found))
        else:
            for other, variables in others.items():
                lent.note(f"the variables of player {other!r}", variables)
        if not response.in_place:
            for key, entry in state.items():
                lent.note(f"state[{key!r}]", entry)
    answer, after = both(response(game, given, state, batch), told, "the variables in answer, and the next state")
    lent.require_untouched(told)
    require_answer(game, name, answer, told)
    if not isinstance(after, dict):
        raise TypeError(f"{told} returned {described(after)} as the next state; expected follower.next_state(...).")
    lost = [key for key in state if key not in after]
    if lost:
        raise ValueError(
            f"{told} returned a next state without {lost}, which the last one held; expected "
            "follower.next_state(...), or {**state, ...}."
        )
    if "variables" in after:
        require_answer(game, name, after["variables"], f"{told} in its next state")
    if torch.is_grad_enabled() and not transforms_active():
        _require_derivative(game, name, others, answer, told)
    return answer, after


def require_answer(game: Game, name: str, answer: Variables, told: str) -> None:
    """Raise where variables of a follower have not the form of its init, or not the game's dtype and device."""
    found = leaves(answer)
    if not found or not all(isinstance(leaf, Tensor) for leaf in found):
        raise TypeError(
            f"{told} returned {described(answer)} as the variables of {name!r}; expected tensors in the form of its "
            "init."
        )
    try:
        game.check(name, answer)
    except ValueError as error:
        raise ValueError(f"{told} returned other variables than the game has. {error}") from error
    like = game.like
    for leaf in found:
        if leaf.dtype != like.dtype or leaf.device != like.device:
            raise ValueError(
                f"{told} returned {described(leaf)} on {leaf.device} among the variables of {name!r}; all variables of "
                f"this game are of {like.dtype} on {like.device}."
            )


def _require_derivative(game: Game, name: str, others: Mapping[str, Variables], answer: Variables, told: str) -> None:
    """Raise `ValueError` for an answer without a graph, where a player who moves wants to know how it moves."""
    if any(leaf.requires_grad for leaf in leaves(answer)):
        return
    known = [other for other in game.arguments(name) if other in others]
    moving = [other for other in known if any(leaf.requires_grad for leaf in leaves(others[other]))]
    asking = [other for other in moving if name in game.arguments(other)]
    if asking:
        raise ValueError(
            f"{told} returned variables that do not depend on those of {asking}, who require grad: they were detached, "
            f"and the gradient of {asking[0]!r} would lack all that comes through {name!r}. Compute the answer from "
            "`others` on a graph; who is to stand still needs no response."
        )


def _adopted(saved: Any, start: Any) -> Any:
    """`saved` where it has the form of `start`, and of dicts what has; else `start`."""
    if isinstance(start, dict) and isinstance(saved, dict):
        return {key: _adopted(saved.get(key), entry) for key, entry in start.items()}
    if isinstance(start, Tensor) or isinstance(saved, Tensor):
        tensors = isinstance(start, Tensor) and isinstance(saved, Tensor)
        return saved if tensors and (saved.shape, saved.dtype) == (start.shape, start.dtype) else start
    if isinstance(start, list | tuple) and isinstance(saved, list | tuple):
        pairs = zip(saved, start, strict=False)
        return saved if len(saved) == len(start) and all(_adopted(one, other) is one for one, other in pairs) else start
    return saved if type(saved) is type(start) else start


def fresh_state(
    game: Game,
    follower: str | None,
    seed: int,
    *,
    many: bool = False,
    constrained: bool = False,
    from_start: bool = False,
) -> State:
    """What every response's state holds before its first call.

    `follower`, the player's name; `variables`, its init; `data`, its place in its batches, and `buffers`, its module's;
    `gradients` and `products`, evaluations so far; `stationarity`, its |gradient| at the answer over `reference`, that
    at the start; `terms`, the size of the terms that cancel in it there. Who does not say that it can do more is
    refused where more is needed.

    Args:
        game: The game.
        follower: The player's name; None: the last in order of play.
        seed: Of its data.
        many: Whether the response can answer for many games at once (`Games`), with sizes `[count]`.
        constrained: Whether it heeds functions that constrain the follower, whose `multipliers` the state then holds.
        from_start: Whether its derivative sees where the follower starts (`start=`).
    """
    name = game.names[-1] if follower is None else follower
    if name not in game.names:
        raise ValueError(f"There is no player {name!r} to respond; players are {list(game.names)}.")
    if game.names.index(name) == 0:
        raise ValueError(
            f"Player {name!r} moves first and has nobody to respond to. A follower is declared after its leader in "
            f"Game(...); players in order of play: {list(game.names)}."
        )
    game.require_follower(name)
    game.require_ranks(f"The response of player {name!r}")
    if not many:
        game.require_one(f"The response of player {name!r}, unlike Unrolled and Implicit,")
    alone = game.starts_alone(name)
    if alone and not from_start:
        raise TypeError(
            f"The response of player {name!r}: {alone[0]} reaches it by its start= and no loss, and only Unrolled "
            "differentiates where a follower starts: an optimum does not depend on it, and the gradient would be zero. "
            "Use Unrolled, or let the loss depend on it, as by the proximal term of iMAML, "
            "lam / 2 * (task - meta).square().sum()."
        )
    state: State = {
        "follower": name,
        "variables": game.initial(name),
        "data": game.start(name, seed),
        "buffers": game.buffers_of(name),
        "gradients": 0,
        "products": 0,
        "stationarity": math.nan,
        "reference": 1.0,
        "terms": 0.0,
    }
    start = at_start(game, state)
    if not constrained and start.constraints is not None:
        raise TypeError(
            f"The response of player {name!r}, unlike Implicit, would not see the functions that constrain the player. "
            'Use Implicit(Scipy("SLSQP")), which rests where the constraints and their multipliers say; or write a '
            "projection as residual=, which Unrolled follows."
        )
    if start.rests.needs_scale:
        state |= {"scale": start.measured_scale(leaves(state["variables"]))}
        start = at_start(game, state)
    with random_kept(game.device), torch.no_grad():
        begins, _ = start.begins(state, warm=False)
        state["variables"] = start.form.build([leaf.clone() for leaf in begins])
        _, slopes = start.gradients(begins)
        if unknowns := start.first():
            state |= unknowns
            start = at_start(game, state)
        # Stationarity is told in units of the residual at the start, so that a loss's scale does not matter.
        return state | start.measured(slopes, start.as_unknowns(state))


def at_start(game: Game, state: State, further: Iterable[str] = ()) -> Follower:
    """The follower of a fresh state, everybody at the start of the game; see `Game.follower`."""
    name = state["follower"]
    start = {other: game.initial(other) for other in game.reads(name, further)}
    return game.follower(start, state, further=further)


def refuse_captured(start: Follower, state: State) -> None:
    """Raise `CapturedTensorError` when the follower's objective captures a tensor that requires grad.

    `start` is the follower of the fresh `state`. Only Unrolled would give such a tensor a gradient; everybody else's
    answer does not see it.
    """
    refuse_captures(start.held_residual(), start.as_unknowns(state), start.xs)


def require_second_derivative(start: Follower, state: State) -> None:
    """Raise `SecondDerivativeError` when the follower's gradient cannot be differentiated, as a response needs it.

    `start` is the follower of the fresh `state`. Warns once where a kernel without a second derivative is replaced.
    Costs one evaluation of F on a graph, a product, and one evaluation of each loss.
    """
    if transforms_active():  # there nothing is on a graph that could be looked at
        start.game.require_twice(start.name)
        return
    game, name, y = start.game, start.name, map_leaves(_tracked, state["variables"])
    others = start.input_form.build([_tracked(x) for x in start.xs])
    custom: list[str] = []
    with random_kept(game.device), torch.enable_grad(), differentiated_twice():
        for member in game.members(name):
            if game.residual(member).differentiates_loss:
                batch = start.batch if member == name or start.batch is None else start.batch[member]
                loss = game.total(game.evaluate(member, {**others, name: y}, batch, start.buffers)[0])
                custom += require_custom_second(member, loss)
        _, slopes, _ = start.rests(start.situation(others), leaves(y))
    require_second(name, slopes, custom)
    game.require_twice(name)
    warn_of_second(start, start.as_unknowns(state))
    kernels = game.kernels(start.name)
    if kernels.told():
        warnings.warn(
            BilevelWarning(
                f"Player {start.name!r}: where its loss is differentiated twice, {kernels.told()}. The numbers are the "
                "same, and PyTorch has no second derivative of the faster form; time and memory are more."
            ),
            stacklevel=3,
        )


def _tracked(leaf: Tensor) -> Tensor:
    return leaf.detach().clone().requires_grad_()


def refuse_optimizer_hyper(
    response: object, game: Game, follower: str, optimizer: OptimizerFactory | TorchOptimizer | None
) -> None:
    """Raise `TypeError` when the inner optimiser itself depends on a leader.

    A follower's optimum does not depend on how it is found: the hypergradient would be zero, in silence.
    """
    name = type(response).__name__
    way_out = "A follower's optimum does not depend on its optimiser; only Unrolled differentiates through the steps."
    settings = None if optimizer is None else torch_optimizer(name, optimizer)
    declared = game.optimizer_players
    used = [] if settings is None else settings.players(game.names)
    if declared or used:
        raise TypeError(
            f"{name} cannot tune {(declared or used)[0]!r}, a hyperparameter of the inner optimiser. {way_out}"
        )
    if settings is None:
        return
    settings.require_players(game.names)
    start = game.initial(follower)
    built = settings.build([leaf.detach().clone() for leaf in leaves(start)], leaf_names(start, follower))
    options = [pair for group in built.param_groups for pair in group.items()]
    options += [("clip_norm", settings.clip_norm), ("clip_value", settings.clip_value), ("rates", settings.rates)]
    for key, value in options:
        if isinstance(value, Tensor) and value.requires_grad:
            raise TypeError(f"{name} was given an optimiser whose {key} is a tensor that requires grad. {way_out}")
