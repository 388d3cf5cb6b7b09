"""What a certificate is asked of: the point, its buffers and batches, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel.game import Game
from bilevel.game.data import Batch
from bilevel.solving.solution import Solution
from bilevel.tree import Variables, map_leaves, named_leaves


def check_settings(tolerance: float, lanczos_steps: int) -> None:
    """Refuse numbers that cannot work."""
    if not 0.0 < tolerance < math.inf:
        raise ValueError(f"certify: tolerance={tolerance}; expected a finite number > 0.")
    if lanczos_steps < 1:
        raise ValueError(f"certify: lanczos_steps={lanczos_steps}; expected at least 1.")


def variables_of(game: Game, point: Solution | Mapping[str, Variables]) -> dict[str, Variables]:
    """Everybody's variables at the point, detached; refuses what is missing, unknown or misshapen."""
    given = given_variables(point, "certify")
    missing = [name for name in game.names if name not in given]
    if missing:
        raise ValueError(f"certify: the point lacks the variables of {missing}; given are {sorted(given)}.")
    unknown = sorted(set(given) - set(game.names))
    if unknown:
        raise ValueError(f"certify: the point has variables of {unknown}; players are {list(game.names)}.")
    for name in game.names:
        check_leaves(game, name, given[name], "the variables of")
    return {name: map_leaves(lambda t: t.detach(), given[name]) for name in game.names}


def given_variables(point: Solution | Mapping[str, Variables], asker: str) -> dict[str, Variables]:
    """The variables of a solution, or of a mapping; raises `TypeError` for anything else."""
    if isinstance(point, Solution):
        return dict(point.variables)
    if isinstance(point, Mapping):
        return dict(point)
    raise TypeError(
        f"{asker}: the point is a {type(point).__name__}; expected a Solution, or a mapping of each player's "
        "variables. Of what solve_globally found, pass `.variables`."
    )


def check_leaves(game: Game, name: str, tree: Variables, what: str, *, asker: str = "certify") -> None:
    """Refuse what has not a player's form, dtype and device, and what is not finite."""
    pairs, start = named_leaves(tree), named_leaves(game.initial(name))
    for path, leaf in pairs:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{asker}: {what} {name!r}: {path or 'it'} is {leaf!r}; expected a tensor.")
    game.check(name, tree)
    for (path, leaf), (_, wanted) in zip(pairs, start, strict=True):
        if leaf.dtype != wanted.dtype or leaf.device != wanted.device:
            raise ValueError(
                f"{asker}: {what} {name!r}: {path or 'its tensor'} is {leaf.dtype} on {leaf.device}; expected that of "
                f"its init, {wanted.dtype} on {wanted.device}."
            )
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"{asker}: {what} {name!r}: {path or 'its tensor'} holds NaN or infinity.")


def buffers_of(game: Game, point: Solution | Mapping[str, Variables]) -> dict[str, dict[str, Tensor]]:
    """Those that the solution ends with, else the game's own."""
    kept = dict(point.buffers) if isinstance(point, Solution) else {}
    return {name: buffers for name, buffers in {**game.buffers(), **kept}.items() if buffers}


def batches_of(game: Game, batches: Mapping[str, Batch] | None) -> dict[str, Batch]:
    """The batches that were given; refuses those of players without data."""
    given = {} if batches is None else dict(batches)
    holding = [name for name, player in game.players.items() if player.data is not None]
    for name in given:
        if name not in holding:
            raise ValueError(f"certify: batches has one for {name!r}; players with data are {holding}.")
    return given
