"""Games in which bounds decide: play against closed forms, brute force and shortest paths."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

import bilevel as bl
from games.economics.bounded import Budget, CapacityCournot, SignedContract
from games.economics.network import Link, Network, braess, city

D = torch.float64
EPS = torch.finfo(D).eps
SLSQP = bl.Implicit(bl.Scipy("SLSQP"))
NEAREST = bl.Implicit(bl.inner.ProjectedGradient(), steps=2000, tolerance=1e-11)
DIRECT = bl.Scipy("SLSQP")
FIRM = bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-10)


def left(drop, curvature):
    """How far from its optimum a search may end that stops where the loss falls by no more than `drop`.

    The loss is a parabola of this curvature: what is still to fall is then no more than a few times what the last step
    brought, 16 times say, and it falls by curvature / 2 times the distance squared.
    """
    return math.sqrt(2.0 * 16.0 * drop / curvature)


# What `solve` tells SciPy in float64: SLSQP ends at a fall of eps ** .65, and keeps functions to that; L-BFGS-B at one
# of 10 eps of the loss.
SLSQP_DROP, LBFGS_DROP = EPS**0.65, 10.0 * EPS


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.4, 3.0])
def test_a_rival_with_a_capacity(capacity):
    market = CapacityCournot(9.0, 1.0, (0.0, 1.0), capacity)
    first, second, worth = market.stackelberg()
    grid = torch.linspace(0.0, 9.0, 9001).tolist()
    assert market.profit(first) >= max(market.profit(q) for q in grid) - 1e-12
    at = {"firm1": torch.tensor(first, dtype=D), "firm2": torch.tensor(second, dtype=D)}
    assert bl.certify(market.game(), at), str(bl.certify(market.game(), at))
    solution = bl.solve(market.game(), firm2=FIRM, optimizer=bl.Scipy("L-BFGS-B"), steps=40, starts=3)
    # The profit is a parabola around each of these optima: its curvature is 2 with a rival at its capacity, else 1.
    assert abs(float(solution.variables["firm1"]) - first) < left(LBFGS_DROP * market.profit(first), 1.0)
    assert (first, second, worth) == (4.0, 1.0, 2.0) or capacity != 1.0


CONTRACTS = {
    "the sum is free": SignedContract(1.0, 0.5, 1.0, outside=0.2, least=-1.0),
    "both bind": SignedContract(1.0, 0.5, 1.0, outside=0.1, least=0.0),
    "the agent keeps a rent": SignedContract(1.0, 0.5, 1.0, outside=0.0, least=0.0),
}


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
def test_contracts_that_must_be_worth_signing(contract):
    share, total, price = contract.best()
    at = {"terms": torch.tensor([share, total], dtype=D), "effort": torch.tensor(share / contract.cost, dtype=D)}
    certificate = bl.certify(contract.game(), at)
    assert certificate, str(certificate)
    away = {**at, "terms": at["terms"] + torch.tensor([0.05, 0.05])}
    away["effort"] = away["terms"][0] / contract.cost
    assert bl.certify(contract.game(), away).standing.value == "refuted"
    with warnings.catch_warnings():
        # At a corner of two bounds SLSQP is at its optimum to rounding, and may still try steps to the end.
        warnings.simplefilter("ignore", bl.errors.NonConvergenceWarning)
        found = bl.solve(contract.game(), effort=FIRM, optimizer=DIRECT, steps=50)
    # Along participation the loss is -s / c + (1 / c + risk) s^2 / 2, of curvature 1.5; with the sum at its least,
    # s^2 - s, of 2. The sum follows the share by a slope of at most 1.
    ends = left(SLSQP_DROP, 1.5)
    assert (found.variables["terms"] - at["terms"]).abs().max() < ends
    # A multiplier is a slope of the Lagrangian over one of participation's, which is 1 in the sum: it is off by what
    # their second derivatives, 2 and the price times 1.5, make of that, in two entries.
    assert abs(float(found.multipliers["terms"]["inequality"]["participation"]) - price) < 2.0 * (2.0 + 1.5) * ends


def test_guards_within_a_budget_against_every_coverage_of_a_grid():
    targets = Budget((4.0, 3.0, 2.0), (5.0, 2.0, 3.0), (1.0, 0.8, 0.5), 1.0, 2.0)
    _, best = targets.on_a_grid(40)
    found = bl.solve(targets.game(), attack=NEAREST, optimizer=DIRECT, steps=50, starts=3)
    assert float(found.variables["coverage"] @ torch.tensor(targets.wages, dtype=D)) <= 1.0 + SLSQP_DROP
    value = float(targets.loss(found.variables["coverage"], found.variables["attack"]))
    # The attacker's loss has curvature 2, and its gradient is left at 1e-11 of what it was, at most 4.
    assert (found.variables["attack"] - targets.attack(found.variables["coverage"])).abs().max() < 1e-10
    # The grid's best is no better than the best, and 16 falls of the size of the last are not missed.
    assert value <= best + 16.0 * SLSQP_DROP


def test_braess():
    roads = braess()
    two = torch.full((3,), 2.0, dtype=D)
    assert float(roads.total_time(two)) == 6 * 92.0
    flow, _ = SLSQP(roads.game(), {"toll": torch.zeros(1, dtype=D)}, SLSQP.init(roads.game()))
    assert (flow[0] - 2.0).abs().max() < 1e-9
    free = bl.solve(roads.game(), flow=SLSQP, optimizer=DIRECT, steps=30)
    # From a toll of 13 on nobody takes the new road, and the total is flat: the search cannot stop short of it by more
    # than its falls. Up to 13 the total falls by at least 1 for each unit of toll near there.
    assert abs(float(roads.total_time(free.variables["flow"][0])) - 6 * 83.0) < 16.0 * SLSQP_DROP
    assert float(free.variables["toll"]) >= 13.0 - 16.0 * SLSQP_DROP


@pytest.mark.slow
def test_a_city_is_at_rest_on_its_shortest_paths():
    roads = city()
    assert len(roads.links) == 24 and len(roads.paths) == 26
    solved = bl.solve(roads.game(), flow=SLSQP, optimizer=DIRECT, steps=25)
    flow = torch.cat(list(solved.variables["flow"]))
    toll = solved.variables["toll"]
    before, _ = SLSQP(roads.game(), {"toll": torch.zeros(3, dtype=D)}, SLSQP.init(roads.game()))
    assert float(roads.total_time(flow)) < float(roads.total_time(torch.cat(list(before)))) - 1e-3
    costs = roads.times(flow) + roads._on_roads(toll)
    nodes = sorted({link.start for link in roads.links} | {link.end for link in roads.links})
    graph = np.zeros((len(nodes), len(nodes)))
    for link, cost in zip(roads.links, costs.tolist(), strict=True):
        graph[nodes.index(link.start), nodes.index(link.end)] = cost
    of_paths = roads.equilibrium_costs(flow, toll)
    for pair in roads.demands:
        shortest = dijkstra(csr_array(graph), indices=nodes.index(pair[0]))[nodes.index(pair[1])]
        mine = torch.tensor([of == pair for of, _ in roads.paths])
        used = mine & (flow > 1e-6)
        # `spread` times a path's flow is what a path may cost more.
        assert float(of_paths[used].max()) <= shortest + roads.spread * 6.0 + 1e-8


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="tolled=.*expected some of the roads"):
        Network((Link("a", "b", 1.0, 1.0),), {("a", "b"): 1.0}, (("b", "a"),), 1.0)
    with pytest.raises(ValueError, match="and a path"):
        Network((Link("a", "b", 1.0, 1.0),), {("b", "a"): 1.0}, (), 1.0)
    with pytest.raises(ValueError, match="costs below the intercept"):
        CapacityCournot(1.0, 1.0, (2.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="a budget above 0"):
        Budget((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), 3.0, 1.0)
