"""What keeps a player where it may be: maps to the nearest point, their options, and where they have kinks."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import Parameter, signature
from typing import Any, TypeVar

import torch
from torch import Tensor

from bilevel.tree import Variables, join, leaves, map_leaves, named_leaves

Number = float | Tensor | Callable[..., Tensor]
"""A number, a tensor, or a function of the players that its parameters are named after."""

Margins = dict[tuple[str, str], Tensor]
"""(path of a leaf, which wall) -> how far a point is from that wall, signed: positive on the free side."""

Limits = tuple[list[Tensor], list[Tensor]]
"""The lower and the upper bound of every entry, leaf by leaf."""

Self = TypeVar("Self", bound="ProximalMap")


class ProximalMap(ABC):
    r"""The map $P_s(z) = \arg\min_y r(y) + |y - z|^2 / 2 s$ of a set or of a non-smooth term r.

    It is differentiable to any order except at its kinks, and runs inside `torch.func.vmap`. Options that are functions
    have parameters named after players, as losses have; the derivative in those players is right as well.
    """

    # What a map says -------------------------------------------------------------------------------------------------

    @abstractmethod
    def apply(self, z: Variables, step: Any) -> Variables:
        """P_s(z), for the step s; options that are functions must be `settled`."""

    @abstractmethod
    def margins(self, z: Variables, step: Any) -> Margins:
        """How far z is from each of the map's kinks."""

    @abstractmethod
    def check(self, y: Variables, who: str) -> None:
        """Raise `ValueError` or `TypeError`, beginning with `who`, for variables or options that cannot be meant."""

    @property
    @abstractmethod
    def entrywise(self) -> bool:
        """Whether each entry is mapped by itself, so that optimisers may scale entries differently."""

    # What follows ----------------------------------------------------------------------------------------------------

    @property
    def functions(self) -> dict[str, Callable[..., Tensor]]:
        """Those of its options that are functions of players."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in given.items() if callable(value)}

    @property
    def players(self) -> tuple[str, ...]:
        """The players that its options depend on."""
        return tuple(dict.fromkeys(name for function in self.functions.values() for name in parameters(function)))

    def settled(self: Self, players: Mapping[str, Variables]) -> Self:
        """The same with the functions among its options replaced by what they give at these players' variables."""
        given = {n: f(**{p: players[p] for p in parameters(f)}) for n, f in self.functions.items()}
        if not given:
            return self
        # What the options are was checked when the game was made; under vmap their values cannot be looked at.
        found = copy.copy(self)
        for name, value in given.items():
            object.__setattr__(found, name, value)
        return found


class ConstraintSet(ProximalMap):
    r"""A closed convex set with a projection, $P(z) = \arg\min_{y \in C} |y - z|$.

    Sets act on a player's variables, a tensor or a pytree of tensors. `Player(..., domain=set)` keeps the player in it.
    """

    @abstractmethod
    def project(self, y: Variables) -> Variables:
        """The nearest point of the set; differentiable."""

    @property
    def entrywise(self) -> bool:
        """Whether it is a set of bounds, one pair for each entry."""
        return False

    def limits(self, y: Variables) -> Limits | None:
        """The bounds of every entry of y, where the set is nothing but bounds."""
        return None

    def apply(self, z: Variables, step: Any) -> Variables:
        """The projection, whatever the step."""
        return self.project(z)

    def distance(self, y: Variables) -> Tensor:
        """How far y is from the set, a 0-d tensor; 0 within."""
        pairs = zip(leaves(self.project(y)), leaves(y), strict=True)
        return torch.linalg.vector_norm(join([a - b for a, b in pairs]))  # type: ignore[no-any-return]

    def contains(self, y: Variables, tolerance: float | None = None) -> bool:
        """Whether y is in the set, up to a distance; the default allows for rounding."""
        if tolerance is None:
            flat = join(leaves(y))
            tolerance = 100.0 * torch.finfo(flat.dtype).eps * max(1.0, float(torch.linalg.vector_norm(flat)))
        return float(self.distance(y)) <= tolerance

    def require(self, y: Variables, who: str) -> None:
        """Raise `ValueError` when y lies outside, and say by how much."""
        self.check(y, who)
        if not self.contains(y):
            raise ValueError(
                f"{who} lies {float(self.distance(y)):.3g} outside its domain {self!r}. Start within: "
                "init=domain.project(init) is the nearest point."
            )


class Penalty(ProximalMap):
    """A non-smooth term of a player's loss, with its proximal map: `Player(..., prox=penalty)`.

    The player minimises its objective plus this term; the objective, which is what is differentiated and shown, must
    leave it out.
    """

    @abstractmethod
    def value(self, y: Variables) -> Tensor:
        """The term itself, a 0-d tensor."""


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The players that a function of players names: its parameters without defaults."""
    return tuple(n for n, p in signature(function).parameters.items() if p.default is Parameter.empty)


def number(value: Any, like: Tensor) -> Tensor:
    """An option as a tensor of the dtype and on the device of another."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def by_leaf(option: Any, y: Variables, what: str) -> list[Any]:
    """An option for each leaf of y: one for all of them, or a pytree in the form of y."""
    if isinstance(option, int | float | Tensor):
        return [option] * len(leaves(y))
    came, wanted = ([path for path, _ in named_leaves(tree)] for tree in (option, y))
    if came != wanted:
        raise ValueError(
            f"{what} is nested as {came}; expected a number, a tensor, or the nest of the variables, {wanted}."
        )
    return leaves(option)


def check_number(value: Any, what: str, *, low: float = -math.inf, infinite: bool = False) -> None:
    """Raise for an option that is no number, tensor or function, is NaN, or lies below `low`."""
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(
            f"{what} is a {type(value).__name__}; expected a number, a tensor, or a function with parameters named "
            "after players."
        )
    found = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).detach()
    if not bool((found >= low).all()) or not (infinite or bool(torch.isfinite(found).all())):
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{what} is {value!r}; expected {'' if infinite else 'finite '}numbers{least}.")


def each_leaf(function: Callable[..., Tensor], y: Variables) -> Variables:
    """The pytree of `function(leaf)`."""
    return map_leaves(function, y)
