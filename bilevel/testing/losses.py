"""A game held still as functions of two flat vectors, the leader's and the follower's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.autodiff import gradient, pullback
from bilevel.game import Buffers, Game, Player
from bilevel.game.data import Batch
from bilevel.randomness import random_kept
from bilevel.tree import Variables

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
        name: Player(
            held(player.objective),
            player.init,
            data=None if player.data is None else [batches[name]],
            optimizer_hyper=player.optimizer_hyper,
            start=player.start,
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

    def loss(self, player: str, x: Tensor, y: Tensor) -> Tensor:
        """A player's loss, a 0-d tensor."""
        moving = {
            self.leader: self.game.structure(self.leader).unflatten(x),
            self.follower: self.game.structure(self.follower).unflatten(y),
        }
        return self.game.loss(player, {**self.others, **moving}, self.batches.get(player), self.buffers)

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

    def hessian(self, x: Tensor, y: Tensor) -> Product:
        """v -> H v, one graph for all products."""
        _, products = pullback(lambda y: self.residual(y, x), y)

        def product(v: Tensor) -> Tensor:
            with torch.no_grad():
                return products(v)[0]

        return product
