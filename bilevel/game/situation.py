"""What a player's residual is a function of besides the player's own variables, and what it asks of its game."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch
from torch import Tensor

from bilevel.constraints.coordinates import Coordinate
from bilevel.custom_functions import OwnFunctions
from bilevel.game.data import Batch, Position
from bilevel.second_order import FastKernels
from bilevel.tree import Structure, Variables

Buffers = dict[str, dict[str, Tensor]]
"""Non-differentiated state of the players' modules: player -> buffer's name -> tensor."""


class GameOfLosses(Protocol):
    """What residuals need of the game that a player is in."""

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

    def reads(self, player: str, further: Iterable[str] = ()) -> tuple[str, ...]:
        """The others whose variables can reach a player's functions, in order of play, and `further` ones."""

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

    def whole_pass(self, player: str, position: Position | None, asker: str, way_out: str = "") -> Iterator[Batch]:
        """All the batches of the pass that a position is in, from its first; None once where there is no data."""

    def pass_length(self, player: str) -> int | None:
        """How many batches a pass over a player's data has, as far as the data say."""

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

    def kernels(self, player: str) -> FastKernels:
        """What a player's loss uses that has one derivative only, where there is a form with two."""

    def own_functions(self, player: str) -> OwnFunctions:
        """The user's own autograd functions in a player's loss."""

    def require_twice(self, player: str) -> None:
        """Raise `SecondDerivativeError` where a second derivative of what a player minimises would be wrong."""

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


@final
@dataclass(frozen=True, eq=False)
class Situation:
    """Where a player is, its own variables apart.

    Args:
        game: The game that it plays.
        player: Its name.
        others: The other players' variables, by name.
        batch: Its batch; of a joint player a dict with one for each member.
        buffers: Its module's.
    """

    game: GameOfLosses
    player: str
    others: Mapping[str, Variables]
    batch: Batch = None
    buffers: Buffers = field(default_factory=dict)

    @property
    def form(self) -> Structure:
        """How the player's variables are laid out."""
        return self.game.structure(self.player)

    def at(self, y: Sequence[Tensor]) -> dict[str, Variables]:
        """Everybody's variables, the player's at the leaves y."""
        return {**self.others, self.player: self.form.build(list(y))}

    def at_flat(self, y: Tensor) -> dict[str, Variables]:
        """The same at a flat `y: [n]`."""
        return {**self.others, self.player: self.form.unflatten(y)}

    def loss(self, variables: Mapping[str, Variables]) -> tuple[Tensor, Buffers]:
        """The player's loss at everybody's variables, as it is differentiated, and the buffers after it."""
        loss, after = self.game.evaluate(self.player, variables, self.batch, self.buffers)
        return self.game.total(loss), after

    def call(
        self,
        function: Callable[..., Any],
        variables: Mapping[str, Variables],
        extra: Mapping[str, Variables] | None = None,
    ) -> tuple[Variables, Buffers]:
        """A function that returns a pytree, called as the player's objective is."""
        return self.game.call(self.player, function, variables, self.batch, self.buffers, extra or {})

    def given(self, names: Sequence[str]) -> dict[str, Variables]:
        """The variables of some of the others, whether given or answered."""
        return {name: self.game.value(name, self.others) for name in names}

    def of(self, member: str, others: Mapping[str, Variables], buffers: Buffers | None = None) -> Situation:
        """That of a member of a joint player, who sees these others."""
        batch = None if self.batch is None else self.batch[member]
        return Situation(self.game, member, others, batch, self.buffers if buffers is None else buffers)


class Present(Protocol):
    """What a residual may ask of its follower during a call."""

    @property
    def game(self) -> GameOfLosses:
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
