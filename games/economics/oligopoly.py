"""Firms that choose quantities (Cournot) or prices (Bertrand), all at once or some before the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

import bilevel as bl


def names(count: int) -> tuple[str, ...]:
    """firm1, firm2, ..."""
    return tuple(f"firm{i + 1}" for i in range(count))


def _game(losses: Callable[[Tensor, int], Tensor], count: int) -> bl.Game:
    players = {}
    for i, name in enumerate(names(count)):

        def loss(*, i: int = i, **chosen: Tensor) -> Tensor:
            return losses(torch.stack([chosen[n] for n in names(count)]), i)

        # A Player reads the names of its objective's parameters, and there are as many as firms.
        keywords = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names(count)]
        loss.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        players[name] = bl.Player(loss, torch.zeros((), dtype=torch.float64))
    return bl.Game(**players)


def _check(kind: str, costs: Sequence[float], positive: dict[str, float]) -> None:
    if len(costs) < 2 or min(costs) < 0.0:
        raise ValueError(f"{kind}: costs={costs}; expected those of two firms or more, each >= 0.")
    for name, value in positive.items():
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{kind}: {name}={value}; expected a positive finite number.")


def _interior(kind: str, what: str, values: Tensor) -> Tensor:
    if float(values.min()) <= 0.0:
        driven = [n for n, v in zip(names(len(values)), values.tolist(), strict=True) if v <= 0.0]
        raise ValueError(
            f"{kind}: {', '.join(driven)} would sell {what} <= 0 and be driven out; the closed form holds for firms "
            "that all sell. Leave them out, or lower their costs."
        )
    return values


@final
@dataclass(frozen=True)
class Cournot:
    r"""Firms choose quantities q_i >= 0 of one good, whose price is intercept - slope sum q.

        profit_i = q_i (intercept - slope sum_j q_j - cost_i)

    Quantities in units of the good, prices and unit costs in money; losses are minus profits. Source: Cournot 1838;
    several leaders: Sherali 1984.

    >>> Cournot(10.0, 1.0, (1.0, 1.0)).nash()
    tensor([3., 3.], dtype=torch.float64)
    >>> Cournot(10.0, 1.0, (1.0, 1.0)).stackelberg()
    tensor([4.5000, 2.2500], dtype=torch.float64)
    """

    intercept: float
    slope: float
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        _check("Cournot", self.costs, {"intercept": self.intercept, "slope": self.slope})

    def game(self) -> bl.Game:
        """Players firm1, firm2, ..., each a quantity from 0, float64."""
        costs = torch.tensor(self.costs, dtype=torch.float64)
        return _game(
            lambda q, i: -q[i] * (self.intercept - self.slope * q.sum() - costs[i].to(q)),
            len(self.costs),
        )

    def profits(self, quantities: Tensor) -> Tensor:
        """Each firm's, `[n]`."""
        price = self.intercept - self.slope * quantities.sum()
        return quantities * (price - torch.tensor(self.costs, dtype=torch.float64))

    def consumer_surplus(self, quantities: Tensor) -> Tensor:
        """slope (sum q)^2 / 2."""
        return 0.5 * self.slope * quantities.sum().square()

    def nash(self) -> Tensor:
        """Quantities `[n]`, (intercept - (n + 1) c_i + sum c) / (slope (n + 1)); `ValueError` if one is <= 0."""
        return _interior("Cournot", "a quantity", _cournot(self.intercept, self.slope, self.costs))

    def stackelberg(self, leaders: int = 1) -> Tensor:
        """Quantities `[n]` when the first `leaders` firms move together, and then the others together.

        The m followers leave the price (intercept - slope Q_L + sum of their costs) / (m + 1), so that the leaders play
        Cournot with intercept + that sum, and costs (m + 1) c.
        """
        count = len(self.costs)
        if not 1 <= leaders < count:
            raise ValueError(f"Cournot: leaders={leaders} of {count} firms; expected at least one on either side.")
        first, last = self.costs[:leaders], self.costs[leaders:]
        scale = len(last) + 1
        led = _cournot(self.intercept + sum(last), self.slope, [scale * cost for cost in first])
        follow = _cournot(self.intercept - self.slope * float(led.sum()), self.slope, last)
        return _interior("Cournot", "a quantity", torch.cat([led, follow]))


