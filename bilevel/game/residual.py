"""What vanishes where a follower rests: F(y, others, batch) = 0."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, final

import torch
from torch import Tensor

from bilevel.autodiff import gradient
from bilevel.game.data import Batch, Position
from bilevel.tree import Structure, Variables, join, leaves, structure_of

Buffers = dict[str, dict[str, Tensor]]
"""Non-differentiated state of the players' modules: player -> buffer's name -> tensor."""

Found = tuple[Tensor, list[Tensor], Buffers]
"""The loss (0-d, or `[count]`), F in the leaves of y, and the buffers after it."""


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

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of a player's leaves taken together."""

    def refuse_mixing(self, asker: str, player: str, optimizer: Callable[..., Any]) -> None:
        """Raise `TypeError` for an optimiser of a player's that would mix what must stay apart."""

    def require_one(self, asker: str) -> None:
        """Raise `TypeError` when this stands for many games."""

    def start(self, player: str, seed: int = 0) -> Position | None:
        """The position of a player's first batch."""

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's batch at a position, and the next position."""

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

    def structure(self, player: str) -> Structure:
        """How a player's variables are laid out."""

    def members(self, player: str) -> tuple[str, ...]:
        """Those who make up a joint player; of any other player itself alone."""

    def residual(self, player: str) -> Residual:
        """What vanishes where a player rests."""

    def total(self, loss: Tensor) -> Tensor:
        """What is differentiated in place of a loss."""

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss, and the buffers after it."""

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


class Residual(ABC):
    """F, whose zero is where a player rests. The follower owns it: no response asks what kind it is."""

    @property
    @abstractmethod
    def symmetric(self) -> bool:
        """Whether dF/dy is symmetric, as the Hessian of a loss is: what conjugate gradients need."""

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

        value, (slope,) = gradient(loss, y)
        return value, slope


@final
@dataclass(frozen=True)
class MembersGradients(Residual):
    """The stacked residuals of several players who answer together: as a rule each one's gradient of its own loss.

    Args:
        differentiates_loss: whether all of them are gradients of the members' losses.
    """

    differentiates_loss: bool = True
    symmetric = False
    minimises = False

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
        form, current = game.structure(player), buffers
        places, together = form.build(range(len(form.shapes))), form.build(list(y))  # type: ignore[arg-type]
        losses: list[Tensor] = []
        slopes: list[Tensor] = list(y)
        for member in game.members(player):
            mine = leaves(places[member])
            part = None if batch is None else batch[member]
            # Its own variables are looked up by its own name, those of the others in `together`.
            rest = {**others, player: together}
            value, found, current = game.residual(member)(game, member, [y[i] for i in mine], rest, part, current)
            losses.append(value)
            for index, slope in zip(mine, found, strict=True):
                slopes[index] = slope
        return sum(losses[1:], losses[0]), slopes, current


def required(function: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters that a function must be called with."""
    parameters = inspect.signature(function).parameters
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
        came = structure_of(found)
        if came.spec != form.spec or came.shapes != form.shapes:
            raise ValueError(
                f"Player {player!r}: its residual returned {_shapes(found)}; expected the form of its init, "
                f"{[tuple(shape) for shape in form.shapes]}."
            )
        return loss, leaves(found), after


def _shapes(tree: Variables) -> list[object]:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves(tree)]
