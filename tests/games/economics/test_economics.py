"""Oligopolies, tolls and contracts: play against closed forms, and closed forms against plain facts."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import optim

import bilevel as bl
from games.economics.oligopoly import Bertrand, Cournot, names
from games.economics.ordered import Contract, TwoRoads

D = torch.float64
MARKETS = {
    "Cournot of 2": Cournot(10.0, 1.0, (1.0, 2.0)),
    "Cournot of 4": Cournot(12.0, 0.5, (1.0, 1.5, 0.5, 2.0)),
    "Bertrand of 2": Bertrand(10.0, 2.0, 1.0, (1.0, 2.0)),
    "Bertrand of 3": Bertrand(8.0, 2.0, 0.5, (1.0, 0.5, 2.0)),
}


def chosen(solution, count):
    flat = {**solution.variables, **solution.variables.get("rest", {})}
    return torch.stack([flat[name] for name in names(count)])


@pytest.mark.parametrize("market", MARKETS.values(), ids=MARKETS)
def test_without_responses_play_ends_at_nash(market):
    game, count = market.game(), len(market.costs)
    solution = bl.solve(game, optimizer=partial(optim.SGD, lr=0.2), steps=400)
    assert torch.allclose(chosen(solution, count), market.nash(), atol=1e-8)
    assert bl.certify_nash(game, solution)
    assert bl.exploitability(game, solution, restarts=1).nash_conv < 1e-10
    assert torch.allclose(
        torch.stack([-torch.tensor(v).double() for v in solution.values.values()]), market.profits(market.nash())
    )


PAIR = bl.Implicit(bl.ScipyRoot(), steps=200, tolerance=1e-11, linear_solver=bl.linear.Dense())


# Nine tenths of one over the leader's total curvature: each step leaves a tenth of the error.
RATES = {"Cournot of 2": 0.9, "Cournot of 4": 3.6, "Bertrand of 2": 0.257, "Bertrand of 3": 0.242}


@pytest.mark.parametrize("name", MARKETS)
def test_with_one_for_the_others_it_ends_at_stackelberg(name):
    market = MARKETS[name]
    game, count = market.game(), len(market.costs)
    others = names(count)[1:]
    if count == 2:
        responses = {"firm2": PAIR}
    else:
        game, responses = game.joined(rest=others), {"rest": PAIR}
    solution = bl.solve(game, optimizer=partial(optim.SGD, lr=RATES[name]), steps=25, **responses)
    wanted = market.stackelberg()
    assert torch.allclose(chosen(solution, count), wanted, atol=1e-8)
    assert float(market.profits(wanted)[0]) >= float(market.profits(market.nash())[0]) - 1e-12


@pytest.mark.parametrize(
    "leaders", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_any_number_on_either_side(leaders):
    market = MARKETS["Cournot of 4"]
    game, rest = market.game(), names(4)[leaders:]
    response = {rest[0]: PAIR} if len(rest) == 1 else {"rest": PAIR}
    game = game if len(rest) == 1 else game.joined(rest=rest)
    # Leaders' slopes are s (1 + 11'), s = .5 / (followers + 1), so that a step leaves at most 1 - .5 / 6 of the error.
    solution = bl.solve(game, optimizer=partial(optim.SGD, lr=0.5), steps=300, **response)
    assert torch.allclose(chosen(solution, 4), market.stackelberg(leaders), atol=1e-8)


@settings(max_examples=50, deadline=None)
@given(st.floats(10, 20), st.floats(0.2, 3), st.lists(st.floats(0, 0.5), min_size=2, max_size=4))
def test_facts_of_cournot(intercept, slope, costs):
    market = Cournot(intercept, slope, tuple(costs))
    nash, led = market.nash(), market.stackelberg()
    # At Nash profit is slope q^2; a leader gains, and consumers gain with it.
    assert torch.allclose(market.profits(nash), slope * nash**2)
    assert float(market.profits(led)[0]) >= float(market.profits(nash)[0]) - 1e-9
    assert float(market.consumer_surplus(led)) >= float(market.consumer_surplus(nash)) - 1e-9


def test_who_would_be_driven_out_is_named():
    with pytest.raises(ValueError, match="firm2 would sell a quantity <= 0"):
        Cournot(4.0, 1.0, (0.0, 3.0)).nash()
    with pytest.raises(ValueError, match="firm2 would sell"):
        Bertrand(1.0, 2.0, 0.1, (0.1, 5.0)).nash()
    for wrong in (
        lambda: Cournot(0.0, 1.0, (1.0, 1.0)),
        lambda: Cournot(1.0, 1.0, (1.0,)),
        lambda: Bertrand(1.0, 1.0, 1.0, (0.1, 0.1)),
        lambda: Cournot(9.0, 1.0, (1.0, 1.0)).stackelberg(2),
        lambda: TwoRoads((0.0, 9.0), (1.0, 0.0)),
        lambda: TwoRoads((0.0, 1.0), (0.0, 0.0)),
        lambda: Contract(0.0, 1.0, 1.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


# A zero of the gradient, not a minimum of the loss: that is flat to 1e-8 around its minimum, in float64.
EXACT = bl.Implicit(bl.ScipyRoot(), steps=100, tolerance=1e-11, linear_solver=bl.linear.Dense())


@pytest.mark.parametrize("social", [False, True], ids=["revenue", "time"])
@pytest.mark.parametrize(
    ("free", "congestion"), [((0.0, 1.0), (1.0, 0.0)), ((0.2, 0.6), (1.0, 0.5))], ids=["Pigou", "two"]
)
def test_tolls(free, congestion, social):
    roads = TwoRoads(free, congestion, social)
    game = roads.game()
    solution = bl.solve(game, share=EXACT, optimizer=partial(optim.SGD, lr=0.3), steps=200)
    assert float(solution.variables["toll"]) == pytest.approx(roads.best_toll(), abs=1e-8)
    # Where the least time is reached both of the leader's terms vanish, and nothing is small beside them.
    assert social or bl.certify(game, solution)
    wanted = roads.share(torch.tensor(roads.best_toll(), dtype=D))
    assert float(solution.variables["share"]) == pytest.approx(float(wanted), abs=1e-8)
    if free == (0.0, 1.0):
        assert roads.best_toll() == pytest.approx(0.5)
        assert float(roads.total_time(wanted)) == pytest.approx(0.75)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.5, 2), st.floats(0, 2), st.floats(0, 2))
def test_contracts(cost, aversion, variance):
    contract = Contract(cost, aversion, variance)
    rate = 0.5 / (1.0 / cost + aversion * variance)
    solution = bl.solve(contract.game(), effort=EXACT, optimizer=partial(optim.SGD, lr=rate), steps=40)
    assert float(solution.variables["share"]) == pytest.approx(contract.share(), abs=1e-8)
    assert float(solution.variables["effort"]) == pytest.approx(contract.effort(), abs=1e-8)
