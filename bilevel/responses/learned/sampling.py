"""Where the others are while a map is fitted: the distribution p(x) over which its expected loss is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.errors import require_kinds
from bilevel.game import Follower
from bilevel.responses.learned.ranges import Ranges
from bilevel.tree import Variables, flatten

DrawFunction = Callable[[Mapping[str, Variables], torch.Generator], Mapping[str, Variables]]
"""From the others' present variables and a generator to one draw of their variables."""


class Sampler(ABC):
    """The others' values that a learned map is fitted at, drawn anew in each step of fitting.

    `Perturbations` are the usual ones; `Draws(function)` take them from any distribution.
    """

    @property
    @abstractmethod
    def local(self) -> bool:
        """Whether they are drawn around the others' present variables; the map's centre then moves along."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many values a step of fitting uses; each costs a gradient."""

    @abstractmethod
    def points(self, follower: Follower, x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        """Values `[rows, n]` for one step, when the others play `x: [n]`; `scale` is the response's.

        Both are free coordinates where a player has a range: `Ranges.of(follower)` maps to natural values and back.
        """


@final
@dataclass(frozen=True)
class Perturbations(Sampler):
    r"""Gaussian perturbations of the others' present variables, or of fixed ones; of a range's free coordinates.

    $$
    x = x_0 + \sigma \varepsilon, \qquad \varepsilon \sim N(0, I), \qquad \sigma = \text{scale of the response}.
    $$

    A step of fitting costs `count` gradients of the follower, twice as many when antithetic: in one vmapped pass, or
    one after the other for a `LeafNetwork` or where there are buffers. Raises `ValueError` for a count below 1.

    Args:
        count: draws in each step; more of them are less noise in w0 and in the slope.
        antithetic: each draw comes with its negative, which takes the gradient at the centre out of the slope's noise.
        around: the values to perturb, by player: for one map over a fixed range. By default the others' present ones,
            which asks of the map no more than a slope.

    Examples:
        >>> Perturbations(count=5, antithetic=False).rows
        5
    """

    count: int = 1
    antithetic: bool = True
    around: Mapping[str, Variables] | None = None

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.count < 1:
            raise ValueError(f"Perturbations: count={self.count}; expected at least 1.")

    @property
    def local(self) -> bool:
        """Unless they are `around` something."""
        return self.around is None

    @property
    def rows(self) -> int:
        """One for each sign."""
        return 2 * self.count if self.antithetic else self.count

    def points(self, follower: Follower, x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        """Those of one sign, then those of the other."""
        noise = torch.randn(self.count, x.numel(), generator=generator, dtype=x.dtype, device=x.device)
        noise = torch.cat([noise, -noise]) if self.antithetic else noise
        return (x if self.around is None else self._anchor(follower, x)) + scale * noise

    def _anchor(self, follower: Follower, x: Tensor) -> Tensor:
        fixed: Mapping[str, Variables] = self.around or {}
        names = list(follower.input_form.unflatten(x))
        missing = [name for name in names if name not in fixed]
        if missing:
            raise ValueError(f"Perturbations: around= names {sorted(fixed)}; values of {missing} are missing.")
        for name in names:
            follower.game.check(name, fixed[name])
        return Ranges.of(follower).free(flatten({name: fixed[name] for name in names}).to(x))


@final
@dataclass(frozen=True)
class Draws(Sampler):
    """Draws from any distribution: uniform over a box, a fixed set, a distribution that the leaders themselves hold.

    The map's centre stays where the game starts, and the response's `scale` is only the unit of the network's inputs:
    take the draws' standard deviation. `function(others, generator)` draws the others' variables once, from the
    generator that it is given and nothing else, so that a run can be resumed. Raises `ValueError` for a count below 1,
    and in the call for a draw of other players or shapes.

    Args:
        function: one draw, by player.
        count: draws in each step of fitting, each of which costs a gradient.

    Examples:
        >>> def box(others, generator):
        ...     return {"decay": 6 * torch.rand(10, generator=generator) - 3}
        >>> Draws(box, count=10).rows
        10
    """

    function: DrawFunction
    count: int = 1

    def __post_init__(self) -> None:
        require_kinds(self)
        if not callable(self.function):
            raise TypeError(f"Draws: function={self.function!r}; expected a function of (others, generator).")
        if self.count < 1:
            raise ValueError(f"Draws: count={self.count}; expected at least 1.")

    @property
    def local(self) -> bool:
        """Never: how far they lie is the function's affair."""
        return False

    @property
    def rows(self) -> int:
        """`count`."""
        return self.count

    def points(self, follower: Follower, x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        """One after the other."""
        ranges = Ranges.of(follower)
        present = follower.input_form.unflatten(ranges.natural(x))
        rows = [self.function(present, generator) for _ in range(self.count)]
        for row in rows:
            if set(row) != set(present):
                raise ValueError(f"Draws: the function drew players {sorted(row)}; expected {sorted(present)}.")
            for name, variables in row.items():
                follower.game.check(name, variables)
        return ranges.free(torch.stack([flatten({name: row[name] for name in present}) for row in rows]).to(x))
