"""Whether a game's losses are such that parts of a batch tell of the whole: tried before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.autodiff import NewLeafTracker, captured_leaves
from bilevel.errors import CapturedTensorError
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.game.player import Player
from bilevel.parallel.batches import Examples, rows, rows_in, weight
from bilevel.randomness import random_kept, random_state
from bilevel.sharding.tensor import noise_like
from bilevel.tree import Variables, leaves, map_leaves

_DRAWS = 8  # of a loss with dropout
_MOVE = 0.01  # of a variable's size: away from where all weights are equal, and within its loss's domain as a rule


def refuse_functions_of_batches(players: Mapping[str, Player]) -> None:
    """Raise `TypeError` for a function other than a loss that takes the batch: what parts say of it is not known."""
    for name, player in players.items():
        functions: dict[str, tuple[str, ...]] = {
            what: player.parameters(function) for what, function in player.constraints.items()
        }
        functions["start="] = player.start_names
        if player.residual is not None:
            functions["residual="] = player.own_residual.names
        for what, parameters in functions.items():
            if "batch" in parameters:
                raise TypeError(
                    f"DataParallel: the {what} of player {name!r} takes the batch, and need not be a mean over its "
                    "examples, as losses are. Give it what it needs of the data as a constant, or play in one process."
                )


def tried(game: Game, player: str, *, examples: Examples | None, coupled: bool) -> list[tuple[str, str]]:
    """The buffers that a player's loss advances, as (owner, name).

    Raises:
        ValueError: Where its loss is no mean over a batch's examples, unless `coupled` accepts it.
        CapturedTensorError: Where it captures a tensor that requires grad, which would get this rank's part alone.
    """
    batch, _ = game.draw(player, game.start(player))
    variables = {name: game.initial(name) for name in game.players}
    trial = _Trial(game, player, variables, batch)
    trial.refuse_captured()
    advancing = trial.advancing
    takes = batch is not None and "batch" in game.players[player].names
    if not takes or coupled:
        return advancing
    count = rows_in(player, batch) if examples is None else _rows(player, batch)
    if count < 2:
        return advancing
    halves = [rows(batch, slice(0, count // 2)), rows(batch, slice(count // 2, count))]
    weights = [weight(player, half, examples) for half in halves]
    if sum(weights) == 0.0:
        return advancing
    norms = [path for path, module in trial.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for moved in (False, True):
        whole = trial.loss(batch, moved)
        if moved and trial.draws:
            break  # of noisy numbers no small difference tells anything
        parts = [trial.loss(half, moved) for half in halves]
        if moved and not all(map(math.isfinite, (whole, *parts))):
            continue  # it left its domain
        mean = sum(w * part for w, part in zip(weights, parts, strict=True) if w) / sum(weights)
        size = max(abs(whole), abs(mean), *map(abs, parts))
        if trial.draws:  # of noisy numbers only what a sum over examples would show, half of it on half of them
            draws = [trial.drawn(batch, halves, weights, seed) for seed in range(_DRAWS)]
            whole, mean = (sum(column) / _DRAWS for column in zip(*draws, strict=True))
            wrong = abs(mean / whole - 0.5) < 0.1 if whole else False
        else:
            wrong = not abs(whole - mean) <= trial.rounding * size
        if wrong or (norms and trial.training):
            raise ValueError(_refusal(player, whole, mean, count, norms))
    return advancing


def _refusal(player: str, whole: float, mean: float, count: int, norms: Sequence[str]) -> str:
    why = (
        f"Its BatchNorm ({norms[0]!r}) computes statistics of the part of a batch that a rank sees; GroupNorm and "
        "LayerNorm have none."
        if norms
        else "A sum over examples is to be divided by their number; a mean over tokens says how many count, "
        "examples=lambda batch: ...; what compares examples with each other, or divides by their weights' sum, has "
        "no such form."
    )
    return (
        f"DataParallel: the loss of player {player!r} is {whole:.6g} on a batch of {count} examples and {mean:.6g} as "
        f"the mean of its halves, weighted by examples; expected the same, for each rank sees a part. {why} Accept it "
        "by coupled=True: each rank's part is then a batch of its own, and the numbers are not those of one process."
    )


def _rows(player: str, batch: Batch) -> int:
    """The rows of a batch; 0 where they cannot be told, which is no matter of who counts examples himself."""
    try:
        return rows_in(player, batch)
    except ValueError:
        return 0


class _Trial:
    """One player's loss at the start of the game, without a trace."""

    def __init__(self, game: Game, player: str, variables: Mapping[str, Variables], batch: Batch) -> None:
        self._game, self._player, self._variables, self._batch = game, player, dict(variables), batch
        self._random = random_state(game.device)
        self._moved = map_leaves(_moved(game.device), self._variables)
        self.rounding = torch.finfo(game.like.dtype).eps ** 0.5
        self.draws = False
        self._before = game.buffers()
        after = self._after()
        self.advancing = [
            (owner, name)
            for owner, tree in after.items()
            for name, buffer in tree.items()
            if not torch.equal(buffer, self._before[owner][name])
        ]
        self.training = any(isinstance(module, nn.Module) and module.training for _, module in self.modules())

    def modules(self) -> list[tuple[str, nn.Module]]:
        """The player's own, and what is in it."""
        own: Any = self._game.players[self._player].init
        return list(own.named_modules()) if isinstance(own, nn.Module) else []

    def loss(self, batch: Batch, moved: bool) -> float:
        """The loss, from the same random numbers; NaN where it cannot be computed away from the start."""
        variables = self._moved if moved else self._variables
        with random_kept(self._game.device, start=self._random), torch.no_grad():
            try:
                found = float(self._game.loss(self._player, variables, batch))
            except Exception:
                if not moved:
                    raise
                return math.nan
            now = random_state(self._game.device)
            self.draws = self.draws or any(not torch.equal(now[key], self._random[key]) for key in now)
        return found

    def drawn(self, batch: Batch, halves: Sequence[Batch], weights: Sequence[float], seed: int) -> tuple[float, float]:
        """The loss on a batch, and the mean of those on its halves, with random numbers from a seed."""
        with random_kept(self._game.device, start=seed), torch.no_grad():
            whole, *parts = (float(self._game.loss(self._player, self._variables, each)) for each in (batch, *halves))
        return whole, sum(w * part for w, part in zip(weights, parts, strict=True) if w) / sum(weights)

    def refuse_captured(self) -> None:
        """Raise where a tensor enters otherwise than as a player's variables."""
        tracked = map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), self._variables)
        with random_kept(self._game.device), torch.enable_grad(), NewLeafTracker() as born:
            loss = self._game.loss(self._player, tracked, self._batch)
        found = captured_leaves([loss], [*leaves(tracked), *born.leaves])
        if found:
            raise CapturedTensorError(
                f"DataParallel: the loss of player {self._player!r} captures a tensor of shape "
                f"{tuple(found[0].shape)} that requires grad; it would get the gradient of this rank's part alone. "
                "Make it a player's variables, or detach it."
            )

    def _after(self) -> Buffers:
        with random_kept(self._game.device), torch.no_grad():
            return self._game.evaluate(self._player, self._variables, self._batch)[1]


def _moved(device: torch.device) -> Any:
    generator = torch.Generator().manual_seed(0)

    def move(leaf: Tensor) -> Tensor:
        noise = noise_like(leaf, generator)
        return leaf * (1.0 + _MOVE * noise) + _MOVE * noise * (leaf == 0.0)

    return move
