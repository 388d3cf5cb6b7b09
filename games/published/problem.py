"""A bilevel problem as its paper states it, and as a game."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel as bl

Function = Callable[[Tensor, Tensor], Tensor]
"""Of the leader's x `[n]` and the follower's y `[m]`."""

Numbers = tuple[float, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """min F(x, y) over x in a box with G(x, y) <= 0, where y minimises f(x, .) over a box with g(x, y) <= 0.

    Args:
        name: Authors, year, and the number of the example there.
        source: Where it was published.
        F: The leader's loss.
        f: The follower's loss.
        box: The bounds of x, each end by entry. Ends that the paper leaves open are wide ones.
        y_box: The bounds of y; infinite where there are none.
        G: The leader's functions, `[k]`; None without.
        g: The follower's functions, `[l]`; None without.
        best: The best known leader value.
        x: The published solution.
        y: The follower's there.
        y_start: Where the follower begins.
        ties: Whether the follower has several optima where it matters; then the one that the leader likes best counts.
        convex: Whether the follower is convex in y; else its global optimum must be searched for.
        linear: Whether all is linear in y.
    """

    name: str
    source: str
    F: Function
    f: Function
    box: tuple[Numbers, Numbers]
    y_box: tuple[Numbers, Numbers]
    best: float
    x: Numbers
    y: Numbers
    G: Function | None = None
    g: Function | None = None
    y_start: Numbers | None = None
    ties: bool = False
    convex: bool = True
    linear: bool = False

    @property
    def dimensions(self) -> tuple[int, int]:
        """Variables of the leader and of the follower."""
        return len(self.x), len(self.y)

    def lower(self, x: Tensor, y: Tensor) -> Tensor:
        """What the follower must keep <= 0: its functions, and the bounds of y that are finite."""
        low, high = (torch.tensor(end, dtype=y.dtype) for end in self.y_box)
        parts = [] if self.g is None else [self.g(x, y)]
        return torch.cat([*parts, (low - y)[torch.isfinite(low)], (y - high)[torch.isfinite(high)]])

    def game(self, tie: float) -> bl.Game:
        """The game; where there are ties, the follower's loss gets `tie` times the leader's."""
        weight = tie if self.ties else 0.0
        low, high = (torch.tensor(end, dtype=torch.float64) for end in self.box)

        def follow(x: Tensor, y: Tensor) -> Tensor:
            return self.f(x, y) + (weight * self.F(x, y) if weight else 0.0)

        def lead(x: Tensor, y: Tensor) -> Tensor:
            return self.F(x, y)

        def upper(x: Tensor, y: Tensor) -> Tensor:
            assert self.G is not None
            return self.G(x, y)

        def lower(x: Tensor, y: Tensor) -> Tensor:
            return self.lower(x, y)

        start = torch.tensor(self.y_start or (1.0,) * len(self.y), dtype=torch.float64)
        return bl.Game(
            x=bl.Player(
                lead, 0.5 * (low + high), domain=bl.Box(low, high), inequality=None if self.G is None else upper
            ),
            y=bl.Player(follow, start, inequality=lower),
        )


def stacked(*values: Tensor) -> Tensor:
    """0-d tensors as one `[k]`."""
    return torch.stack(values)
