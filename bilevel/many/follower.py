"""A follower of many games at once: what must not be shared among them is one number, or one solver, a game."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.game import Batch, Follower, Size
from bilevel.game.residual import Kinks, PlayedGame, Rest
from bilevel.inner import InnerSolver
from bilevel.inner.torch_optim import player_parameters
from bilevel.linear import LinearSolver
from bilevel.many.inner import BatchedInnerSolver, entrywise
from bilevel.many.linear import BatchedLinearSolver
from bilevel.many.numbering import told_of
from bilevel.randomness import random_kept
from bilevel.tree import Structure, Variables, join, leaf_names, leaves, map_leaves

Solver = TypeVar("Solver")


class StackedGames(PlayedGame, Protocol):
    """What it needs of the games that it plays."""

    @property
    def count(self) -> int:
        """How many games there are."""

    def game(self, index: int) -> Any:
        """One of them, by itself."""

    @property
    def noun(self) -> str:
        """What one of them is called."""

    @property
    def offset(self) -> int:
        """The number of the first one."""

    @property
    def told(self) -> str:
        """All of them, in words."""

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all processes that play games of this kind."""

    @property
    def shared(self) -> frozenset[str]:
        """The players who are one for all."""

    def dim_of(self, player: str) -> int | None:
        """The dimension of a player's variables that tells them apart, None of one who is shared."""

    def batch_dims(self, player: str, batch: Batch) -> Any:
        """Which leaves of a batch have the leading dimension."""

    def batch_of(self, player: str, batch: Batch, index: int) -> Batch:
        """One game's part of a batch."""


class BatchedFollower(Follower):
    """The same player in `count` games: leaves, sizes and thresholds have a leading dimension."""

    def __init__(
        self,
        games: StackedGames,
        others: Mapping[str, Variables],
        state: Mapping[str, Any],
        batch: Batch,
        further: Iterable[str] = (),
    ) -> None:
        super().__init__(games, others, state, batch, further)
        self.games = games
        self.scale = state.get("scale")
        """The step s of a constrained follower's residual in each game, `[count]`; None without one."""

    @property
    def batch_dims(self) -> Any:
        """Which leaves of the batch differ from game to game, as `in_dims` of vmap."""
        return self.games.batch_dims(self.name, self.batch)

    @property
    def dims(self) -> dict[str, int | None]:
        """Which of the others' variables have the leading dimension, as `in_dims` of vmap."""
        return {name: self.games.dim_of(name) for name in self.inputs}

    def single(self, index: int) -> Follower:
        """The follower of one game, fixed to its slice of the current batch."""
        if self.games.anticipated:
            raise TypeError(
                f"Player {self.name!r}: its inner solver takes many games one after the other, but "
                f"{sorted(self.games.anticipated)} answers for all at once. Use a torch.optim optimiser that moves "
                "each entry by itself, such as SGD or Adam."
            )
        own = {name: value for name, value in self.others.items() if self.games.dim_of(name) is not None}
        buffers, chosen = map_leaves(lambda leaf: leaf[index], (self.buffers.get(self.name, {}), own))
        others = {name: chosen.get(name, value) for name, value in self.others.items()}
        multipliers = map_leaves(lambda leaf: leaf[index], self.multipliers)
        state = {"follower": self.name, "data": self.position, "buffers": buffers, "multipliers": multipliers}
        if self.scale is not None:
            state["scale"] = float(self.scale[index])
        batch = self.games.batch_of(self.name, self.batch, index)
        return Follower(self.games.game(index), others, state, batch, others)

    @property
    def size(self) -> int:
        """The unknowns of one game."""
        return self.unknowns.size // self.games.count

    def norm(self, slopes: Sequence[Tensor]) -> Size:
        """The norm of F in each game, `[count]`."""
        return self.games.norms(slopes).detach()

    def inner(self, first: Tensor, second: Tensor) -> Tensor:
        """The dot product in each game, `[count]`."""
        return torch.stack([leaf.reshape(len(leaf), -1).sum(1) for leaf in self.form.split(first * second)]).sum(0)

    def shortfall(self, norm: Size, threshold: Size, relative: Size) -> tuple[str, list[int] | None] | None:
        """How far the worst game is above its threshold, in words, and which games are."""
        above = ~(norm <= threshold)
        if not bool(above.any()):
            return None
        worst = int(torch.where(above, relative, 0.0).argmax())
        told = (
            f"up to {float(relative[worst]):.3g} of its value at the start in {int(above.sum())} of {self.games.told}, "
            f"the worst being {self.games.noun} {self.games.offset + worst},"
        )
        return told, (above.nonzero().flatten() + self.games.offset).tolist()

    def keep_pace(self, evaluations: int) -> None:
        """Read on, after so many evaluations of a solver that began here, as far as the slowest games of all do."""
        (most,) = self.games.most([evaluations])
        for _ in range(most - evaluations):
            self.advance()
        self.count(most - evaluations)

    def probe(self, flat: Tensor, generator: torch.Generator) -> Tensor:
        """The same in each game, and what it is alone."""
        sizes = [shape[1:].numel() for shape in self.form.shapes]
        one = super().probe(flat.new_empty(sum(sizes)), generator)
        return join([piece.expand(self.games.count, -1) for piece in torch.split(one, sizes)])

    def adapted_inner(self, solver: Solver) -> Solver:
        """One that stops in each game where it would stop alone."""
        return cast(Solver, BatchedInnerSolver(cast(InnerSolver, solver)))

    def adapted_linear(self, solver: Solver) -> Solver:
        """One that gives each game its own scalars and its own end."""
        widths = tuple(shape[1:].numel() for shape in self.unknowns.shapes)
        found = BatchedLinearSolver(
            solver=cast(LinearSolver, solver), count=self.games.count, widths=widths,
            noun=self.games.noun, offset=self.games.offset,
        )  # fmt: skip
        return cast(Solver, found)

    def brought_to_rest(self, y: Sequence[Tensor]) -> Rest:
        """The unknowns of each game, found one by one where there are more than the variables."""
        if not self.multipliers:
            return super().brought_to_rest(y)
        ends: list[Rest] = []
        for index in range(self.games.count):
            single = self.single(index)
            try:
                ends.append(single.brought_to_rest([leaf[index] for leaf in y]))
            except BilevelError as error:
                raise type(error)(f"Game {self.games.offset + index}: {error}") from error
            form = single.unknowns
        bent = [index for index, end in enumerate(ends) if end.kink]
        other = [end.unknowns if end.other_side is None else end.other_side for end in ends]
        story, offset = "", self.games.offset
        if bent:
            story = f"in {len(bent)} of {self.games.told}, in game {offset + bent[0]} of {ends[bent[0]].kink}"
        stacked = [_stacked(form, rows) for rows in ([end.unknowns for end in ends], other)]
        return Rest(stacked[0], story, stacked[1] if bent else None, [offset + index for index in bent])

    def games_of(self, kinks: Kinks) -> list[int] | None:
        """Those in which they are."""
        return sorted({self.games.offset + place[0] for _, _, place, _ in kinks})

    def _entry(self, path: str, place: list[int]) -> str:
        return f"{self.name}{path}{place[1:] or ''} of game {self.games.offset + place[0]}"

    def where_not_finite(self, values: Tensor) -> str:
        """In which games they are not, in words."""
        return among(values, self.games.noun, self.games.offset)

    def where_loss_not_finite(self, y: Sequence[Tensor]) -> str:
        """In which games the loss at y is not finite, in words."""
        with torch.no_grad(), random_kept(self.games.device):
            return among(self.loss(self.form.build(y), self.others), self.games.noun, self.games.offset)


