"""Tolls on a road network: drivers choose paths until none is better, some paths are not used at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

import bilevel as bl

Pair = tuple[str, str]


@dataclass(frozen=True)
class Link:
    """A road from one node to another, which takes free + congestion x time units at a flow x."""

    start: str
    end: str
    free: float
    congestion: float


@final
@dataclass(frozen=True)
class Network:
    r"""An operator tolls some roads for the least total time; drivers between pairs of nodes take the best paths.

    Path flows h >= 0 add up to each pair's demand, a simplex whose walls are functions, and minimise Beckmann's
    potential: there all paths that are used cost the same, tolls included, and no other is better (Wardrop 1952). That
    cost is minus the multiplier of "everybody arrives". Different path flows may make the same road flows; `spread`
    times half their squares picks one of them, and moves a path's cost by `spread` h.

    Args:
        links: Roads; no two between the same nodes.
        demands: How many drivers go from a node to another.
        tolled: Roads that take a toll.
        highest: What a toll is at most, in units of time.
        spread: In time units a driver; 0 where path flows are unique.

    >>> braess().equilibrium_costs(torch.tensor([2.0, 2.0, 2.0]))
    tensor([92., 92., 92.], dtype=torch.float64)
    """

    links: tuple[Link, ...]
    demands: Mapping[Pair, float]
    tolled: tuple[Pair, ...]
    highest: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        known = [(link.start, link.end) for link in self.links]
        if len(set(known)) < len(known) or not set(self.tolled) <= set(known):
            raise ValueError(f"Network: tolled={self.tolled}; expected some of the roads {known}, each there once.")
        for pair, demand in self.demands.items():
            if not demand > 0.0 or not self._between(pair):
                raise ValueError(f"Network: demand {demand} for {pair}; expected one above 0, and a path.")

    @cached_property
    def paths(self) -> list[tuple[Pair, tuple[int, ...]]]:
        """Every path without a circle: its pair, and its roads' numbers."""
        return [(pair, path) for pair in self.demands for path in self._between(pair)]

    def _between(self, pair: Pair) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        unfinished: list[tuple[tuple[int, ...], tuple[str, ...]]] = [((), (pair[0],))]
        while unfinished:
            path, seen = unfinished.pop()
            if seen[-1] == pair[1]:
                found.append(path)
                continue
            for number, link in enumerate(self.links):
                if link.start == seen[-1] and link.end not in seen:
                    unfinished.append(((*path, number), (*seen, link.end)))
        return sorted(found)

    @cached_property
    def incidence(self) -> Tensor:
        """1 where a road is on a path, `[roads, paths]`."""
        rows = torch.zeros(len(self.links), len(self.paths), dtype=torch.float64)
        for column, (_, path) in enumerate(self.paths):
            rows[list(path), column] = 1.0
        return rows

    def times(self, flow: Tensor) -> Tensor:
        """How long each road takes `[roads]` at path flows `[paths]`."""
        free, slope = self._roads(flow)
        return free + slope * (self.incidence.to(flow) @ flow)

    def total_time(self, flow: Tensor) -> Tensor:
        """Of all drivers together."""
        return (self.incidence.to(flow) @ flow) @ self.times(flow)

    def equilibrium_costs(self, flow: Tensor, toll: Tensor | None = None) -> Tensor:
        """What each path costs a driver `[paths]`, in time units, at path flows and tolls `[tolled]`."""
        flow = flow.to(torch.float64)
        costs = self.times(flow)
        return self.incidence.T @ (costs if toll is None else costs + self._on_roads(toll.to(torch.float64)))

    def potential(self, toll: Tensor, flow: Tensor) -> Tensor:
        """Beckmann's: the integral of each road's time up to its flow, and what the tolls take."""
        free, slope = self._roads(flow)
        roads = self.incidence.to(flow) @ flow
        tolls = self._on_roads(toll) @ roads
        return (free * roads + 0.5 * slope * roads.square()).sum() + tolls + 0.5 * self.spread * flow.square().sum()

    def game(self) -> bl.Game:
        """Players `toll` `[tolled]`, from half of `highest`, and `flow`, by pair `[paths of it]`; float64."""
        counts = [sum(pair == of for of, _ in self.paths) for pair in self.demands]
        totals = list(self.demands.values())
        init = [torch.full((k,), total / k, dtype=torch.float64) for k, total in zip(counts, totals, strict=True)]
        toll = torch.full((len(self.tolled),), 0.5 * self.highest, dtype=torch.float64)

        def served(flow: list[Tensor]) -> Tensor:
            return torch.stack([part.sum() - total for part, total in zip(flow, totals, strict=True)])

        return bl.Game(
            toll=bl.Player(lambda flow: self.total_time(torch.cat(list(flow))), toll, domain=bl.Box(0.0, self.highest)),
            flow=bl.Player(
                lambda toll, flow: self.potential(toll, torch.cat(list(flow))),
                init,
                inequality={"no flow back": lambda flow: -torch.cat(list(flow))},
                equality={"everybody arrives": served},
            ),
        )

    def _roads(self, like: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([[link.free, link.congestion] for link in self.links], dtype=like.dtype)
        return rows[:, 0], rows[:, 1]

    def _on_roads(self, toll: Tensor) -> Tensor:
        known = [(link.start, link.end) for link in self.links]
        place = torch.zeros(len(self.links), len(self.tolled), dtype=toll.dtype)
        for column, road in enumerate(self.tolled):
            place[known.index(road), column] = 1.0
        return place @ toll


def braess(highest: float = 20.0) -> Network:
    """Braess' four nodes (1968), a toll on the road that harms all: 6 drivers take 92 each with it, and 83 without.

    Without a toll each path carries 2. From a toll of 13 on nobody takes the short cut: 30 + 10 + 13 + 30 = 83.
    """
    roads = [("s", "a", 0, 10), ("s", "b", 50, 1), ("a", "t", 50, 1), ("b", "t", 0, 10), ("a", "b", 10, 1)]
    links = tuple(Link(start, end, float(free), float(slope)) for start, end, free, slope in roads)
    return Network(links, {("s", "t"): 6.0}, (("a", "b"),), highest)


def city(side: int = 4) -> Network:
    """A grid of one-way streets, eastwards and northwards, with wide ones around; 24 roads and 26 paths for 4.

    Two flows of drivers cross in the middle, where three roads take a toll.
    """

    def name(i: int, j: int) -> str:
        return f"{i}{j}"

    links = []
    for i in range(side):
        for j in range(side):
            for di, dj in ((1, 0), (0, 1)):
                if i + di < side and j + dj < side:
                    edge = j in (0, side - 1) if di else i in (0, side - 1)
                    links.append(Link(name(i, j), name(i + di, j + dj), 2.0 if edge else 1.0, 0.2 if edge else 0.6))
    last = side - 1
    demands = {("00", name(last, last)): 6.0, ("10", name(last, last - 1)): 3.0}
    return Network(tuple(links), demands, (("10", "11"), ("11", "21"), ("21", "22")), 4.0, 1e-3)
