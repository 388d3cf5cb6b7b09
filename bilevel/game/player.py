"""One player: a loss to minimise, the variables it chooses, the data it sees, and what vanishes where it rests."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from bilevel.constraints import Box, Choice, ConstraintSet, Coordinate, Penalty
from bilevel.constraints.functions import EQUALITY, INEQUALITY, Functions, named_functions
from bilevel.constraints.walls import has_walls
from bilevel.game.constrained import ConstrainedGradient
from bilevel.game.kkt import KKT
from bilevel.game.passes import Source
from bilevel.game.residual import OwnGradient, Residual, UserResidual, required, signature
from bilevel.tree import Variables, detached, leaves, map_leaves, named_leaves


@dataclass(frozen=True, kw_only=False)
class Player:
    r"""One player: a loss to minimise, the variables it chooses, and the data that it sees.

    Args:
        objective: called with keyword arguments named after the players that it depends on, and with `batch` when the
            player has data; returns a scalar loss, to minimise.
        init: a tensor, a pytree of tensors, or an `nn.Module`. In the place of a tensor `bl.Log(1e-6, 1e-1)`,
            `bl.Unit()`, `bl.Interval(low, high)` or `bl.Positive()` keeps it in a range. Of a module the variables
            are the parameters that require grad, as a mapping by name that a loss can call, `weights(images)`: in
            training mode in the player's own loss, in evaluation mode in the others', or as `weights(images,
            training=True)` says. Its buffers (BatchNorm's statistics, say) travel along as state that advances. The
            module itself is never changed.
        data: any iterable of batches that can be iterated more than once, or a function without arguments that makes
            one for each pass; it is re-iterated for ever. Each batch is read once for all who ask for it.
        optimizer_hyper: declares that the variables are hyperparameters of the *inner optimiser*, a learning rate say:
            they reach the follower through `Unrolled(lambda params, lr: SGD(params, lr=lr))` and no objective.
        residual: what vanishes where this player, as a follower, rests: F(y, others) = 0. The default is the gradient
            of its objective. A function of your own has parameters named after players, as the objective has, `batch`
            if it needs it, and `gradient`, which receives the objective's own gradient there; it returns a pytree in
            the form of `init`. `bl.extend.UserResidual(function, symmetric=True)` promises a symmetric dF/dy.
        domain: A set that the player stays in, as leader or follower: `bl.Box(0.0, 5.0)`, `bl.Simplex()`, any of
            `bl.constraints`. `init` lies in it. Of a module's parameters it can be bounds alone.
        prox: A non-smooth term of the loss, `bl.constraints.L1(0.1)`, for a follower. The objective leaves it out.
        inequality: a function of players (and `batch`), as the objective, whose every entry is to be <= 0: a tensor or
            a pytree of tensors. Or a dict or a list of such functions. The same function given to several players who
            answer together, `game.joined(...)`, is one constraint that they share, with one multiplier. A leader's may
            depend on its followers' answers alone.
        equality: the same for entries that are to be 0.
        start: where this player, as a follower, begins in every call, as a function of those who move before it (and of
            `batch`): `start=lambda meta: meta`. `Unrolled` differentiates it, so that an initialisation can lead.
            Nothing is kept from call to call then, whatever `warm_start` says; `init` gives the form.

    A follower who stays within \([0, 5]\) rests where \(F(y) = (y - P(y - s\,\nabla_y f)) / s = 0\):

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Examples:
        >>> import torch
        >>> def loss(x, y): return ((y - x) ** 2).sum()
        >>> Player(loss, init=torch.zeros(3)).names
        ('x', 'y')
        >>> from bilevel.constraints import Box
        >>> Player(loss, init=torch.zeros(3), domain=Box(0.0, 5.0)).rests.symmetric
        False
    """

    objective: Callable[..., Tensor]
    init: Any
    data: Source | None = None
    optimizer_hyper: bool = field(default=False, kw_only=True)
    residual: Callable[..., Variables] | UserResidual | None = field(default=None, kw_only=True)
    domain: ConstraintSet | None = field(default=None, kw_only=True)
    prox: Penalty | None = field(default=None, kw_only=True)
    inequality: Functions | None = field(default=None, kw_only=True)
    equality: Functions | None = field(default=None, kw_only=True)
    start: Callable[..., Variables] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise TypeError(f"Player: objective is {kind(self.objective)}; expected a function that returns a loss.")
        refuse_unnamed("the objective", self.objective)
        if self.data is not None:
            check_data("Player: data", self.data)
        if isinstance(self.init, nn.Module):
            _refuse_uninitialised(self.init)
            _refuse_hooked(dict(self.init.named_parameters()))
        else:
            _refuse_choices(self.init)
            _refuse_hooked(dict(named_leaves(self.init)))
        self._check_constraints()
        self._check_functions()
        if self.start is not None:
            require_start(self.start)
            if self.optimizer_hyper:
                raise ValueError("Player: a hyperparameter of the inner optimiser is no follower; it has no start=.")
        if self.residual is None:
            return
        if not (callable(self.residual) or isinstance(self.residual, UserResidual)):
            raise TypeError(
                f"Player: residual is {kind(self.residual)}; expected a function F(y, others) that vanishes where the "
                "player rests."
            )
        refuse_unnamed("the residual", self.own_residual.function)
        if self.optimizer_hyper:
            raise ValueError("Player: a hyperparameter of the inner optimiser is no follower; it has no residual.")

    def _check_constraints(self) -> None:
        if not (self.domain is None or isinstance(self.domain, ConstraintSet)):
            raise TypeError(
                f"Player: domain is {kind(self.domain)}; expected a set such as bilevel.Box(0.0, 1.0), "
                "bilevel.Simplex() or bilevel.constraints.Ball(1.0)."
            )
        if not (self.prox is None or isinstance(self.prox, Penalty)):
            raise TypeError(f"Player: prox is {kind(self.prox)}; expected a term such as bilevel.constraints.L1(0.1).")
        if self.residual is not None and (self.domain is not None or self.prox is not None):
            raise ValueError(
                "Player: both residual= and domain= or prox= are given; a residual of your own says itself where the "
                "player rests. Put the projection into it, or leave it out."
            )
        if self.prox is not None and self.optimizer_hyper:
            raise ValueError("Player: a hyperparameter of the inner optimiser leads; prox= is for followers.")
        if self.domain is not None and any(self.coordinates):
            raise ValueError(
                f"Player: init has the range {next(filter(None, self.coordinates))!r}, and domain={self.domain!r} is "
                "given besides. Say where the player stays once: a tensor as init, or no domain."
            )
        if self.prox is not None and self.domain is not None and not (self.prox.entrywise and self.domain.entrywise):
            raise ValueError(
                f"Player: prox={self.prox!r} and domain={self.domain!r}: the two together have a proximal map where "
                "both act on each entry by itself, as L1 and Box do. Put the one into the objective, or give a "
                "residual= of your own."
            )
        if isinstance(self.init, nn.Module) and self.domain is not None and not self.domain.entrywise:
            raise ValueError(
                f"Player: init is a module and domain={self.domain!r}, which would take all of its parameters for one "
                "point. Give bounds, bilevel.Box(low, high), or a pytree of tensors as init."
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters that the objective must be called with."""
        return required(self.objective)

    @cached_property
    def start_names(self) -> tuple[str, ...]:
        """The parameters that `start` must be called with; none where there is no `start`."""
        return () if self.start is None else required(self.start)

    @property
    def constraints(self) -> dict[str, Callable[..., Variables]]:
        """The functions that constrain it, by what they are called."""
        return named_functions(INEQUALITY, self.inequality) | named_functions(EQUALITY, self.equality)

    @cached_property
    def _parameters(self) -> dict[int, tuple[weakref.ref[Any], tuple[str, ...]]]:
        return {}

    def parameters(self, function: Callable[..., Any]) -> tuple[str, ...]:
        """The parameters that one of its functions must be called with."""
        # By which function it is, which no copy and no other process shares; not held, for somebody may make new ones
        # in each call. Another one can come where it was, with its id.
        kept = self._parameters.get(id(function))
        if kept is not None and kept[0]() is function:
            return kept[1]
        found = required(function)
        with suppress(TypeError):  # what takes no weak reference is asked again
            self._parameters[id(function)] = (
                weakref.ref(function, partial(_forget, self._parameters, id(function))),
                found,
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_parameters"}

    @property
    def follows_loss(self) -> bool:
        """Whether it rests where its loss's own gradient vanishes: no residual of the user's, and no constraints."""
        return self.residual is None and not self.constraints

    @cached_property
    def own_residual(self) -> UserResidual:
        """The user's residual as an object; raises `ValueError` where there is none."""
        if self.residual is None:
            raise ValueError("Player: it has no residual of its own.")
        return self.residual if isinstance(self.residual, UserResidual) else UserResidual(self.residual)

    @cached_property
    def rests(self) -> Residual:
        """What vanishes where it rests."""
        domain = self._range if self.domain is None else self.domain
        if self.constraints:
            return KKT(self.inequality, self.equality, domain)
        if self.residual is not None:
            return self.own_residual
        if domain is None and self.prox is None:
            return OwnGradient()
        return ConstrainedGradient(domain, self.prox)

    @cached_property
    def coordinates(self) -> list[Coordinate | None]:
        """The range of each leaf of its variables that has one."""
        return [] if isinstance(self.init, nn.Module) else _ranges(self.init)

    @property
    def _range(self) -> ConstraintSet | None:
        """The box of its ranges."""
        if not any(self.coordinates):
            return None
        infinite = (-math.inf, math.inf)
        low, high = (
            map_leaves(lambda leaf, end=end: (leaf.range if isinstance(leaf, Coordinate) else infinite)[end], self.init)
            for end in (0, 1)
        )
        return Box(low, high)

    @property
    def option_players(self) -> tuple[str, ...]:
        """The players that the options of its domain and its prox are functions of."""
        parts = [part for part in (self.domain, self.prox) if part is not None]
        return tuple(dict.fromkeys(name for part in parts for name in part.players))

    def _check_functions(self) -> None:
        for what in (INEQUALITY, EQUALITY):
            given = self.inequality if what == INEQUALITY else self.equality
            if given is None:
                continue
            wanted = f"a function whose every entry is to be {'<= 0' if what == INEQUALITY else '= 0'}"
            parts = list(given.values()) if isinstance(given, dict) else given
            parts = parts if isinstance(parts, list | tuple) else [parts]
            if not parts:
                raise TypeError(f"Player: {what} is an empty {type(given).__name__}; expected {wanted}, or several.")
            for function in parts:
                if not callable(function):
                    raise TypeError(
                        f"Player: {what} {'is' if function is given else 'holds'} {kind(function)}; expected {wanted}, "
                        "or a dict or a list of such functions."
                    )
            for name, function in named_functions(what, given).items():
                refuse_unnamed(f"the {name}", function)
        if self.constraints and self.residual is not None:
            raise ValueError(
                "Player: it has a residual of its own, and constraints as well; a residual says all of where the "
                "player rests. Give the loss with inequality= and equality=, or put the constraints into the residual."
            )
        if self.constraints and self.prox is not None:
            raise ValueError(
                f"Player: prox={self.prox!r} beside {' and '.join(self.constraints)}: these need a smooth loss. "
                "Split |y| into two non-negative parts, y = p - q, and put p + q into the objective."
            )
        if self.constraints and self.domain is not None and not has_walls(self.domain):
            raise ValueError(
                f"Player: domain={self.domain!r} beside {' and '.join(self.constraints)}: it is no set of smooth "
                "functions. Bounds, Simplex, Halfspace, Affine, Ball(p=2) and products of them are; or say it as one "
                "of the functions."
            )
        if self.constraints and self.optimizer_hyper:
            raise ValueError("Player: a hyperparameter of the inner optimiser is no follower; it has no constraints.")

    def variables(self, like: Tensor | None = None) -> Variables:
        """A fresh copy of the initial variables; ranges that start at a plain number take the dtype of `like`."""
        if isinstance(self.init, nn.Module):
            return {name: p.detach().clone() for name, p in self.init.named_parameters() if p.requires_grad}
        return map_leaves(lambda leaf: leaf.tensor(like) if isinstance(leaf, Coordinate) else leaf, detached(self.init))

    def buffers(self) -> dict[str, Tensor]:
        """A fresh copy of the module's buffers; empty when `init` is no module."""
        if isinstance(self.init, nn.Module):
            return {name: b.detach().clone() for name, b in self.init.named_buffers()}
        return {}


def _ranges(init: Variables) -> list[Coordinate | None]:
    return [leaf if isinstance(leaf, Coordinate) else None for leaf in leaves(init)]


def _refuse_choices(init: Variables) -> None:
    for leaf in leaves(init):
        if isinstance(leaf, Choice):
            raise TypeError(
                f"Player: init has {leaf!r}; a choice has no derivative, and no optimiser steps from one option to the "
                "next. Try its options around the game, by bilevel.search.minimise or Optuna, and give the player a "
                "tensor or a range, such as bilevel.Log(1e-6, 1e-1)."
            )


def _refuse_uninitialised(module: nn.Module) -> None:
    for path, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"Player: the module's {path!r} has no shape yet; a lazy module gets it from its first batch. Call the "
                "module once, model(inputs), before it becomes a player."
            )


def _refuse_hooked(variables: Mapping[str, Any]) -> None:
    """Refuse variables with hooks on their gradients, which the player's copies have not."""
    for path, leaf in variables.items():
        if isinstance(leaf, Tensor) and leaf.is_leaf and (leaf._backward_hooks or leaf._post_accumulate_grad_hooks):
            raise TypeError(
                f"Player: init{path if path.startswith('[') else f' {path!r}' if path else ''} has a hook on its "
                "gradient, which does not go along with the player's variables: what it does would be left out. Put it "
                "into the loss, as weights * mask, and remove the hook: handle.remove()."
            )


def refuse_unnamed(what: str, function: Callable[..., Any]) -> None:
    """Raise `TypeError` for a parameter that cannot be named in a call."""
    for parameter in signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"Player: parameter {str(parameter)!r} of {what} cannot be named in a call. Name each parameter after "
                "a player (and `batch`), as in `def loss(decay, weights, batch)`."
            )


