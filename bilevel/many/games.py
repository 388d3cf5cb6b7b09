"""Many small games of one form, played as one: variables, and data that differ, have a leading dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.game import Game
from bilevel.game.constrained import ConstrainedGradient
from bilevel.game.data import Batch, Position, Stream
from bilevel.game.passes import Source
from bilevel.game.player import check_data
from bilevel.many.dynamics import refuse_mixing_dynamics
from bilevel.many.stack import Stack, rows_of
from bilevel.randomness import random_kept
from bilevel.tree import Variables, detached, leaves, map_leaves, named_leaves, structure_of


class Games(Stack):
    """`count` games that differ in where they start and in their data, for one call of `solve`.

        games = Games(game, 1000, init={"w": starts}, data={"w": [(inputs, targets)]})
        solutions = solve(games, w=Unrolled(...), steps=200)
        solutions[17]                                       # where solve(games.game(17), ...) ends

    `game` is one of them, and its objectives are written for one: `torch.func.vmap` runs them over all. `init`: player
    -> variables, each leaf `[count, ...]`; players that are not listed use `game`'s init in every copy. `data`:
    player -> an iterable of batches, each tensor of a batch `[count, ...]`; players that are not listed draw the same
    batches of `game` in every game. `data_dims`: player -> which leaves of its batch have the leading dimension, 0 or
    None for each or for all of a branch, as `in_dims` of vmap says it (default: every tensor). What else an objective
    needs of its own game, a cost or a seed's draw, is part of the batch.

    It is a `Game` whose losses are `[count]`. Modules' buffers are one each. Random numbers (dropout) are drawn for
    each game, and are not those that the game would draw alone.

    Raises `ValueError`/`TypeError` for leading dimensions that are not `count`, for starts or losses that are not
    finite, with the game's number, and for an objective that vmap cannot run: one that branches on values, calls
    `.item()`, or writes into a tensor from outside.
    Costs one vmapped evaluation for all games, and `count` times the memory of one.

    >>> from bilevel.game import Player
    >>> game = Game(x=Player(lambda x, batch: ((x - batch) ** 2).sum(), torch.zeros(2), data=[torch.ones(2)]))
    >>> games = Games(game, 3, data={"x": [torch.arange(6.0).reshape(3, 2)]})
    >>> games.loss("x", {"x": torch.zeros(3, 2)}, games.draw("x", games.start("x"))[0])
    tensor([ 1., 13., 41.])
    """

    def __init__(
        self,
        game: Game,
        count: int,
        *,
        init: Mapping[str, Variables] | None = None,
        data: Mapping[str, Source] | None = None,
        data_dims: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(game, Game) or isinstance(game, Games) or game.anticipated:
            raise TypeError(
                f"Games: game is {game!r}; expected one Game, without anticipated players: their responses are given "
                "to solve()."
            )
        game.require_whole("Games")
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"Games: count={count!r}; expected the number of games, at least 1.")
        tuned = game.optimizer_players
        if tuned:
            raise TypeError(
                f"Games: player {tuned[0]!r} tunes the inner optimiser, of which there is one for all games. Solve "
                "them one by one."
            )
        self._one, self._count = game, count
        self._dims = dict.fromkeys(data or {}, 0) | dict(data_dims or {})
        self._parts = game._parts
        initial = self._started(dict(init or {}))
        self._parts = replace(
            game._parts,
            initial=initial,
            structures={name: structure_of(value) for name, value in initial.items()},
            buffers=map_leaves(self._repeated, game._parts.buffers),
            streams=self._streamed(dict(data or {})),
        )
        self._require_within(initial)
        for name in game.players:
            self._try(name)

    def game(self, index: int) -> Game:
        """One of them, by itself; `index` may be negative."""
        if not -self.count <= index < self.count:
            raise IndexError(f"There is no game {index} among {self.count}.")
        return self._one.derived(
            initial=map_leaves(lambda leaf: leaf[index].clone(), self._parts.initial),
            buffers=map_leaves(lambda leaf: leaf[index].clone(), self._parts.buffers),
            streams=self._picked(index),
        )

    def chosen(self, indices: Sequence[int]) -> Games:
        """Some of them, in this order: those without one that fails, say."""
        beyond = [index for index in indices if not -self.count <= index < self.count]
        if beyond or not len(indices):
            raise IndexError(f"There is no game {beyond[0] if beyond else 'chosen'} among {self.count}.")
        rows = torch.arange(self.count)[torch.as_tensor(indices)]  # on the CPU: data may be, whatever the variables are
        initial = map_leaves(lambda leaf: leaf[rows], self._parts.initial)
        games = self.derived(
            initial=initial,
            structures={name: structure_of(value) for name, value in initial.items()},
            buffers=map_leaves(lambda leaf: leaf[rows], self._parts.buffers),
            streams=self._picked(rows),
        )
        games._count = len(rows)
        return games

    def joined(self, **groups: Sequence[str]) -> Games:
        """The same games, in each of which players who move together make up one joint player; as `Game.joined`."""
        games = super().joined(**groups)
        games._one = self._one.joined(**groups)
        return games

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's batch at a position, that of every game where they differ, and the next position."""
        batch, after = super().draw(player, position)
        if self._dims.get(player) == 0:
            for path, leaf in named_leaves(batch):
                if isinstance(leaf, Tensor) and leaf.shape[:1] != (self.count,):
                    raise ValueError(
                        f"Player {player!r}: its batch{path} has shape {tuple(leaf.shape)}; expected a leading "
                        f"dimension of {self.count}, one entry a game. Say data_dims={{{player!r}: ...}} with None for "
                        "what all games share."
                    )
        return batch, after

    def require_separable(self, dynamics: object) -> None:
        """Refuse a rule that follows the whole field by common numbers."""
        refuse_mixing_dynamics(dynamics, self.count)

    def require_shared(self, asker: str, players: Sequence[str]) -> None:
        """Refuse one number for all games that would be made of players who are one in each."""
        if players:
            self.require_one(asker)

    def require_one(self, asker: str) -> None:
        """Refuse who can look at one game only."""
        raise TypeError(f"{asker} looks at one game, not at {self.count}: give it games.game(i) and solutions[i].")

    # What it is made of ---------------------------------------------------------------------------------------------

    def _started(self, init: Mapping[str, Variables]) -> dict[str, Variables]:
        players = self._one.players
        found = {name: map_leaves(self._repeated, self._one.initial(name)) for name in players}
        for name, variables in init.items():
            if name not in players:
                raise ValueError(f"Games: init names {name!r}; players are {list(players)}.")
            wanted = found[name]
            if structure_of(variables).spec != structure_of(wanted).spec:
                raise ValueError(f"Games: the init of player {name!r} is not nested as that of the game.")
            for (path, leaf), (_, like) in zip(named_leaves(variables), named_leaves(wanted), strict=True):
                where = f"Games: player {name!r}: init{path}"
                if leaf.shape != like.shape or leaf.dtype != like.dtype or leaf.device != like.device:
                    raise ValueError(
                        f"{where} is {list(leaf.shape)} of {leaf.dtype} on {leaf.device}; expected {list(like.shape)} "
                        f"of {like.dtype} on {like.device}: the form of the game's init, for {self.count} games."
                    )
                wrong = (~torch.isfinite(leaf)).reshape(self.count, -1).any(1).nonzero().flatten().tolist()
                if wrong:
                    raise ValueError(f"{where} holds NaN or infinity in game {wrong[0]}, and {len(wrong)} in all.")
            found[name] = detached(variables)
        return found | {group: {m: found[m] for m in members} for group, members in self._parts.groups.members.items()}

    def _require_within(self, initial: Mapping[str, Variables]) -> None:
        """Refuse starts outside a player's domain."""
        for name, player in self._one.players.items():
            rests = player.rests
            if not isinstance(rests, ConstrainedGradient) or rests.domain is None:
                continue
            domain, given = rests.domain, {other: initial[other] for other in player.option_players}
            found = self.each(lambda y, given: domain.settled(given).distance(y), initial[name], given)  # noqa: B023
            size = torch.finfo(found.dtype).eps * self.norms(leaves(initial[name])).clamp(min=1.0)
            wrong = (~(found <= 100.0 * size)).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(
                    f"Games: player {name!r}: init lies {float(found[wrong[0]]):.3g} outside its domain {domain!r} in "
                    f"game {wrong[0]}, and outside in {len(wrong)} in all."
                )

    def _streamed(self, data: Mapping[str, Source]) -> dict[str, Stream]:
        for name in (*data, *self._dims):
            if name not in self._one.players:
                raise ValueError(f"Games: data or data_dims names {name!r}; players are {list(self._one.players)}.")
            if name not in data:
                raise ValueError(f"Games: data_dims names {name!r}, who has no data of its own here: give data= too.")
        for name, dims in self._dims.items():
            wrong = [dim for dim in pytree.tree_leaves(dims) if dim not in (0, None) or isinstance(dim, bool)]
            if wrong:
                raise ValueError(
                    f"Games: data_dims of player {name!r} holds {wrong[0]!r}; expected 0, the leading dimension, or "
                    "None for what all games share."
                )
        for name, batches in data.items():
            if name not in self._parts.streams:
                raise ValueError(f"Games: player {name!r} was given data, but its objective takes no `batch`.")
            check_data(f"Games: the data of player {name!r}", batches)
        made = {name: Stream(name, batches, self.device) for name, batches in data.items()}
        return dict(self._parts.streams) | made

    def _picked(self, rows: int | Tensor) -> dict[str, Stream]:
        return {
            name: stream.mapped(partial(rows_of, dims=self._dims[name], rows=rows)) if name in self._dims else stream
            for name, stream in self._parts.streams.items()
        }

    def _try(self, name: str) -> None:
        """Evaluate an objective once for all games."""
        batch, _ = self.draw(name, self.start(name))
        variables = {other: detached(value) for other, value in self._parts.initial.items()}
        with random_kept(self.device), torch.no_grad():
            try:
                losses = self.loss(name, variables, batch)
            except Exception as error:
                raise ValueError(
                    f"Player {name!r}: torch.func.vmap cannot run its objective for {self.count} games at once: "
                    f"{error}\nWrite it with torch.where in place of `if`, without .item(), and without writing into "
                    "tensors from outside; or solve the games in a loop, each a Game by itself."
                ) from error
        wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"Player {name!r}: its loss at init is {losses[wrong[0]].item()} in game {wrong[0]}, and not finite in "
                f"{len(wrong)} in all; expected finite numbers."
            )
