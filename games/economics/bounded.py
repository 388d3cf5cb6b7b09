"""Games in which bounds decide: capacities, a contract that must be worth signing, guards within a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import final

import torch
from torch import Tensor

import bilevel as bl
from games.economics.oligopoly import Cournot, names


@final
@dataclass(frozen=True)
class CapacityCournot:
    r"""Cournot's two firms, of whom the second makes at most `capacity`.

    The first leads, knows that a rival at its capacity does not move, and need not deter it.

    >>> CapacityCournot(9.0, 1.0, (0.0, 1.0), 1.0).stackelberg()
    (4.0, 1.0, 2.0)
    """

    intercept: float
    slope: float
    costs: tuple[float, float]
    capacity: float

    def __post_init__(self) -> None:
        if not (self.capacity > 0.0 and self.slope > 0.0 and max(self.costs) < self.intercept):
            raise ValueError(f"{self}: expected capacity and slope > 0, and costs below the intercept.")

    def game(self) -> bl.Game:
        """Players firm1 and firm2, quantities from half of what each may make, float64."""
        market = Cournot(self.intercept, self.slope, self.costs).game()
        highest = (self.intercept / self.slope, self.capacity)
        return bl.Game(
            **{
                name: bl.Player(
                    market.players[name].objective,
                    torch.tensor(0.5 * high, dtype=torch.float64),
                    domain=bl.Box(0.0, high),
                )
                for name, high in zip(names(2), highest, strict=True)
            }
        )

    def answer(self, first: float) -> float:
        """The second firm's, to a quantity of the first."""
        free = 0.5 * ((self.intercept - self.costs[1]) / self.slope - first)
        return min(max(free, 0.0), self.capacity)

    def profit(self, first: float) -> float:
        """The first firm's, the second having answered."""
        return first * (self.intercept - self.costs[0] - self.slope * (first + self.answer(first)))

    def stackelberg(self) -> tuple[float, float, float]:
        """Both quantities, and what another unit of capacity is worth to the second firm.

        The profit is a parabola while the rival is at its capacity, another while it answers, and a third once it is
        gone; the best is a vertex of one of them, or where two meet.
        """
        room, rival = (self.intercept - self.costs[0]) / self.slope, (self.intercept - self.costs[1]) / self.slope
        vertices = [0.5 * (room - self.capacity), room - 0.5 * rival, 0.5 * room]
        meets = [rival - 2.0 * self.capacity, rival]
        first = max((max(q, 0.0) for q in (*vertices, *meets)), key=self.profit)
        second = self.answer(first)
        worth = self.slope * (rival - first - 2.0 * second)
        return first, second, worth if second == self.capacity else 0.0


@final
@dataclass(frozen=True)
class SignedContract:
    r"""A principal pays a fixed sum t and a share s of the output; the agent signs only if that beats its way out.

        agent: min over effort of cost effort^2 / 2 - s effort,    principal: min over (s, t) of t - (1 - s) effort
        participation: t + s effort - cost effort^2 / 2 - risk_aversion variance s^2 / 2 >= outside
        limited liability: t >= least

    The incentive is the follower's optimum and participation a function of the leader's, neither of them a penalty.
    Source: Holmstrom and Milgrom 1987; Innes 1990 for limited liability.

    >>> SignedContract(1.0, 0.0, 1.0, outside=0.5, least=-1.0).best()  # share, sum, multiplier of participation
    (1.0, 0.0, 1.0)
    """

    cost: float
    risk_aversion: float
    variance: float
    outside: float
    least: float

    def __post_init__(self) -> None:
        if not (self.cost > 0.0 and self.risk_aversion >= 0.0 and self.variance >= 0.0 and self.gain > 0.0):
            raise ValueError(f"{self}: expected cost > 0, and risk_aversion variance within 0 and 1 / cost.")

    @property
    def gain(self) -> float:
        """What a share squared is worth to the agent, twice: 1 / cost - risk_aversion variance."""
        return 1.0 / self.cost - self.risk_aversion * self.variance

    def game(self) -> bl.Game:
        """Players `terms`, a share and a sum, and `effort`, float64."""
        low = torch.tensor([0.0, self.least], dtype=torch.float64)
        high = torch.tensor([1.0, math.inf], dtype=torch.float64)
        start = torch.tensor([0.9, max(self.least, self.outside) + 0.1], dtype=torch.float64)
        risk = self.risk_aversion * self.variance

        def principal(terms: Tensor, effort: Tensor) -> Tensor:
            return terms[1] - (1.0 - terms[0]) * effort

        def agent(terms: Tensor, effort: Tensor) -> Tensor:
            return 0.5 * self.cost * effort.square() - terms[0] * effort

        def participation(terms: Tensor, effort: Tensor) -> Tensor:
            return self.outside - terms[1] + agent(terms, effort) + 0.5 * risk * terms[0].square()

        effort = torch.tensor(0.5, dtype=torch.float64)
        return bl.Game(
            terms=bl.Player(principal, start, domain=bl.Box(low, high), inequality={"participation": participation}),
            effort=bl.Player(agent, effort, domain=bl.constraints.NonNegative()),
        )

    def best(self) -> tuple[float, float, float]:
        """Share, sum, and what the principal pays for a unit more of the agent's way out.

        Where the sum is free it takes all that the agent has above its way out. Where it is at its least either both
        bind, or the agent keeps a rent.
        """
        share = 1.0 / (1.0 + self.risk_aversion * self.cost * self.variance)
        total = self.outside - 0.5 * self.gain * share**2
        if total >= self.least:
            return share, total, 1.0
        # With the sum at its least: the principal's loss s^2 / c - s / c, and participation from a share on.
        needed = math.sqrt(max(0.0, 2.0 * (self.outside - self.least) / self.gain))
        if needed <= 0.5:
            return 0.5, self.least, 0.0
        return needed, self.least, (2.0 * needed - 1.0) / (self.cost * self.gain * needed)


