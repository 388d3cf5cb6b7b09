"""What a game is made of, and what of it a player's function is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.constraints import Coordinate
from bilevel.game.checks import Depends, Runs
from bilevel.game.data import Batch, Stream
from bilevel.game.groups import Groups
from bilevel.game.player import Player
from bilevel.game.residual import Residual
from bilevel.game.shards import Shards
from bilevel.game.situation import Buffers
from bilevel.game.starts import StartsAlone
from bilevel.tree import Structure, Variables, detached, leaves, map_leaves

Anticipated = Callable[[Mapping[str, Variables]], Variables]
"""From the variables of those who move before a player to its own."""


@dataclass(frozen=True)
class Parts:
    """What a game is made of; a game derived from another differs in some of them.

    `players` are those who were declared, without the tensors that they start from; `order` names who plays, joint
    players in place of their members; `initial`, `structures` and `streams` are by name, of members and joint ones;
    `rests` are residuals in place of the players' own; `alone` says that each rank of a process group plays for itself;
    `shards` tells of players whose variables are spread over the ranks.
    `modular` that somebody is a module; `submodules` are its parts, by player.
    """

    players: Mapping[str, Player]
    order: tuple[str, ...]
    arguments: Mapping[str, tuple[str, ...]]
    initial: Mapping[str, Variables]
    structures: Mapping[str, Structure]
    buffers: Buffers
    streams: Mapping[str, Stream]
    groups: Groups
    anticipated: Mapping[str, Anticipated]
    depends: Depends
    starts_alone: StartsAlone
    runs: Mapping[str, Runs]
    rests: Mapping[str, Residual] = field(default_factory=dict)
    alone: bool = False
    shards: Mapping[str, Shards] = field(default_factory=dict)
    modular: bool = False
    submodules: Mapping[str, tuple[nn.Module, ...]] = field(default_factory=dict)

    def value(self, name: str, variables: Mapping[str, Variables]) -> Variables:
        """A player's variables among those given, or what it answers to them."""
        if name in variables:
            return variables[name]
        owner = self.groups.owner(name)
        if owner != name:
            return self.value(owner, variables)[name]
        if name not in self.anticipated:
            raise ValueError(f"The variables of player {name!r} are missing; given are {sorted(variables)}.")
        return self.anticipated[name](variables)

    def named(self, player: str, function: Callable[..., Any]) -> tuple[str, ...]:
        """The parameters that one of a player's functions must be called with."""
        return self.players[player].parameters(function)

    def held(
        self, player: str, function: Callable[..., Any], variables: Mapping[str, Variables]
    ) -> dict[str, Variables]:
        """The players' variables that a function is called with, as they are held."""
        named = [name for name in self.named(player, function) if name in self.players]
        return {name: self.value(name, variables) for name in named}

    def assembled(self, name: str, variables: Variables, *, shared: bool) -> Variables:
        """A player's variables as a loss takes them: whole where it uses them, if ranks hold parts."""
        found = self.shards.get(name)
        return variables if found is None else found.assembled(variables, shared=shared)

    def given(
        self, player: str, function: Callable[..., Any], variables: Mapping[str, Variables]
    ) -> dict[str, Variables]:
        """The players' variables that a function is called with, whole."""
        held = self.held(player, function, variables)
        return {name: self.assembled(name, tree, shared=False) for name, tree in held.items()}

    def all_buffers(self, buffers: Buffers | None) -> Buffers:
        """Everybody's buffers by member: these, and of whom they leave out the initial ones."""
        return self.buffers if buffers is None else {**self.buffers, **self.groups.parted(buffers)}


def first_tensor(players: Mapping[str, Player]) -> Tensor | None:
    """A tensor that somebody starts from: what starts at a plain number takes its dtype."""
    found = (
        leaf.start if isinstance(leaf, Coordinate) else leaf
        for player in players.values()
        for leaf in (player.init.parameters() if isinstance(player.init, nn.Module) else leaves(player.init))
    )
    return next((leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


@dataclass(frozen=True)
class Move:
    """Takes tensors to a device, and floating-point ones to a dtype."""

    device: torch.device | None
    dtype: torch.dtype | None

    def __call__(self, leaf: Any) -> Any:
        """A copy there; what is no tensor stays."""
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone().to(self.device, self.dtype if leaf.is_floating_point() else None)

    def batch(self, batch: Batch) -> Batch:
        """All tensors of a batch."""
        return map_leaves(self, batch)


@dataclass(frozen=True, eq=False)
class DeclaredPlayers(Mapping[str, Player]):
    """Players of a game; what one starts from is copied when that one is asked for, which may be 10 million numbers."""

    players: Mapping[str, Player]
    initial: Mapping[str, Variables]

    def __getitem__(self, name: str) -> Player:
        player = self.players[name]
        kept = isinstance(player.init, nn.Module) or any(player.coordinates)
        return player if kept else replace(player, init=detached(self.initial[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.players)

    def __len__(self) -> int:
        return len(self.players)
