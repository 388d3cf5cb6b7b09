"""Bounded games as they are shown: the examples, and each solved beside what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel as bl
from games.economics.bounded import Budget, CapacityCournot, SignedContract
from games.economics.network import Network, braess

MARKET = CapacityCournot(9.0, 1.0, (0.0, 1.0), 1.0)
CONTRACT = SignedContract(1.0, 0.5, 1.0, outside=0.1, least=0.0)
TARGETS = Budget((4.0, 3.0, 2.0), (5.0, 2.0, 3.0), (1.0, 0.8, 0.5), 1.0, 2.0)

answer = bl.Implicit(bl.Scipy("SLSQP"))
_bounded = bl.Implicit(bl.Scipy("L-BFGS-B"))
_projected = bl.Implicit(bl.inner.ProjectedGradient(), steps=2000, tolerance=1e-11)


@dataclass(frozen=True, eq=False)
class Row:
    """A number of a solved game beside the one that is known, and how it is known."""

    game: str
    what: str
    found: float
    known: float
    by: str


def solved_contract(contract: SignedContract) -> Tensor:
    """Share and sum."""
    found = bl.solve(contract.game(), effort=_bounded, optimizer=bl.Scipy("SLSQP"), steps=50)
    return found.variables["terms"]  # type: ignore[no-any-return]


def solved_market(market: CapacityCournot) -> bl.Solution:
    """The leader's quantity and its rival's."""
    return bl.solve(market.game(), firm2=_bounded, optimizer=bl.Scipy("L-BFGS-B"), steps=40, starts=3)


def solved_targets(targets: Budget) -> bl.Solution:
    """Coverage and attack."""
    return bl.solve(targets.game(), attack=_projected, optimizer=bl.Scipy("SLSQP"), steps=50, starts=3)


def flows(roads: Network, toll: Tensor) -> Tensor:
    """Path flows at tolls."""
    game = roads.game()
    with torch.no_grad():
        found, _ = answer(game, {"toll": toll}, answer.init(game))
    return torch.cat(list(found))


def rows() -> list[Row]:
    """Every example solved."""
    first, second, _ = MARKET.stackelberg()
    market = solved_market(MARKET)
    share, total, price = CONTRACT.best()
    contract = bl.solve(CONTRACT.game(), effort=_bounded, optimizer=bl.Scipy("SLSQP"), steps=50)
    targets, best = solved_targets(TARGETS), TARGETS.on_a_grid(40)[1]
    roads = braess()
    tolled = bl.solve(roads.game(), flow=answer, optimizer=bl.Scipy("SLSQP"), steps=30)
    closed = "closed form"
    participation = float(contract.multipliers["terms"]["inequality"]["participation"])
    return [
        Row("capacity", "the leader's quantity", float(market.variables["firm1"]), first, closed),
        Row("capacity", "its rival's", float(market.variables["firm2"]), second, closed),
        Row("contract", "share", float(contract.variables["terms"][0]), share, closed),
        Row("contract", "fixed sum", float(contract.variables["terms"][1]), total, closed),
        Row("contract", "price of participation", participation, price, closed),
        Row("guards", "the defender's loss", targets.values["coverage"], best, "a grid of 1/40"),
        Row("Braess", "total time", tolled.values["toll"], 6 * 83.0, closed),
    ]
