"""What vanishes where a follower rests: F(y, others, batch) = 0."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from bilevel._returned import described
from bilevel.autodiff import gradient
from bilevel.constraints.coordinates import Coordinate
from bilevel.constraints.functions import Constrained
from bilevel.game.data import Batch, Position
from bilevel.second_order import FastKernels
from bilevel.tree import Structure, Variables, join, leaves, map_leaves, structure_of

Buffers = dict[str, dict[str, Tensor]]
"""Non-differentiated state of the players' modules: player -> buffer's name -> tensor."""

Found = tuple[Tensor, list[Tensor], Buffers]
"""The loss (0-d, or `[count]`), F in the leaves of y, and the buffers after it."""

Kinks = list[tuple[str, str, list[int], bool]]
"""(a leaf's path, which wall, the place in it, whether F takes it to hold) where F has a kink at y.

A place begins with the game, of many.
"""


@dataclass(frozen=True, eq=False)
class Rest:
    """Where a follower came to rest.

    Args:
        unknowns: All that F is a function of, `[n]`: the variables, and multipliers where there are constraints.
        kink: What makes the answer no smooth function of the others, in words; empty where it is one.
        other_side: The unknowns again `[n]`, as F's derivative at the other side of the kink sees them.
        games: Those of many games that have a kink; None for one game.
    """

    unknowns: Tensor
    kink: str = ""
    other_side: Tensor | None = None
    games: list[int] | None = None


class PlayedGame(Protocol):
    """What residuals and checks need of the game that a player is in."""

    @property
    def names(self) -> tuple[str, ...]:
        """The players' names, in order of play."""

    @property
    def players(self) -> Mapping[str, Any]:
        """The players by name, in order of play; those of a joint one by their own names."""

    @property
    def anticipated(self) -> frozenset[str]:
        """The players whose variables are functions of those who move before them."""

    @property
    def device(self) -> torch.device:
        """Where everybody's variables live."""

    def arguments(self, player: str) -> tuple[str, ...]:
        """The players that a player's objective names."""

    def check(self, player: str, variables: Variables) -> None:
        """Refuse variables whose nest or shapes are not those of the player's `init`."""

    @property
    def count(self) -> int:
        """How many games this stands for."""

    def each(self, function: Callable[..., Any], *trees: Any) -> Any:
        """`function(*trees)`, of many games in each by itself."""

    def value(self, name: str, variables: Mapping[str, Variables]) -> Variables:
        """A player's variables among those given, or what it answers to them."""

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all processes that play this game together."""

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of a player's leaves taken together."""

    def saving(self) -> AbstractContextManager[object]:
        """Where autograd saves what several derivatives need."""

    def refuse_mixing(self, asker: str, player: str, optimizer: Callable[..., Any]) -> None:
        """Raise `TypeError` for an optimiser of a player's that would mix what must stay apart."""

    def require_one(self, asker: str) -> None:
        """Raise `TypeError` when this stands for many games."""

    def require_ranks(self, asker: str) -> None:
        """Raise `ValueError` where this process is one of several ranks, who would drift apart in silence."""

    def start(self, player: str, seed: int = 0) -> Position | None:
        """The position of a player's first batch."""

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's batch at a position, and the next position."""

    def whole_pass(self, player: str, position: Position | None) -> Iterator[Batch]:
        """All the batches of the pass that a position is in, from its first; None once where there is no data."""

    def initial(self, player: str) -> Variables:
        """A fresh copy of a player's initial variables."""

    def buffers(self) -> Buffers:
        """A fresh copy of the initial buffers of every player's module."""

    def loss(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> Tensor:
        """A player's loss at everybody's variables."""

    def starting_point(
        self, player: str, others: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> Variables | None:
        """Where a player with `start=` begins to follow, differentiable in the others; None of all other players."""

    def coordinates(self, player: str) -> Sequence[Coordinate | None]:
        """The range of each leaf of a player's variables that has one; [] where none has."""

    def structure(self, player: str) -> Structure:
        """How a player's variables are laid out."""

    def members(self, player: str) -> tuple[str, ...]:
        """Those who make up a joint player; of any other player itself alone."""

    def residual(self, player: str) -> Residual:
        """What vanishes where a player rests."""

    def kernels(self, player: str) -> FastKernels:
        """What a player's loss uses that has one derivative only, where there is a form with two."""

    @property
    def record_keys(self) -> tuple[str, ...]:
        """What follows a number's name in a run's records: nothing, of one game."""

    def total(self, loss: Tensor) -> Tensor:
        """What is differentiated in place of a loss."""

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss, and the buffers after it."""

    def moments(
        self, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
    ) -> dict[str, Tensor]:
        """What running statistics go to on this batch, by the buffers' names; differentiable in all variables."""

    def call(
        self,
        player: str,
        function: Callable[..., Any],
        variables: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers | None,
        extra: Mapping[str, Variables],
    ) -> tuple[Variables, Buffers]:
        """A function of the players' variables that returns a pytree, called as a player's objective is."""


class Present(Protocol):
    """What a residual may ask of its follower during a call."""

    @property
    def game(self) -> PlayedGame:
        """The game that it plays."""

    @property
    def name(self) -> str:
        """Its own."""

    @property
    def form(self) -> Structure:
        """The layout of its variables."""

    @property
    def multipliers(self) -> Mapping[str, Variables]:
        """Those of its state."""

    @property
    def others(self) -> Mapping[str, Variables]:
        """The other players' variables, detached."""

    @property
    def batch(self) -> Batch:
        """The present one."""

    @property
    def buffers(self) -> Buffers:
        """Its module's."""

    def count(self, gradients: int) -> None:
        """So many more gradients were taken."""


class Residual(ABC):
    """F, whose zero is where a player rests. The follower owns it: no response asks what kind it is."""

    @property
    @abstractmethod
    def symmetric(self) -> bool:
        """Whether dF/dy is symmetric, as the Hessian of a loss is: what conjugate gradients need."""

    @property
    def definite(self) -> bool:
        """Whether dF/dy is positive definite at a strict minimum too, as conjugate gradients ask."""
        return self.symmetric

    @property
    @abstractmethod
    def minimises(self) -> bool:
        """Whether it rests at a minimum of its loss, so that a solver may go by the loss."""

    @property
    @abstractmethod
    def differentiates_loss(self) -> bool:
        """Whether F is the first derivative of what the game's loss returns."""

    @abstractmethod
    def __call__(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> Found:
        """The loss, F in each leaf of y, and the buffers after it; differentiable in y and others if grad is on."""

    def flat(
        self,
        game: PlayedGame,
        player: str,
        y: Tensor,
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> tuple[Tensor, Tensor]:
        """The loss and F `[n]` at a flat `y: [n]`, for linear solvers."""
        loss, slopes, _ = self(game, player, game.structure(player).split(y), others, batch, buffers)
        return loss, join(slopes)

    # What has more unknowns than the player's variables overrides these ------------------------------------------

    def first(self, follower: Present) -> dict[str, Any]:
        """What a response's state holds of F's unknowns besides the variables, before the first call."""
        return {}

    def brought_to_rest(self, follower: Present, y: Sequence[Tensor]) -> Rest:
        """All unknowns of F where an inner solver ended at the leaves y."""
        # Never the inner solver's own memory.
        return Rest(join(y) if len(y) > 1 else y[0].detach().clone().reshape(-1))

    def programme(self, follower: Present) -> Constrained | None:
        """The follower's constrained programme, for the solvers that take one; None without constraints."""
        return None

    # What a follower with a domain of its own answers otherwise -------------------------------------------------------

    @property
    def field(self) -> Residual:
        """What an optimiser's steps go along; F itself, unless steps are projected afterwards."""
        return self

    @property
    def projects(self) -> bool:
        """Whether steps are followed by a projection."""
        return False

    @property
    def told(self) -> str:
        """What it is projected onto, in words."""
        return ""

    @property
    def entrywise(self) -> bool:
        """Whether each entry is projected by itself, so that an optimiser may scale entries differently."""
        return True

    @property
    def any_step(self) -> bool:
        """Whether the projection is the same for every length of a step."""
        return True

    @property
    def needs_scale(self) -> bool:
        """Whether F depends on a step s that `Follower` measures at the start."""
        return False

    @property
    def step(self) -> float | Tensor:
        """That s."""
        return 1.0

    @property
    def given_by_solver(self) -> bool:
        """Whether its bounds are those that the inner solver keeps, and not the player's own."""
        return False

    def scaled(self, scale: float | Tensor) -> Residual:
        """The same with another s."""
        return self

    def at_rest(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        slopes: Sequence[Tensor],
        others: Mapping[str, Variables],
    ) -> list[Tensor]:
        """F in each leaf, from `field` at y."""
        return list(slopes)

    def settled(
        self,
        game: PlayedGame,
        player: str,
        z: Sequence[Tensor],
        others: Mapping[str, Variables],
        step: float | Tensor,
    ) -> list[Tensor]:
        """Where a step of this length that led to z ends: z projected, where there is something to project onto."""
        return list(z)

    def bounds(
        self, game: PlayedGame, player: str, others: Mapping[str, Variables]
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """The lower and upper bounds of each entry, where the player minimises its loss within bounds alone."""
        return None

    def outside(self, game: PlayedGame, player: str, y: Sequence[Tensor], others: Mapping[str, Variables]) -> float:
        """How far y is from the player's domain; 0 without one."""
        return 0.0

    def term(
        self, game: PlayedGame, player: str, y: Sequence[Tensor], others: Mapping[str, Variables]
    ) -> Tensor | float:
        """What its loss has besides its objective; 0 where there is nothing."""
        return 0.0

    def require_valid(self, game: PlayedGame, player: str, others: Mapping[str, Variables]) -> None:  # noqa: B027
        """Raise `ValueError` where the other players have left nothing to choose from."""

    def kinks(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> Kinks:
        """Where F has no derivative at y, as far as is known."""
        return []


@final
@dataclass(frozen=True)
class OwnGradient(Residual):
    """The gradient of the player's own loss: where it vanishes, nothing is gained by a small move."""

    symmetric = True
    minimises = True
    differentiates_loss = True

    def __call__(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> Found:
        """grad_y f."""
        form, after = game.structure(player), {}

        def loss(*own: Tensor) -> Tensor:
            value, advanced = game.evaluate(player, {**others, player: form.build(own)}, batch, buffers)
            after.update(advanced)
            return game.total(value)

        with game.saving():
            value, found = gradient(loss, *y)
        return value, list(found), {name: after[name] for name in buffers if name in after}

    def flat(
        self,
        game: PlayedGame,
        player: str,
        y: Tensor,
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> tuple[Tensor, Tensor]:
        """By one derivative in y itself, and not one in each leaf."""
        form = game.structure(player)

        def loss(y: Tensor) -> Tensor:
            variables = {**others, player: form.unflatten(y)}
            return game.total(game.evaluate(player, variables, batch, buffers)[0])

        with game.saving():
            value, (slope,) = gradient(loss, y)
        return value, slope


@final
@dataclass(frozen=True)
class MembersGradients(Residual):
    """The stacked residuals of several players who answer together: as a rule each one's gradient of its own loss.

    Args:
        members: the members' own residuals, by name.
    """

    members: Mapping[str, Residual]
    symmetric = False
    minimises = False

    @property
    def differentiates_loss(self) -> bool:
        """Whether all of them are gradients of the members' losses."""
        return all(own.differentiates_loss for own in self.members.values())

    def __call__(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> Found:
        """(grad_b f_b, grad_c f_c, ...), in the order of the leaves."""
        current, losses = buffers, []
        slopes: list[Tensor] = list(y)
        for member, own, mine, rest in self._each(game, player, y, others):
            part = None if batch is None else batch[member]
            value, found, current = own(game, member, [y[i] for i in mine], rest, part, current)
            losses.append(value)
            for index, slope in zip(mine, found, strict=True):
                slopes[index] = slope
        return sum(losses[1:], losses[0]), slopes, current

    def _each(
        self, game: PlayedGame, player: str, y: Sequence[Tensor], others: Mapping[str, Variables]
    ) -> Iterator[tuple[str, Residual, list[int], Mapping[str, Variables]]]:
        """Each member with its residual, the places of its leaves, and the others' variables."""
        form = game.structure(player)
        places, together = form.build(range(len(form.shapes))), form.build(list(y))  # type: ignore[arg-type]
        # A member's own variables are looked up by its own name, those of the others in `together`.
        rest = {**others, player: together}
        for member, own in self.members.items():
            yield member, own, leaves(places[member]), rest

    @property
    def field(self) -> Residual:
        """What the members' steps go along."""
        return MembersGradients({name: own.field for name, own in self.members.items()}) if self.projects else self

    @property
    def projects(self) -> bool:
        """Whether any member's steps are projected."""
        return any(own.projects for own in self.members.values())

    @property
    def told(self) -> str:
        """What the members are projected onto."""
        return ", ".join(f"{own.told} of {name!r}" for name, own in self.members.items() if own.projects)

    @property
    def entrywise(self) -> bool:
        """Where all members are."""
        return all(own.entrywise for own in self.members.values())

    @property
    def any_step(self) -> bool:
        """Where it is so for all members."""
        return all(own.any_step for own in self.members.values())

    @property
    def needs_scale(self) -> bool:
        """Where a member does."""
        return any(own.needs_scale for own in self.members.values())

    def scaled(self, scale: float | Tensor) -> Residual:
        """All members with this s."""
        return MembersGradients({name: own.scaled(scale) for name, own in self.members.items()})

    def at_rest(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        slopes: Sequence[Tensor],
        others: Mapping[str, Variables],
    ) -> list[Tensor]:
        """Each member's."""
        found = list(slopes)
        for member, own, mine, rest in self._each(game, player, y, others):
            parts = own.at_rest(game, member, [y[i] for i in mine], [slopes[i] for i in mine], rest)
            for index, part in zip(mine, parts, strict=True):
                found[index] = part
        return found

    def settled(
        self,
        game: PlayedGame,
        player: str,
        z: Sequence[Tensor],
        others: Mapping[str, Variables],
        step: float | Tensor,
    ) -> list[Tensor]:
        """Each member's."""
        found = list(z)
        for member, own, mine, rest in self._each(game, player, z, others):
            for index, part in zip(mine, own.settled(game, member, [z[i] for i in mine], rest, step), strict=True):
                found[index] = part
        return found

    def require_valid(self, game: PlayedGame, player: str, others: Mapping[str, Variables]) -> None:
        """Each member's."""
        for member, own in self.members.items():
            own.require_valid(game, member, others)

    def kinks(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> Kinks:
        """The members'."""
        found: Kinks = []
        for member, own, mine, rest in self._each(game, player, y, others):
            part = None if batch is None else batch[member]
            here = own.kinks(game, member, [y[i] for i in mine], rest, part, buffers)
            found += [(f"[{member!r}]{path}", wall, place, held) for path, wall, place, held in here]
        return found


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function; of a module that of its `forward`."""
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def required(function: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters that a function must be called with."""
    parameters = signature(function).parameters
    return tuple(name for name, p in parameters.items() if p.default is inspect.Parameter.empty)


GRADIENT = "gradient"
"""The parameter of a user's residual that receives the objective's own gradient."""


@final
@dataclass(frozen=True)
class UserResidual(Residual):
    r"""A residual of the user's own: a projection, a proximal step, a fixed point, an equation of equilibrium.

    Args:
        function: F. Its parameters are named after players, as an objective's; `batch` receives the batch, `gradient`
            the objective's own gradient in the player's variables, a pytree like them. It returns a pytree in the form
            of the player's `init`, differentiable in every player's variables that it depends on.
        symmetric: promises that dF/dy is symmetric, and so admits `ConjugateGradient`. A projected gradient's is not,
            in general: the default False asks for `GMRES()` or `Dense()`.

    `Implicit` differentiates its zero, \(dy/dx = -(\partial F/\partial y)^{-1} \partial F/\partial x\), and `Unrolled`
    steps along it: SGD with a learning rate of 1 takes y to \(y - F(y)\), which for
    \(F = y - P(y - s\,\nabla_y f)\) is the projected gradient method. Inner solvers that minimise a loss, LBFGS or
    `Scipy`, refuse it; `ScipyRoot()` looks for its zero.

    Examples:
        >>> UserResidual(lambda y, gradient: y - (y - 0.1 * gradient).clamp(min=0.0)).symmetric
        False
    """

    function: Callable[..., Variables]
    symmetric: bool = False
    minimises = False
    differentiates_loss = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters that the function must be called with."""
        return required(self.function)

    @property
    def players(self) -> list[str]:
        """Those of them that name players."""
        return [name for name in self.names if name not in (GRADIENT, "batch")]

    def __call__(
        self,
        game: PlayedGame,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers,
    ) -> Found:
        """F, and the objective's loss, which it does not go by."""
        form = game.structure(player)
        variables = {**others, player: form.build(list(y))}
        extra: dict[str, Variables] = {}
        if GRADIENT in self.names:
            loss, slopes, after = OwnGradient()(game, player, y, others, batch, buffers)
            extra[GRADIENT] = form.build(slopes)
            found, _ = game.call(player, self.function, variables, batch, buffers, extra)
        else:
            with torch.no_grad():
                loss = game.total(game.evaluate(player, variables, batch, buffers)[0])
            found, after = game.call(player, self.function, variables, batch, buffers, extra)
            after = {name: after[name] for name in buffers if name in after}
        self._require_form(player, found, form)
        return loss, _apart(leaves(found), y), after

    def _require_form(self, player: str, found: Variables, form: Structure) -> None:
        values, told = leaves(found), f"Player {player!r}: its residual returned"
        strange = [value for value in values if not isinstance(value, Tensor)]
        if strange or not values:
            inside = f" with {described(strange[0])} in it" if strange and strange[0] is not found else ""
            raise TypeError(
                f"{told} {described(found)}{inside}; expected tensors in the form of its init, made of its arguments "
                "by differentiable operations: no .item(), .numpy() or .tolist()."
            )
        came = structure_of(found)
        if came.spec != form.spec or came.shapes != form.shapes:
            wanted = form.build([torch.empty(shape, device="meta") for shape in form.shapes])
            raise ValueError(f"{told} {_shapes(found)}; expected the form of its init, {_shapes(wanted)}.")


def _apart(values: list[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """The values, copied where they are y itself: an optimiser steps y in place, and its gradient must stand still."""
    return [value.clone() if any(_same(value, own) for own in y) else value for value in values]


def _same(value: Tensor, own: Tensor) -> bool:
    if value is own:
        return True
    base = value._base if value._is_view() else value
    return base is own or (own._is_view() and base is own._base)


def _shapes(tree: Variables) -> str:
    """The nest of the shapes, as a user would write it."""
    return str(map_leaves(lambda leaf: tuple(leaf.shape), tree))