def _stacked(form: Structure, rows: Sequence[Tensor]) -> Tensor:
    """Many games' vectors `[n]` as one, leaf after leaf with a leading dimension."""
    return join([torch.stack(parts) for parts in zip(*(form.split(row) for row in rows), strict=True)])


def among(values: Tensor, noun: str = "game", offset: int = 0) -> str:
    """Which of many games' `values: [count]` are not finite, in words; the first has the number `offset`."""
    wrong = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if not wrong:
        return ""
    return f" in {len(wrong)} of {told_of(len(values), noun, offset)}, the first being {noun} {offset + wrong[0]}"


def refuse_mixing(
    asker: str, optimizer: Callable[..., torch.optim.Optimizer], games: StackedGames, player: str
) -> None:
    """Raise `TypeError` when many games are stepped by an optimiser that would mix them."""
    tuned = player_parameters(optimizer, games.names)
    if set(tuned) - games.shared:
        raise TypeError(
            f"{asker}: its optimiser takes the variables of {tuned[0]!r}, one in each game; there is one optimiser "
            "for all games. Solve them one by one: solve(games.game(i), ...)."
        )
    start = games.initial(player)
    given = {name: games.initial(name) for name in tuned}
    if not entrywise(optimizer, leaves(start), leaf_names(start, player), given):
        raise TypeError(
            f"{asker}: its optimiser does not move each entry by itself, so that player {player!r} would mix "
            f"{games.count} {games.noun}s. Use SGD, Adam or another entrywise one with groups that do not depend on "
            "shapes, or solve them one by one: games.game(i) is one of them."
        )
