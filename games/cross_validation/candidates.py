"""What a search tries: points of a grid, or random points of a box."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.tree import map_leaves

Candidate = Mapping[str, Any]
"""Player -> its variables, for the follower to answer. Players that are left out stay at their init."""


def grid(game: bl.Game, axes: Mapping[str, Sequence[float] | Tensor]) -> list[Candidate]:
    """Every combination of the players' values, the last player's changing fastest.

    `axes[player]` are numbers, such as `torch.linspace(-1, 3, 11)`; each fills all entries of that player's
    variables. Raises `ValueError` for an unknown player or an empty axis.
    """
    for name, values in axes.items():
        require_player(game, name)
        if len(values) == 0:
            raise ValueError(f"grid: the axis of player {name!r} is empty; expected at least one value.")
    combinations = itertools.product(*([float(value) for value in values] for values in axes.values()))
    return [
        {
            name: map_leaves(lambda leaf, value=value: torch.full_like(leaf, value), game.initial(name))
            for name, value in zip(axes, values, strict=True)
        }
        for values in combinations
    ]


def random(game: bl.Game, bounds: Mapping[str, tuple[float, float]], *, count: int, seed: int = 0) -> list[Candidate]:
    """`count` candidates; each entry of each player's variables is uniform between its bounds (low, high).

    Raises `ValueError` for an unknown player, bounds in the wrong order, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"random: count={count}; expected at least 1.")
    for name, (low, high) in bounds.items():
        require_player(game, name)
        if not low < high:
            raise ValueError(f"random: the bounds of player {name!r} are ({low}, {high}); expected low < high.")
    generator = torch.Generator().manual_seed(seed)

    def drawn(leaf: Tensor, low: float, high: float) -> Tensor:
        share = torch.rand(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        return low + (high - low) * share

    return [
        {
            name: map_leaves(lambda leaf, low=low, high=high: drawn(leaf, low, high), game.initial(name))
            for name, (low, high) in bounds.items()
        }
        for _ in range(count)
    ]


def require_player(game: bl.Game, name: str) -> None:
    """Raise `ValueError` for a player that the game does not have."""
    if name not in game.names:
        raise ValueError(f"There is no player {name!r}; players are {list(game.names)}.")