@final
@dataclass(frozen=True)
class Budget:
    r"""Guards with unequal wages within a budget, and an attacker who spreads effort over targets.

        attacker: min over the simplex of weight |a|^2 / 2 - sum_i a_i prize_i (1 - c_i)
        defender: min over 0 <= c <= 1 of sum_i a_i value_i (1 - c_i),    wages'c <= budget

    `weight` is how fast a target's yield falls with the effort spent on it; targets that yield too little get none.

    >>> Budget((4.0, 2.0), (4.0, 2.0), (1.0, 1.0), 1.0, 8.0).attack(torch.tensor([0.5, 0.5]))
    tensor([0.5625, 0.4375])
    """

    prize: tuple[float, ...]
    value: tuple[float, ...]
    wages: tuple[float, ...]
    budget: float
    weight: float

    def __post_init__(self) -> None:
        if {len(self.value), len(self.wages)} != {len(self.prize)} or not self.weight > 0.0:
            raise ValueError(f"{self}: expected as many values and wages as prizes, and weight > 0.")
        if not 0.0 < self.budget < sum(self.wages):
            raise ValueError(f"{self}: expected a budget above 0 that does not pay for guards everywhere.")

    def attack(self, coverage: Tensor) -> Tensor:
        """The attacker's effort `[n]`: yields over `weight`, projected onto the simplex."""
        yields = torch.tensor(self.prize, dtype=coverage.dtype) * (1.0 - coverage)
        return bl.Simplex(1.0).project(yields / self.weight)  # type: ignore[no-any-return]

    def loss(self, coverage: Tensor, attack: Tensor) -> Tensor:
        """What the defender expects to lose."""
        return attack @ (torch.tensor(self.value, dtype=coverage.dtype) * (1.0 - coverage))

    def game(self) -> bl.Game:
        """Players `coverage` `[n]` and `attack` `[n]`, float64."""
        n = len(self.prize)
        even = torch.full((n,), self.budget / sum(self.wages), dtype=torch.float64)

        def strike(coverage: Tensor, attack: Tensor) -> Tensor:
            yields = torch.tensor(self.prize, dtype=coverage.dtype) * (1.0 - coverage)
            return 0.5 * self.weight * attack @ attack - attack @ yields

        def spent(coverage: Tensor) -> Tensor:
            return torch.tensor(self.wages, dtype=coverage.dtype) @ coverage - self.budget

        return bl.Game(
            coverage=bl.Player(self.loss, even, domain=bl.Box(0.0, 1.0), inequality={"budget": spent}),
            attack=bl.Player(strike, torch.full((n,), 1.0 / n, dtype=torch.float64), domain=bl.Simplex(1.0)),
        )

    def on_a_grid(self, count: int) -> tuple[Tensor, float]:
        """The best coverage in multiples of 1 / `count`, the last as much as the budget pays for, and its loss."""
        ticks = torch.linspace(0.0, 1.0, count + 1, dtype=torch.float64).tolist()
        best, lowest = torch.zeros(len(self.prize), dtype=torch.float64), math.inf
        for first in product(ticks, repeat=len(self.prize) - 1):
            left = self.budget - sum(w * c for w, c in zip(self.wages, first, strict=False))
            if left < 0.0:
                continue
            coverage = torch.tensor([*first, min(1.0, left / self.wages[-1])], dtype=torch.float64)
            found = float(self.loss(coverage, self.attack(coverage)))
            if found < lowest:
                best, lowest = coverage, found
        return best, lowest
