"""A game that several processes play together, each with a part of every batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import transforms_left
from bilevel.errors import UnreliableResponseWarning
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch, Position
from bilevel.game.processes import refuse_lone_rank
from bilevel.game.shards import resettled
from bilevel.parallel.agreement import glanced
from bilevel.parallel.batches import Examples, Part, part_of
from bilevel.parallel.pair import entered, weighted_mean
from bilevel.parallel.ranks import Ranks
from bilevel.randomness import global_generators, random_kept
from bilevel.sharding import ShardedTensor
from bilevel.tree import Variables, join, leaves, structure_of


@dataclass(frozen=True, eq=False)
class Dealing:
    """How batches and buffers are shared.

    Args:
        sharded: Players whose data are a part of their own on each rank.
        examples: How many examples a batch holds; None: its rows.
        advancing: Player -> the paths of the buffers, (owner, name), that its loss advances.
    """

    sharded: frozenset[str]
    examples: Examples | None
    advancing: Mapping[str, Sequence[tuple[str, str]]]


@final
class ParallelGame(Game):
    r"""A game whose losses are means over the ranks' parts of a batch, weighted by their examples:

    $$f(y, x; B) = \frac{\sum_r n_r\, f(y, x; B_r)}{\sum_r n_r}$$

    `DataParallel(...).game(game)` makes it. Whatever takes a derivative of such a loss gets that of the whole, the same
    bits on every rank: each gradient, each product with a Hessian and each mixed product is one sum over ranks. All
    ranks must ask the same in the same order.
    """

    ranks: Ranks
    _dealing: Dealing

    @classmethod
    def of(cls, game: Game, ranks: Ranks, dealing: Dealing) -> ParallelGame:
        """The same game on these ranks."""
        found = cls.__new__(cls)
        parts = replace(game._parts, initial=resettled(game._parts.initial, ranks))
        found._parts, found.ranks, found._dealing = parts, ranks, dealing
        return found

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss on the whole batch, and the buffers after it, the same on all ranks."""
        if self.members(player) != (player,):
            return self._evaluate_group(player, variables, batch, buffers)
        # Who is anticipated answers here, where its own derivatives are those of the whole.
        given = self._parts.held(player, self._parts.players[player].objective, variables)
        form, inputs = structure_of(given), leaves(given)
        # What is spread enters where it is put together; the rest here.
        whole = [index for index, leaf in enumerate(inputs) if not isinstance(leaf, ShardedTensor)]
        for index, leaf in zip(whole, entered(self.ranks, [inputs[index] for index in whole]), strict=True):
            inputs[index] = leaf
        part = self.part(player, batch)
        taken = {name: self._parts.assembled(name, tree, shared=True) for name, tree in form.build(inputs).items()}
        with own_numbers(self.ranks.rank, self.device):
            share, after = super().evaluate(player, taken, part.batch, buffers)
        mean = weighted_mean(self.ranks, share, part.weight, inputs)
        return mean, self._together(player, after, part.weight)

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's batch; `solve` compares after each step whether all ranks have read the same."""
        batch, after = super().draw(player, position)
        whole = batch is not None and self.members(player) == (player,) and player not in self.sharded
        if whole and self.ranks.size > 1:
            self.ranks.read = (31 * self.ranks.read + glanced(batch)) % 2**62
        return batch, after

    @property
    def sharded(self) -> frozenset[str]:
        """Players whose data are a part of their own on each rank."""
        return self._dealing.sharded

    def moving(self, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers) -> Buffers:
        """A player's buffers as they are: each rank normalises by statistics of its own, whose path is left out."""
        warnings.warn(
            f"DataParallel(coupled=True): the running statistics of {player!r} are held fixed while a leader's loss is "
            "differentiated, and move with its weights: the hypergradient lacks that part, and may have the wrong "
            "sign. Use GroupNorm or LayerNorm, or one process.",
            UnreliableResponseWarning,
            stacklevel=3,
        )
        return {player: dict(buffers.get(player, {}))}

    def part(self, player: str, batch: Batch) -> Part:
        """The part of a player's batch that this rank takes."""
        dealing, ranks = self._dealing, self.ranks
        sharded = player in dealing.sharded
        return part_of(player, batch, ranks.rank, ranks.size, sharded=sharded, examples=dealing.examples)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each over all ranks, who must decide alike."""
        return self.ranks.largest(numbers)

    def require_ranks(self, asker: str) -> None:
        """Raise `ValueError` where it was made for one process, and this one has become one of several since."""
        refuse_lone_rank(asker, alone=self.ranks.size > 1)

    def _together(self, player: str, after: Buffers, weight: float) -> Buffers:
        """Buffers that the loss has advanced, averaged: statistics of this rank's part are nobody else's."""
        moved = [(o, n) for o, n in self._dealing.advancing.get(player, ()) if n in after.get(o, {})]
        return averaged(self.ranks, after, moved, weight)


def averaged(ranks: Ranks, after: Buffers, places: Sequence[tuple[str, str]], weight: float) -> Buffers:
    """The buffers with those at `places`, (owner, name), as weighted means over all ranks; integers as they are."""
    floating = [(owner, name) for owner, name in places if after[owner][name].is_floating_point()]
    if not floating:
        return after
    own = [after[owner][name].detach() for owner, name in floating]
    total = ranks.total(join([*own, own[0].new_ones(1)]) * weight)
    found: Buffers = {owner: dict(tree) for owner, tree in after.items()}
    split = torch.split(total[:-1] / total[-1], [leaf.numel() for leaf in own])
    for (owner, name), leaf, mean in zip(floating, own, split, strict=True):
        found[owner][name] = mean.reshape(leaf.shape)
    return found


@contextmanager
def own_numbers(rank: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a rank's own, so that no two ranks drop out alike; those outside go on alike on all."""
    with transforms_left():
        seed = int(torch.randint(2**62, ()))
    with random_kept(device):
        for generator in global_generators(device):
            generator.manual_seed(seed + rank)
        yield
