"""A game held still as functions of two flat vectors, the leader's and the follower's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.autodiff import gradient, pullback
from bilevel.constraints import Constrained
from bilevel.game import Buffers, Follower, Game
from bilevel.game.data import Batch
from bilevel.game.running import moving_from
from bilevel.randomness import random_kept
from bilevel.tree import Variables, flatten, leaves, map_leaves

Product = Callable[[Tensor], Tensor]


def still(game: Game, batches: Mapping[str, Batch], random: Mapping[str, Tensor]) -> Game:
    """The same game with one batch a player for ever, whose losses draw the same random numbers at every evaluation."""

    def held(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(objective)
        def loss(**arguments: object) -> Tensor:
            with random_kept(game.device, start=random):
                return objective(**arguments)

        return loss

    players = {
        name: replace(
            player,
            objective=held(player.objective),
            data=None if player.data is None else [batches[name]],
            inequality=None if player.inequality is None else map_leaves(held, player.inequality),
            equality=None if player.equality is None else map_leaves(held, player.equality),
        )
        for name, player in game.players.items()
    }
    return Game(**players)


@dataclass(frozen=True, eq=False)
class LeaderFollowerLosses:
    """Two players' losses as functions of x `[n]` of the leader and y `[m]` of the follower; all else stands still."""

    game: Game
    leader: str
    follower: str
    others: Mapping[str, Variables]
    batches: Mapping[str, Batch]
    buffers: Buffers
    """Those that the follower's module has at `at`."""
    at: tuple[Tensor, Tensor] | None = None
    """The x and y at which running statistics are those of `buffers`; by default, where everybody begins."""

    @functools.cached_property
    def _moved(self) -> Callable[[Mapping[str, Variables]], Buffers]:
        """The buffers as a function of everybody's variables: running statistics move with the follower's."""
        names = (self.leader, self.follower)
        at = [flatten(self.game.initial(name)) for name in names] if self.at is None else self.at
        own = {name: self.game.structure(name).unflatten(x.detach()) for name, x in zip(names, at, strict=True)}
        batch = self.batches.get(self.follower)
        return moving_from(self.game, self.follower, {**self.others, **own}, batch, self.buffers)

    def loss(self, player: str, x: Tensor, y: Tensor) -> Tensor:
        """A player's loss, a 0-d tensor."""
        moving = {
            self.leader: self.game.structure(self.leader).unflatten(x),
            self.follower: self.game.structure(self.follower).unflatten(y),
        }
        variables = {**self.others, **moving}
        buffers = self._moved(variables) if player == self.leader and self.buffers else self.buffers
        return self.game.evaluate(player, variables, self.batches.get(player), buffers)[0]

    def value(self, x: Tensor, y: Tensor) -> float:
        """The leader's loss."""
        with torch.no_grad():
            return float(self.loss(self.leader, x, y))

    def slope(self, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
        """The follower's loss, and its gradient in y `[m]`."""
        with torch.no_grad():
            loss, (slope,) = gradient(lambda y: self.loss(self.follower, x, y), y)
        return float(loss), slope

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """The follower's gradient `[m]`, differentiable in both."""
        # A loss that is linear in y has a gradient without y; its curvature is 0, not an error.
        return gradient(lambda y: self.loss(self.follower, x, y), y)[1][0] + 0.0 * y

    def programme(self, x: Tensor) -> Constrained | None:
        """What the follower solves at x, where functions, or a set of smooth ones, constrain it; else None."""
        return self._follower(self.game.by_walls(self.follower), x).constraints

    def projected(self, x: Tensor) -> Follower | None:
        """The follower at x, where it has a domain or a term that is no smooth functions; else None."""
        found = self._follower(self.game, x)
        return found if found.rests.projects else None

    def _follower(self, game: Game, x: Tensor) -> Follower:
        state = {"follower": self.follower, "data": None, "buffers": self.buffers.get(self.follower, {})}
        others = {**self.others, self.leader: game.structure(self.leader).unflatten(x.detach())}
        batch = self.batches.get(self.follower)
        first = game.follower(others, state, batch)
        state |= first.first()
        if first.rests.needs_scale:
            state["scale"] = first.measured_scale(leaves(game.initial(self.follower)))
        return game.follower(others, state, batch)

    def hessian(self, x: Tensor, y: Tensor) -> Product:
        """v -> H v, one graph for all products."""
        _, products = pullback(lambda y: self.residual(y, x), y)

        def product(v: Tensor) -> Tensor:
            with torch.no_grad():
                return products(v)[0]

        return product
