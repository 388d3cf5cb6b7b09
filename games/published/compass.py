"""A search without derivatives: a leader's loss jumps where its follower turns to another optimum, and has kinks.

Nothing but the order of values counts. Each coordinate is tried in both directions by a step that is halved where
neither is better (Hooke and Jeeves 1961; Kolda, Lewis and Torczon 2003). In one variable it ends at a kink or a jump as
surely as a line search; in several it may stop on an edge that no coordinate follows.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

import bilevel as bl
from games.published.problem import Problem

KEPT = 1e-7
"""What a point that counts may break the leader's functions by."""


@dataclass(frozen=True)
class Seen:
    """A leader's point with its follower's answer; the value is infinite where there is none."""

    x: Tensor
    y: Tensor | None
    value: float


@dataclass(eq=False)
class Answers:
    """What the leader's loss is where its follower has answered, without derivatives.

    Args:
        problem: It.
        response: How the follower is solved.
        tie: The share of the leader's loss in that of a follower with several optima.
    """

    problem: Problem
    response: bl.Response
    tie: float
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._game = self.problem.game(self.tie)
        self._state = self.response.init(self._game)
        low, high = (torch.tensor(end, dtype=torch.float64) for end in self.problem.box)
        self.low, self.high, self.width = low, high, high - low

    def at(self, x: Tensor) -> Seen:
        """The follower's answer to x; each time from the same start, so that the order of points does not matter."""
        self.count += 1
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", bl.BilevelWarning)
            try:
                y, _ = self.response(self._game, {"x": x}, self._state)
            except bl.BilevelError:
                return Seen(x, None, math.inf)
            broken = 0.0 if self.problem.G is None else float(self.problem.G(x, y).max())
            return Seen(x, y, float(self.problem.F(x, y)) if broken <= KEPT else math.inf)

    def settled(self, start: Seen, *, width: float = 0.05, least: float = 1e-6) -> Seen:
        """Where no step along a coordinate is better, from `width` down to `least`, in parts of the box."""
        best, step = start, width
        rows = [sign * row for row in torch.diag(self.width) for sign in (1.0, -1.0)]
        while step > least:
            for place, row in enumerate(rows):
                x = (best.x + step * row).clamp(self.low, self.high)
                if not torch.equal(x, best.x) and (there := self.at(x)).value < best.value:
                    best = there
                    rows.insert(0, rows.pop(place))  # along here once more
                    break
            else:
                step *= 0.5
        return best


def apart(seen: list[Seen], count: int, width: Tensor) -> list[Seen]:
    """The lowest values, no two nearer to each other than a tenth of the box in every coordinate."""
    found: list[Seen] = []
    for one in sorted((one for one in seen if one.y is not None), key=lambda one: one.value):
        if all(float(((one.x - other.x) / width).abs().max()) > 0.1 for other in found):
            found.append(one)
    return found[:count]
