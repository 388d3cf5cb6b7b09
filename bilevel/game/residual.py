"""What vanishes where a follower rests: F(y, others, batch) = 0."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from bilevel._returned import described
from bilevel.autodiff import gradient
from bilevel.constraints.functions import Constrained
from bilevel.game.situation import Buffers, GameOfLosses, Present, Situation
from bilevel.tree import Structure, Variables, join, leaves, map_leaves, structure_of

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


class PlayedGame(GameOfLosses, Protocol):
    """What followers and checks need of the game that a player is in."""

    def residual(self, player: str) -> Residual:
        """What vanishes where a player rests."""


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

    @property
    def curves_loss(self) -> bool:
        """Whether a derivative of F takes a second one of the loss, and of what constrains the player."""
        return True

    @abstractmethod
    def __call__(self, at: Situation, y: Sequence[Tensor]) -> Found:
        """The loss, F in each leaf of y, and the buffers after it; differentiable in y and others if grad is on."""

    def flat(self, at: Situation, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and F `[n]` at a flat `y: [n]`, for linear solvers."""
        loss, slopes, _ = self(at, at.form.split(y))
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

    def at_rest(self, at: Situation, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """F in each leaf, from `field` at y."""
        return list(slopes)

    def settled(self, at: Situation, z: Sequence[Tensor], step: float | Tensor) -> list[Tensor]:
        """Where a step of this length that led to z ends: z projected, where there is something to project onto."""
        return list(z)

    def bounds(self, at: Situation) -> tuple[list[Tensor], list[Tensor]] | None:
        """The lower and upper bounds of each entry, where the player minimises its loss within bounds alone."""
        return None

    def outside(self, at: Situation, y: Sequence[Tensor]) -> float:
        """How far y is from the player's domain; 0 without one."""
        return 0.0

    def term(self, at: Situation, y: Sequence[Tensor]) -> Tensor | float:
        """What its loss has besides its objective; 0 where there is nothing."""
        return 0.0

    def require_valid(self, at: Situation) -> None:  # noqa: B027
        """Raise `ValueError` where the other players have left nothing to choose from."""

    def kinks(self, at: Situation, y: Sequence[Tensor]) -> Kinks:
        """Where F has no derivative at y, as far as is known."""
        return []


@final
@dataclass(frozen=True)
class OwnGradient(Residual):
    """The gradient of the player's own loss: where it vanishes, nothing is gained by a small move."""

    symmetric = True
    minimises = True
    differentiates_loss = True

    def __call__(self, at: Situation, y: Sequence[Tensor]) -> Found:
        """grad_y f."""
        after: Buffers = {}

        def loss(*own: Tensor) -> Tensor:
            value, advanced = at.loss(at.at(own))
            after.update(advanced)
            return value

        with at.game.saving():
            value, found = gradient(loss, *y)
        return value, list(found), {name: after.get(name, held) for name, held in at.buffers.items()}

    def flat(self, at: Situation, y: Tensor) -> tuple[Tensor, Tensor]:
        """By one derivative in y itself, and not one in each leaf."""
        with at.game.saving():
            value, (slope,) = gradient(lambda y: at.loss(at.at_flat(y))[0], y)
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

    def __call__(self, at: Situation, y: Sequence[Tensor]) -> Found:
        """(grad_b f_b, grad_c f_c, ...), in the order of the leaves."""
        current, losses = at.buffers, []
        slopes: list[Tensor] = list(y)
        for here, own, mine in self._each(at, y):
            value, found, current = own(replace(here, buffers=current), [y[i] for i in mine])
            losses.append(value)
            for index, slope in zip(mine, found, strict=True):
                slopes[index] = slope
        return sum(losses[1:], losses[0]), slopes, current

    def _each(self, at: Situation, y: Sequence[Tensor]) -> Iterator[tuple[Situation, Residual, list[int]]]:
        """Each member's situation, its residual, and the places of its leaves."""
        places = at.form.build(range(len(at.form.shapes)))  # type: ignore[arg-type]
        # A member's own variables are looked up by its own name, those of the others in the joint player's.
        everybody = at.at(y)
        for member, own in self.members.items():
            yield at.of(member, everybody), own, leaves(places[member])

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

    def at_rest(self, at: Situation, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """Each member's."""
        found = list(slopes)
        for here, own, mine in self._each(at, y):
            parts = own.at_rest(here, [y[i] for i in mine], [slopes[i] for i in mine])
            for index, part in zip(mine, parts, strict=True):
                found[index] = part
        return found

    def settled(self, at: Situation, z: Sequence[Tensor], step: float | Tensor) -> list[Tensor]:
        """Each member's."""
        found = list(z)
        for here, own, mine in self._each(at, z):
            for index, part in zip(mine, own.settled(here, [z[i] for i in mine], step), strict=True):
                found[index] = part
        return found

    def require_valid(self, at: Situation) -> None:
        """Each member's."""
        for member, own in self.members.items():
            own.require_valid(at.of(member, at.others))

    def kinks(self, at: Situation, y: Sequence[Tensor]) -> Kinks:
        """The members'."""
        found: Kinks = []
        for here, own, mine in self._each(at, y):
            kinks = own.kinks(here, [y[i] for i in mine])
            found += [(f"[{here.player!r}]{path}", wall, place, held) for path, wall, place, held in kinks]
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
    def curves_loss(self) -> bool:
        """Where the function takes the objective's gradient."""
        return GRADIENT in self.names

    @property
    def players(self) -> list[str]:
        """Those of them that name players."""
        return [name for name in self.names if name not in (GRADIENT, "batch")]

    def __call__(self, at: Situation, y: Sequence[Tensor]) -> Found:
        """F, and the objective's loss, which it does not go by."""
        variables = at.at(y)
        if GRADIENT in self.names:
            loss, slopes, after = OwnGradient()(at, y)
            found, _ = at.call(self.function, variables, {GRADIENT: at.form.build(slopes)})
        else:
            with torch.no_grad():
                loss, _ = at.loss(variables)
            found, after = at.call(self.function, variables)
            after = {name: after.get(name, held) for name, held in at.buffers.items()}
        self._require_form(at.player, found, at.form)
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
    own = {id(leaf) for leaf in y} | {id(leaf._base) for leaf in y if leaf._is_view()}
    return [value.clone() if id(value) in own or id(value._base) in own else value for value in values]


def _shapes(tree: Variables) -> str:
    """The nest of the shapes, as a user would write it."""
    return str(map_leaves(lambda leaf: tuple(leaf.shape), tree))
