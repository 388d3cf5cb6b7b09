"""The followers' running statistics in a game: where they move with the weights, and warnings where they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bilevel.game.data import Batch, Position
from bilevel.game.parts import Parts
from bilevel.game.situation import Buffers
from bilevel.game.statistics import moving_layers, warn_of_standing, warn_of_unfollowed
from bilevel.randomness import random_kept
from bilevel.tree import Variables, leaves


class Playing(Protocol):
    """What is asked of a game here."""

    @property
    def device(self) -> torch.device:
        """Where everybody's variables live."""

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's batch at a position, and the next position."""

    def moves_statistics(self, player: str, variables: Mapping[str, Variables]) -> bool:
        """Whether somebody goes by running statistics of a player's module, which move with variables on a graph."""

    def moving(self, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers) -> Buffers:
        """A player's buffers among `buffers`, whose running statistics have the derivative of this batch's moments."""

    def moments(
        self, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
    ) -> dict[str, Tensor]:
        """What running statistics go to on this batch, by the buffers' names; differentiable in all variables."""


def of_followers(
    game: Playing,
    parts: Parts,
    variables: Mapping[str, Variables],
    states: Mapping[str, Mapping[str, Any]],
    batches: Mapping[str, Batch],
) -> Buffers:
    """The followers' buffers of their states, whose running statistics move with the variables."""
    found: Buffers = {}
    for name, state in states.items():
        if not state.get("buffers"):
            continue
        found[name] = dict(state["buffers"])
        _warn_of_unfollowed(parts, name, variables)
        if game.moves_statistics(name, variables):
            batch = batches[name] if name in batches else game.draw(name, state.get("data"))[0]
            found |= game.moving(name, variables, batch, found)
    return found


def moved_to(
    game: Playing, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
) -> dict[str, Tensor]:
    """A player's buffers among `buffers`, whose running statistics have the derivative of this batch's moments."""
    found = dict(buffers.get(player, {}))
    with random_kept(game.device):
        here = game.moments(player, variables, batch, buffers)
    for path, now in here.items():
        found[path] = found[path] + (now - now.detach()).to(found[path].dtype)
    return found


def moving_from(
    game: Playing, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
) -> Callable[[Mapping[str, Variables]], Buffers]:
    """`Game.moving` as a function of everybody's variables, which has its value at these, and moves away from it."""
    with torch.no_grad(), random_kept(game.device):
        there = game.moments(player, variables, batch, buffers)

    def moved(variables: Mapping[str, Variables]) -> Buffers:
        found = dict(buffers.get(player, {}))
        if there:
            with random_kept(game.device):
                here = game.moments(player, variables, batch, buffers)
            found |= {path: found[path] + (now - there[path]).to(found[path].dtype) for path, now in here.items()}
        return {**buffers, player: found}

    return moved


def moving_modules(parts: Parts, player: str) -> dict[str, nn.Module]:
    """Those among a player's members, by name, whose modules have running statistics that move."""
    modules = {member: parts.players[member].init for member in parts.groups.of(player)}
    return {name: own for name, own in modules.items() if isinstance(own, nn.Module) and moving_layers(own)}


def on_graph(variables: Mapping[str, Variables]) -> bool:
    """Whether somebody is to be differentiated in these."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for own in variables.values() for leaf in leaves(own))


def _warn_of_unfollowed(parts: Parts, player: str, variables: Mapping[str, Variables]) -> None:
    """Warn of running statistics that move, which are held fixed where a leader's loss is differentiated."""
    if not on_graph(variables):
        return
    for member in parts.groups.of(player):
        module = parts.players[member].init
        if isinstance(module, nn.Module):
            warn_of_unfollowed(member, module)


def warn_where_standing(parts: Parts, player: str, variables: Mapping[str, Variables], buffers: Buffers | None) -> None:
    """Warn where a follower's statistics stand still in a loss that is to be differentiated through its answer."""
    runs = parts.runs.get(player)
    if runs is None or not torch.is_grad_enabled():
        return
    for name in runs.by_statistics:
        module, given = parts.players[name].init, variables.get(name)
        if given is None:
            continue
        if not any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves(given)):
            continue  # no answer, but variables of its own
        kept = (buffers or {}).get(name, {})
        if not any(tensor.requires_grad for tensor in kept.values()):
            warn_of_standing(player, name, module, given_none=not kept)
