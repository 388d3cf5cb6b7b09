"""Many games that several processes play: each has some of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.game import Game
from bilevel.game.processes import refuse_lone_rank
from bilevel.many.games import Games
from bilevel.many.shares import Shares, alone, moved
from bilevel.parallel.batches import is_sharded
from bilevel.parallel.data_parallel import DataParallel, shared
from bilevel.parallel.game import own_numbers
from bilevel.parallel.ranks import Ranks
from bilevel.tree import Variables, leaves, rebuilt


@final
class GamesOfRanks(Games):
    """A rank's games of many: `count` of `undivided.count`, the first being number `offset`.

    `DataParallel().game(games)` makes it. They are played as `Games` are, and what is `[count, ...]` is this rank's;
    `gathered` gives all games'. No rank needs another's numbers to move: they meet where a step's record is made, and
    once in each call of an inner solver, whose games read on as far as the slowest of all.
    """

    ranks: Ranks
    shares: Shares
    _whole: Games
    _quiet: list[int]

    @classmethod
    def of(cls, games: Games, ranks: Ranks) -> GamesOfRanks:
        """A rank's part of them."""
        shares = Shares.even(games.count, ranks.size)
        first = shares.first(ranks.rank)
        own = games.chosen(range(first, first + shares.counts[ranks.rank]))
        found = cls.__new__(cls)
        vars(found).update(vars(own))
        found.ranks, found.shares, found._whole, found._quiet = ranks, shares, games, [0]
        found.offset = first
        found._parts = replace(found._parts, alone=True)
        return found

    @property
    def undivided(self) -> Games:
        """All of them."""
        return self._whole

    @property
    def sharded(self) -> frozenset[str]:
        """Nobody reads data of its own."""
        return frozenset()

    def game(self, index: int) -> Game:
        """One of this rank's, by itself."""
        return super().game(index).derived(alone=True)

    def chosen(self, indices: Sequence[int]) -> Games:
        """Refused: all ranks' are to be chosen from."""
        raise TypeError("Games on several ranks: choose before they are shared out, games.chosen(...).")

    def joined(self, **groups: Sequence[str]) -> GamesOfRanks:
        """Refused, for the same reason."""
        raise TypeError("Games on several ranks: join players before they are shared out, games.joined(...).")

    # Where ranks meet ------------------------------------------------------------------------------------------------

    def gathered(self, tree: Variables) -> Variables:
        """What is `[count, ...]` here, of all games; what has no dimension stays."""
        own = leaves(tree)
        places = [place for place, leaf in enumerate(own) if isinstance(leaf, Tensor) and leaf.ndim]
        if self.ranks.size == 1 or not places:
            return tree
        found = list(own)
        for dtype in dict.fromkeys(own[place].dtype for place in places):
            mine = [place for place in places if own[place].dtype == dtype]
            rows = torch.cat([own[place].detach().reshape(self.count, -1) for place in mine], 1)
            sizes = [count * rows.shape[1] for count in self.shares.counts]
            sent = rows.to(torch.uint8) if dtype == torch.bool else rows
            parts = self.ranks.parts(sent.reshape(-1), sizes)
            whole = torch.cat(parts).reshape(-1, rows.shape[1]).to(dtype)
            widths = [own[place][0].numel() for place in mine]
            for place, piece in zip(mine, torch.split(whole, widths, 1), strict=True):
                found[place] = piece.reshape(-1, *own[place].shape[1:]).clone()
        return rebuilt(tree, found)

    def given_back(self, variables: Mapping[str, Variables]) -> dict[str, Variables]:
        """Everybody's variables in all games."""
        return dict(self.gathered(dict(variables)))

    def everybodys(self, content: Any) -> list[Any]:
        """Each rank's plain content."""
        return self.ranks.everybodys(content)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks; its own in a call that other ranks may not make."""
        return list(numbers) if self._quiet[0] else self.ranks.largest(numbers)

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The same."""
        return self.largest(numbers)

    @contextmanager
    def foreseeing(self) -> Iterator[None]:
        """While a follower asks what those after it will do, as often as its own games need."""
        self._quiet[0] += 1
        try:
            yield
        finally:
            self._quiet[0] -= 1

    def stepping(self) -> AbstractContextManager[object]:
        """With random numbers of this rank's own: how many are drawn depends on its games."""
        return own_numbers(self.ranks.rank, self.device)

    # What a run asks -------------------------------------------------------------------------------------------------

    def alike(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The place in the data."""
        return {"data": state["data"]}

    @property
    def leads_alike(self) -> bool:
        """No: leaders are other ones on each rank."""
        return False

    def stored(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """A run's state with all games', on the first rank; all must ask."""
        parts = self._everybodys_parts(self.shares.divided(run), everywhere=False)
        return {**run, **self._placed(self.shares.merged(parts))} if parts else dict(run)

    def whole_states(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """The followers' states with all games', as one process has them."""
        parts = self._everybodys_parts({"states": dict(states)}, everywhere=True)
        return dict(self._placed(alone(self.shares.merged(parts))["states"]))

    def own(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """A rank's part of a stored state."""
        found = self.shares.own(run, self.ranks.rank)
        return {**found, **self._placed(self.shares.divided(found))}

    def _placed(self, tree: Any) -> Any:
        return moved(tree, lambda tensor: tensor.to(self.device) if tensor.ndim else tensor)

    def _everybodys_parts(self, tree: Any, *, everywhere: bool) -> list[Any]:
        buffer = io.BytesIO()
        torch.save(moved(tree, Tensor.cpu), buffer)
        sent = self.ranks.everybodys(buffer.getvalue())
        if not (everywhere or self.ranks.first):
            return []
        return [torch.load(io.BytesIO(data), weights_only=True) for data in sent]

    def require_ranks(self, asker: str) -> None:
        """Raise `ValueError` where they were made for one process, and this one has become one of several since."""
        refuse_lone_rank(asker, alone=self.ranks.size > 1)


@shared.register
def _(game: Games, ranks: Ranks, parallel: DataParallel) -> GamesOfRanks:
    """Many games, some of which each rank plays."""
    if type(game) is not Games:
        raise TypeError(f"DataParallel: the game is {type(game).__name__}; expected Games.")
    if game.count < ranks.size:
        raise ValueError(
            f"DataParallel: there are {game.count} games for {ranks.size} ranks; expected one for each at least. Start "
            "fewer ranks."
        )
    dealt = [name for name, player in game.players.items() if is_sharded(player.data)]
    dealt += [name for name, stream in game._parts.streams.items() if is_sharded(stream.data)]
    if parallel.sharded or parallel.examples is not None or parallel.coupled or dealt:
        what = f"the data of {dealt[0]!r} have a DistributedSampler" if dealt else f"{parallel} speaks of parts of them"
        raise ValueError(
            f"DataParallel: many games are shared out in whole, each with all of its batches, and {what}. Leave it out."
        )
    return GamesOfRanks.of(game, ranks)