def require_start(start: object) -> None:
    """Raise `TypeError` for a start that is no function whose parameters can be named."""
    if not callable(start):
        raise TypeError(
            f"Player: start is {kind(start)}; expected a function of the players who move before this one, such as "
            "start=lambda meta: meta. A fixed start is init=."
        )
    refuse_unnamed("the start", start)


def check_data(told: str, data: object) -> None:
    """Raise `TypeError`, which begins with `told`, for what gives no batches again and again."""
    came = f"{told} is {kind(data)}"
    if isinstance(data, Iterator):
        raise TypeError(
            f"{came}, which can be iterated only once and would be exhausted after one pass. Pass something "
            "re-iterable, a list of batches or a DataLoader, or a function that makes it: data=lambda: make()."
        )
    if isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str):
        return
    if isinstance(data, Iterable | nn.Module) or not callable(data):
        raise TypeError(
            f"{came}; expected an iterable of batches, such as a DataLoader or a list, or a function that makes one. "
            "A single batch is `data=[batch]`."
        )
    try:
        inspect.signature(data).bind()
    except ValueError:  # a few built-in functions have no signature
        return
    except TypeError as error:
        raise TypeError(
            f"{came}, {error}; a function that makes the batches of a pass is called without arguments: "
            "data=lambda: make(...)."
        ) from None


def kind(value: object) -> str:
    """What a value is, in words for an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if value is None else f"a {type(value).__name__}"


def _forget(known: dict[int, tuple[weakref.ref[Any], Any]], key: int, gone: weakref.ref[Any]) -> None:
    """Let go of what was known of a function that is gone, unless another has come in its place."""
    if key in known and known[key][0] is gone:
        del known[key]
