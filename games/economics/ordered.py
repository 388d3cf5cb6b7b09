"""One who sets the terms, one who answers: a road toll, and a contract for an agent whose effort is not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

import bilevel as bl


@final
@dataclass(frozen=True)
class TwoRoads:
    r"""Drivers, one unit in all, choose between two roads; the first takes a toll.

        time_i = free_i + congestion_i x_i,    x_1 + x_2 = 1

    Tolls are in units of time. Drivers settle where neither road is better (Wardrop), the minimum over x_1 of the
    potential of Beckmann: the integral of time_1 + toll from 0 to x_1, plus that of time_2 from 0 to 1 - x_1. The
    leader wants revenue, or with `social` the least total time.

    >>> TwoRoads(free=(0.0, 1.0), congestion=(1.0, 0.0)).best_toll()  # Pigou
    0.5
    """

    free: tuple[float, float]
    congestion: tuple[float, float]
    social: bool = False

    def __post_init__(self) -> None:
        if min(self.free) < 0.0 or min(self.congestion) < 0.0 or sum(self.congestion) <= 0.0:
            raise ValueError(
                f"TwoRoads: free={self.free}, congestion={self.congestion}; expected numbers >= 0, and congestion on "
                "one road at least."
            )
        share = float(self.share(torch.tensor(self.best_toll(), dtype=torch.float64)))
        if not 0.0 < share < 1.0:
            raise ValueError(f"TwoRoads: at the best toll a share {share:.3g} takes road 1; expected both roads used.")

    def game(self) -> bl.Game:
        """Players `toll` and `share` (x_1), 0-d, float64."""
        (a1, a2), (b1, b2) = self.free, self.congestion

        def potential(toll: Tensor, share: Tensor) -> Tensor:
            rest = 1.0 - share
            return (a1 + toll) * share + 0.5 * b1 * share**2 + a2 * rest + 0.5 * b2 * rest**2

        def lead(toll: Tensor, share: Tensor) -> Tensor:
            return self.total_time(share) + 0.0 * toll if self.social else -toll * share

        zero = torch.zeros((), dtype=torch.float64)
        return bl.Game(toll=bl.Player(lead, zero), share=bl.Player(potential, zero + 0.5))

    def share(self, toll: Tensor) -> Tensor:
        """x_1 = (free_2 + congestion_2 - free_1 - toll) / (congestion_1 + congestion_2)."""
        return (self.free[1] + self.congestion[1] - self.free[0] - toll) / sum(self.congestion)

    def total_time(self, share: Tensor) -> Tensor:
        """sum_i x_i time_i."""
        (a1, a2), (b1, b2) = self.free, self.congestion
        return share * (a1 + b1 * share) + (1.0 - share) * (a2 + b2 * (1.0 - share))

    def best_toll(self) -> float:
        """For revenue (free_2 + congestion_2 - free_1) / 2; for the least time, where marginal times agree."""
        (a1, a2), (b1, b2) = self.free, self.congestion
        if not self.social:
            return 0.5 * (a2 + b2 - a1)
        share = (a2 - a1 + 2.0 * b2) / (2.0 * (b1 + b2))
        return a2 + b2 - a1 - share * (b1 + b2)


@final
@dataclass(frozen=True)
class Contract:
    r"""A principal pays an agent a fixed sum and a share of what effort yields, without seeing the effort.

        output = effort + noise,   agent: min over effort of cost effort^2 / 2 - share effort
        principal: min over share of -(effort - cost effort^2 / 2 - risk_aversion variance share^2 / 2)

    the fixed sum leaves the agent, of constant absolute risk aversion, just willing, so that the principal bears
    effort's cost and the price of risk. Source: Holmstrom and Milgrom 1987.

    >>> Contract(cost=1.0, risk_aversion=1.0, variance=1.0).share()
    0.5
    """

    cost: float
    risk_aversion: float
    variance: float

    def __post_init__(self) -> None:
        if not (self.cost > 0.0 and self.risk_aversion >= 0.0 and self.variance >= 0.0):
            raise ValueError(f"{self}: expected cost > 0, and risk_aversion and variance >= 0.")

    def game(self) -> bl.Game:
        """Players `share` and `effort`, 0-d, float64."""
        zero = torch.zeros((), dtype=torch.float64)

        def principal(share: Tensor, effort: Tensor) -> Tensor:
            return 0.5 * self.cost * effort**2 + 0.5 * self.risk_aversion * self.variance * share**2 - effort

        def agent(share: Tensor, effort: Tensor) -> Tensor:
            return 0.5 * self.cost * effort**2 - share * effort

        return bl.Game(share=bl.Player(principal, zero), effort=bl.Player(agent, zero + 0.1))

    def share(self) -> float:
        """1 / (1 + risk_aversion cost variance): 1 when risk is free, the whole output is then the agent's."""
        return 1.0 / (1.0 + self.risk_aversion * self.cost * self.variance)

    def effort(self) -> float:
        """share / cost; 1 / cost is the first best."""
        return self.share() / self.cost