def _cournot(intercept: float, slope: float, costs: Sequence[float]) -> Tensor:
    c, n = torch.tensor(costs, dtype=torch.float64), len(costs)
    return (intercept - (n + 1) * c + c.sum()) / (slope * (n + 1))


@final
@dataclass(frozen=True)
class Bertrand:
    r"""Firms choose prices p_i of goods that partly replace each other.

        demand_i = alpha - beta p_i + gamma sum_{j != i} p_j,    profit_i = (p_i - cost_i) demand_i

    with beta > gamma (n - 1) >= 0, so that prices that rise together lower demand. Losses are minus profits.

    >>> Bertrand(10.0, 2.0, 1.0, (1.0, 1.0)).nash()  # (alpha + beta c) / (2 beta - gamma)
    tensor([4., 4.], dtype=torch.float64)
    """

    alpha: float
    beta: float
    gamma: float
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        _check("Bertrand", self.costs, {"alpha": self.alpha, "beta": self.beta})
        if not 0.0 <= self.gamma * (len(self.costs) - 1) < self.beta:
            raise ValueError(
                f"Bertrand: gamma={self.gamma}, beta={self.beta}; expected 0 <= gamma (firms - 1) < beta, else demand "
                "grows when everybody raises the price."
            )

    def game(self) -> bl.Game:
        """Players firm1, firm2, ..., each a price from 0, float64."""
        costs = torch.tensor(self.costs, dtype=torch.float64)

        def loss(p: Tensor, i: int) -> Tensor:
            return -(p[i] - costs[i]) * (self.alpha - (self.beta + self.gamma) * p[i] + self.gamma * p.sum())

        return _game(loss, len(self.costs))

    def demands(self, prices: Tensor) -> Tensor:
        """Each firm's, `[n]`."""
        return self.alpha - (self.beta + self.gamma) * prices + self.gamma * prices.sum()

    def profits(self, prices: Tensor) -> Tensor:
        """Each firm's, `[n]`."""
        return (prices - torch.tensor(self.costs, dtype=torch.float64)) * self.demands(prices)

    def nash(self) -> Tensor:
        """Prices `[n]` that solve 2 beta p_i - gamma sum_{j != i} p_j = alpha + beta c_i."""
        prices: Tensor = torch.linalg.solve(self._matrix(len(self.costs)), self._sides())
        _interior("Bertrand", "a quantity", self.demands(prices))
        return prices

    def stackelberg(self) -> Tensor:
        """Prices `[n]` when firm1 sets its price first, and the others answer together.

        They answer u + v p_1, so that firm1 faces the demand D_0 - D_1 p_1 and sets (D_0 / D_1 + c_1) / 2.
        """
        matrix = self._matrix(len(self.costs) - 1)
        u = torch.linalg.solve(matrix, self._sides()[1:])
        v = torch.linalg.solve(matrix, torch.full_like(u, self.gamma))
        base, slope = self.alpha + self.gamma * u.sum(), self.beta - self.gamma * v.sum()
        led = 0.5 * (base / slope + self.costs[0])
        prices = torch.cat([led[None], u + v * led])
        _interior("Bertrand", "a quantity", self.demands(prices))
        return prices

    def _matrix(self, count: int) -> Tensor:
        eye = torch.eye(count, dtype=torch.float64)
        return (2.0 * self.beta + self.gamma) * eye - self.gamma * torch.ones_like(eye)

    def _sides(self) -> Tensor:
        return self.alpha + self.beta * torch.tensor(self.costs, dtype=torch.float64)
