"""Where a run is after a whole step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.game import Buffers
from bilevel.game.data import Position
from bilevel.solving.followers import States
from bilevel.solving.warning_log import Log


@dataclass(frozen=True)
class Moment:
    """Where a run is after a whole step; the leaders' variables and optimisers, which move in place, are apart.

    Args:
        step: how many steps were made.
        states: follower -> its response's state.
        positions: leader -> the place of its next batch.
        drawn: leader -> the place of its last batch.
        buffers: player -> its module's buffers.
        memory: of the dynamics.
        random: the global random numbers' states.
        gradients: of the leaders.
        products: of the dynamics.
        seconds: of the steps.
        warned: the responses' warnings.
        looks: hypergradients by the follower's horizon and by a longer one, which have no verdict yet.
        first: norms of the leaders' gradient in the first step, `[games]`; 0 before it.
        changes: settings that the run was resumed with, other than those that it began with.
        lagrangians: leader with functions -> its multipliers and its penalty.
    """

    states: States
    positions: Mapping[str, Position | None]
    drawn: Mapping[str, Position | None]
    buffers: Buffers
    random: Mapping[str, Tensor]
    step: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    gradients: int = 0
    products: int = 0
    seconds: float = 0.0
    warned: Log = field(default_factory=dict)
    looks: Mapping[str, list[Tensor]] = field(default_factory=dict)
    first: Tensor = field(default_factory=lambda: torch.zeros(1))
    changes: tuple[str, ...] = ()
    lagrangians: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
