"""Known games made from known games, by changes that a right hypergradient follows or does not notice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.testing.forms import Form, Vector
from bilevel.testing.known import KnownGame, Numbers, constant, reflection

_VECTOR = Vector()


@dataclass(frozen=True)
class Changed(KnownGame):
    """A known game with something changed; what is not overridden is the inner game's."""

    inner: KnownGame

    @property
    def radius(self) -> float:  # type: ignore[override]
        """The inner game's."""
        return self.inner.radius

    @property
    def x0(self) -> Tensor:
        """The inner game's."""
        return self.inner.x0

    @property
    def y0(self) -> Tensor:
        """The inner game's."""
        return self.inner.y0

    @property
    def dtype(self) -> torch.dtype:
        """The inner game's."""
        return self.inner.dtype

    @property
    def quadratic(self) -> bool:
        """The inner game's."""
        return self.inner.quadratic

    @property
    def leader_form(self) -> Form:
        """The inner game's."""
        return self.inner.leader_form

    @property
    def follower_form(self) -> Form:
        """The inner game's."""
        return self.inner.follower_form

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner game's."""
        return self.inner.leader(x, y)

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner game's."""
        return self.inner.follower(x, y)

    def best_response(self, x: Tensor) -> Tensor:
        """The inner game's."""
        return self.inner.best_response(x)


class LinearMap(ABC):
    """An invertible matrix of a player's size."""

    @abstractmethod
    def matrix(self, like: Tensor) -> Tensor:
        """The matrix `[n, n]`."""


@final
@dataclass(frozen=True)
class Reflection(LinearMap):
    """Orthogonal: the reflection along `axis` `[n]`."""

    axis: Numbers

    def matrix(self, like: Tensor) -> Tensor:
        """I - 2 v v' / v'v."""
        return reflection(self.axis, like)


@final
@dataclass(frozen=True)
class Stretch(LinearMap):
    """Diagonal, with these factors `[n]`."""

    factors: Numbers

    def matrix(self, like: Tensor) -> Tensor:
        """diag(factors)."""
        return torch.diag(constant(self.factors, like))


@final
@dataclass(frozen=True)
class Reparametrised(Changed):
    """New coordinates: x = P x' and y = Q y'. The hypergradient turns into P' times the old one."""

    leader_map: LinearMap | None = None
    follower_map: LinearMap | None = None

    def _old(self, mapping: LinearMap | None, new: Tensor) -> Tensor:
        return new if mapping is None else mapping.matrix(new) @ new

    def _new(self, mapping: LinearMap | None, old: Tensor) -> Tensor:
        return old if mapping is None else torch.linalg.solve(mapping.matrix(old), old)

    @property
    def x0(self) -> Tensor:
        """The inner game's point in the new coordinates."""
        return self._new(self.leader_map, self.inner.x0)

    @property
    def y0(self) -> Tensor:
        """The inner game's start in the new coordinates."""
        return self._new(self.follower_map, self.inner.y0)

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner game's at the old coordinates."""
        return self.inner.leader(self._old(self.leader_map, x), self._old(self.follower_map, y))

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner game's at the old coordinates."""
        return self.inner.follower(self._old(self.leader_map, x), self._old(self.follower_map, y))

    def best_response(self, x: Tensor) -> Tensor:
        """The inner game's in the new coordinates."""
        return self._new(self.follower_map, self.inner.best_response(self._old(self.leader_map, x)))


@final
@dataclass(frozen=True)
class ScaledFollower(Changed):
    """The follower's loss times a positive factor: no answer changes."""

    factor: float = 0.5

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner game's, scaled."""
        return self.factor * self.inner.follower(x, y)


@final
@dataclass(frozen=True)
class LeaderTermInFollower(Changed):
    """A term of the leader's variables alone, added to the follower's loss: no answer changes."""

    factor: float = 1.0

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """The inner game's + factor * sum (sin x + x^2)."""
        return self.inner.follower(x, y) + self.factor * (x.sin() + x.square()).sum()


@final
@dataclass(frozen=True)
class LeaderMix(Changed):
    """The leader minimises `first` times the inner game's loss plus `second` times sum sin y + (sum x) (sum y)."""

    first: float = 1.0
    second: float = 0.0

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """The mixture."""
        return self.first * self.inner.leader(x, y) + self.second * (y.sin().sum() + x.sum() * y.sum())


@final
@dataclass(frozen=True)
class FollowerCoordinate(Changed):
    """The leader's loss is one coordinate of the follower's variables: the hypergradient is that row of dy/dx."""

    index: int = 0

    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """y_index."""
        return y[self.index]


@final
@dataclass(frozen=True)
class NegatedFollower(Changed):
    """The follower's loss with the other sign: what a follower that maximises is given."""

    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus the inner game's."""
        return -self.inner.follower(x, y)


@final
@dataclass(frozen=True)
class LaidOut(Changed):
    """The same game with other layouts of the players' variables: vectors, scalars, nests."""

    leader_layout: Form = _VECTOR
    follower_layout: Form = _VECTOR

    @property
    def leader_form(self) -> Form:
        """`leader_layout`."""
        return self.leader_layout

    @property
    def follower_form(self) -> Form:
        """`follower_layout`."""
        return self.follower_layout


@final
@dataclass(frozen=True)
class Single(Changed):
    """The same game played in float32; its answers stay float64."""

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32


@final
@dataclass(frozen=True)
class Started(Changed):
    """The same game with the follower starting at its best response plus `offset`."""

    offset: float = 0.0

    @property
    def y0(self) -> Tensor:
        """The best response plus `offset` in every entry."""
        return self.inner.best_response(self.inner.x0).detach() + self.offset


@final
@dataclass(frozen=True)
class Moved(Changed):
    """The same game with the leader standing elsewhere."""

    at: Numbers = ()

    @property
    def x0(self) -> Tensor:
        """`at`."""
        return constant(self.at, self.inner.x0)
