"""Where a process expects the least loss: within a region, away from points that are waited for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.search.process import Process
from bilevel.search.space import Space

CANDIDATES, REFINED, GRID, SWAPS, ROUNDS = 512, 4, 4096, 16, 4
"""Random points of a region, how many of them are refined; points of a region without ranges that are all looked at;
other options looked at in place of one, and how often these take turns with the ranges."""
DOUBT = 1.0
"""How many standard deviations better than the best point's options others may turn out to be: no slope tells of them,
and the mean alone would hold on to the first that was tried."""


@dataclass(frozen=True)
class Region:
    """A box of `low, high: [d]` around a point; for each column that is a choice the ranks of the options in reach."""

    space: Space
    centre: Tensor
    low: Tensor
    high: Tensor
    ranks: Mapping[int, Sequence[int]]

    @classmethod
    def around(cls, space: Space, centre: Tensor, width: float) -> Region:
        """Of a half-width around a point; all of a category's options, and a number's neighbours at least."""
        low, high = (centre - width).clamp(min=0.0), (centre + width).clamp(max=1.0)
        ranks: dict[int, Sequence[int]] = {}
        for i, axis in space.options.items():
            ranks[i] = axis.within(float(low[i]), float(high[i]), float(centre[i]))
            low[i], high[i] = (axis.of_rank(ranks[i][end]) for end in (0, -1))
        return cls(space, centre, low, high, ranks)

    @property
    def is_finite(self) -> bool:
        """Whether all columns are choices."""
        return len(self.ranks) == len(self.low)

    def widened(self) -> Region:
        """All options; the ranges as they are."""
        return Region(
            self.space, self.centre, self.low, self.high, {i: range(a.count) for i, a in self.space.options.items()}
        )

    def places(self, generator: torch.Generator) -> Tensor:
        """Points `[m, d]`: all where these are few, else random ones."""
        if self.is_finite and math.prod(len(ranks) for ranks in self.ranks.values()) <= GRID:
            columns = [
                [self.space.options[i].of_rank(rank) for rank in ranks] for i, ranks in sorted(self.ranks.items())
            ]
            return torch.tensor(list(itertools.product(*columns)), dtype=torch.float64)
        shares = torch.rand(CANDIDATES, len(self.low), generator=generator, dtype=torch.float64)
        found = self.low + (self.high - self.low) * shares
        for i, ranks in self.ranks.items():
            drawn = (shares[:, i] * len(ranks)).long().tolist()
            found[:, i] = torch.tensor([self.space.options[i].of_rank(ranks[j]) for j in drawn], dtype=torch.float64)
        return found

    def swapped(self, place: Tensor, column: int) -> Tensor:
        """The point `[m, d]` with other options in one column: all that are in reach, or the nearest by rank."""
        axis, ranks = self.space.options[column], self.ranks[column]
        if len(ranks) > SWAPS:
            own = axis.rank(float(place[column]))
            ranks = [rank for rank in range(own - SWAPS // 2, own + SWAPS // 2 + 1) if rank in ranks]
        found = place.repeat(len(ranks), 1)
        found[:, column] = torch.tensor([axis.of_rank(rank) for rank in ranks], dtype=torch.float64)
        return found


@dataclass(frozen=True)
class Cost:
    """The mean, and a bump of height `spread` around each of the points that are taken, as wide as `reach: [d]`."""

    process: Process
    categories: Tensor
    taken: Sequence[Tensor]
    spread: float
    reach: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """At `x: [m, d]`, with its slopes `[m, d]`; those of choices mean nothing."""
        mean, slope = self.process.mean(x)
        for other in self.taken:
            apart = x - other
            same = (~((apart != 0.0) & self.categories).any(1)).double()
            apart = apart.masked_fill(self.categories, 0.0)
            bump = self.spread * same * (-0.5 * (apart / self.reach).square().sum(1)).exp()
            mean, slope = mean + bump, slope - bump[:, None] * apart / self.reach.square()
        return mean, slope


def least(
    process: Process, region: Region, told: Sequence[Tensor], taken: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """The point `[d]` of least mean in a region, away from the points that are taken.

    In a space of choices alone no point comes twice, neither one that was told, until all have been tried.
    """
    seen = {tuple(place.tolist()) for place in (*told, *taken)} if region.is_finite else set()
    places = _fresh(region.places(generator), seen)
    if not len(places):
        region = region.widened()
        places = _fresh(region.places(generator), seen)
    if not len(places):
        seen, places = set(), region.places(generator)
    spread = float(process.mean(places)[0].std(correction=0))
    reach = 0.25 * (region.high - region.low)
    cost = Cost(process, region.space.categories, taken, spread, reach.clamp(min=1e-12))
    starts = places[cost(places)[0].argsort()[:REFINED]]
    ends = [_refined(start, cost, region, seen) for start in starts]
    end = ends[int(torch.cat([cost(end[None])[0] for end in ends]).argmin())]
    return _hoped(end, cost, region, seen)


def _hoped(end: Tensor, cost: Cost, region: Region, seen: set[tuple[float, ...]]) -> Tensor:
    """The point with the options of the least mean less `DOUBT` deviations from what the centre's would give."""
    columns = list(region.ranks)
    known = end.clone()
    known[columns] = region.centre[columns]
    found = [end[None], *(region.swapped(place, column) for place in (end, known) for column in columns)]
    there = _fresh(torch.cat(found), seen)
    if not columns or not len(there):
        return end
    beside = there.clone()
    beside[:, columns] = region.centre[columns]
    chosen = there[int((cost(there)[0] - DOUBT * cost.process.doubt(there, beside)).argmin())]
    return chosen if region.is_finite else _descended(chosen, cost, region)


def _fresh(places: Tensor, seen: set[tuple[float, ...]]) -> Tensor:
    return places[[tuple(place) not in seen for place in places.tolist()]] if seen else places


def _refined(start: Tensor, cost: Cost, region: Region, seen: set[tuple[float, ...]]) -> Tensor:
    """A local optimum: the ranges by the slope, then each choice by looking, until nothing changes."""
    here = start
    for _ in range(ROUNDS if region.ranks else 1):
        before = here
        if not region.is_finite:
            here = _descended(here, cost, region)
        for column in region.ranks:
            others = _fresh(region.swapped(here, column), seen)
            if len(others):
                here = others[int(cost(others)[0].argmin())]
        if bool((here == before).all()):
            break
    return here


def _descended(start: Tensor, cost: Cost, region: Region) -> Tensor:
    from scipy.optimize import minimize  # noqa: PLC0415

    fixed = torch.zeros(len(start), dtype=torch.bool)
    fixed[list(region.ranks)] = True
    low, high = torch.where(fixed, start, region.low), torch.where(fixed, start, region.high)

    def flat(x: Any) -> tuple[float, Any]:
        value, slope = cost(torch.as_tensor(x)[None])
        return float(value), slope[0].masked_fill(fixed, 0.0).numpy()

    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    end = minimize(flat, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
    return torch.as_tensor(end.x).clamp(low, high)
