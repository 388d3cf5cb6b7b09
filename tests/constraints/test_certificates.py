"""Checks and certificates that know sets: hypergradients re-solved within them, equilibria at bounds, best moves."""

from functools import partial

import pytest
import torch
from torch.optim import SGD

import bilevel as bl
from bilevel.constraints import L1, Ball, Box, NonNegative, SecondOrderCone, Simplex
from bilevel.inner import ProjectedGradient
from bilevel.testing import check_hypergradient

D = torch.float64


def number(value):
    return torch.tensor(value, dtype=D)


CURVED = number([[2.0, 0.5, 0.3], [0.5, 1.0, 0.2], [0.3, 0.2, 1.5]])
X = number([1.0, -2.0, 0.8])
DOMAINS = {
    "box": (Box(-0.3, 0.4), None),
    "nonnegative": (NonNegative(), None),
    "simplex": (Simplex(), None),
    "ball": (Ball(0.3), None),
    "ball 1": (Ball(0.5, p=1), None),
    "cone": (SecondOrderCone(), None),
    "lasso": (None, L1(1.6)),
    "box and lasso": (Box(-0.3, 0.4), L1(0.4)),
}


def game(name, **options):
    domain, prox = DOMAINS[name]
    start = torch.zeros(3, dtype=D) if domain is None else domain.project(torch.zeros(3, dtype=D))
    return bl.Game(
        x=bl.Player(lambda x, y: (y - 0.2).square().sum() + 0.1 * x.square().sum(), X),
        y=bl.Player(lambda x, y: 0.5 * y @ CURVED @ y - x @ y, start, domain=domain, prox=prox, **options),
    )


RESPONSE = bl.Implicit(ProjectedGradient(), steps=3000, tolerance=1e-10)


@pytest.mark.parametrize("name", DOMAINS)
def test_a_right_hypergradient_within_a_set_is_found_right(name):
    check = check_hypergradient(game(name), RESPONSE, rtol=1e-4)
    assert check, str(check)


class _Unconstrained(bl.Response):
    """Answers within the set, and differentiates as if it were not there: the fault to be found."""

    def __init__(self, name):
        self.name = name

    promise = RESPONSE.promise

    def init(self, game_, *, follower=None, seed=0):
        return RESPONSE.init(game_, follower=follower, seed=seed)

    def __call__(self, game_, others, state, batch=None):
        with torch.no_grad():
            y, after = RESPONSE(game_, others, state, batch)
        x = others["x"]
        moved = torch.linalg.solve(CURVED, x - x.detach())
        return y + moved, after


@pytest.mark.parametrize("name", ["box", "simplex", "cone", "lasso"])
def test_the_derivative_of_a_follower_without_its_set_is_found_wrong(name):
    check = check_hypergradient(game(name), _Unconstrained(name), rtol=1e-2)
    assert check.verdict.value == "wrong", str(check)
    assert any("within the constraints" in finding for finding in check.findings), str(check)


def test_an_answer_that_is_no_optimum_is_at_fault():
    loose = bl.Implicit(partial(SGD, lr=0.05), steps=3, tolerance=None)
    check = check_hypergradient(game("ball"), loose, rtol=1e-3)
    assert not check


def cournot(capacity, **options):
    return bl.Game(
        a=bl.Player(lambda a, b: -a * (9.0 - a - b), number(0.5), domain=Box(0.0, capacity)),
        b=bl.Player(lambda a, b: -b * (8.0 - a - b), number(0.5), domain=NonNegative(), **options),
    )


def test_a_capacity_constrained_nash_equilibrium_is_certified():
    held = {"a": number(1.0), "b": number(3.5)}
    found = bl.certify_nash(cournot(1.0), held)
    assert found.standing.value == "certified", str(found)
    # The same point, its capacity gone, is none; nor is one beside it; nor one outside.
    assert bl.certify_nash(cournot(5.0), held).standing.value == "refuted"
    assert bl.certify_nash(cournot(1.0), {"a": number(1.0), "b": number(3.0)}).standing.value == "refuted"
    assert bl.certify_nash(cournot(1.0), {"a": number(1.5), "b": number(3.25)}).standing.value == "refuted"


@pytest.mark.parametrize("name", ["cone", "ball 1", "lasso"])
def test_equilibria_in_sets_that_are_no_smooth_functions(name):
    domain, prox = DOMAINS[name]
    follow = lambda y: 0.5 * y @ CURVED @ y - X @ y
    start = torch.zeros(3, dtype=D) if domain is None else domain.project(torch.zeros(3, dtype=D))
    alone = bl.Game(y=bl.Player(follow, start, domain=domain, prox=prox))
    y, _ = RESPONSE(game(name), {"x": X}, RESPONSE.init(game(name)))
    assert bl.certify_nash(alone, {"y": y}).standing.value == "certified"
    assert bl.certify_nash(alone, {"y": 0.5 * y}).standing.value == "refuted"


def test_exploitability_searches_within_the_domain():
    held = {"a": number(1.0), "b": number(3.5)}
    found = bl.exploitability(cournot(1.0), held, strong_convexity={"a": 2.0, "b": 2.0})
    assert found.gains["a"] == 0.0 and found.gains["b"] < 1e-12 and found.upper["a"] < 1e-12
    # With room to 2 the first would sell (9 - 3.5) / 2 = 2.75, and takes 2: profit 2 * 3.5 in place of 1 * 4.5.
    found = bl.exploitability(cournot(2.0), held, strong_convexity={"a": 2.0, "b": 2.0})
    assert abs(found.gains["a"] - 2.5) < 1e-9 and float(found.deviations["a"]) == 2.0
    assert abs(found.upper["a"] - 2.5) < 1e-9
    with pytest.raises(ValueError, match="'a' lie 0.5 outside its domain"):
        bl.exploitability(cournot(1.0), {"a": number(1.5), "b": number(3.5)})
    with pytest.raises(ValueError, match="bounds names 'a', who has the domain Box"):
        bl.exploitability(cournot(1.0), held, bounds={"a": (0.0, 1.0)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simplex", "cone", "lasso"])
def test_exploitability_in_other_sets_and_with_terms(name):
    domain, prox = DOMAINS[name]
    start = torch.zeros(3, dtype=D) if domain is None else domain.project(torch.zeros(3, dtype=D))
    alone = bl.Game(y=bl.Player(lambda y: 0.5 * y @ CURVED @ y - X @ y, start, domain=domain, prox=prox))
    best, _ = RESPONSE(game(name), {"x": X}, RESPONSE.init(game(name)))

    def value(y):
        return float(0.5 * y @ CURVED @ y - X @ y) + (0.0 if prox is None else float(prox.value(y)))

    found = bl.exploitability(alone, {"y": start}, strong_convexity={"y": 0.5}, restarts=2)
    assert abs(found.gains["y"] - (value(start) - value(best))) < 1e-9
    assert found.gains["y"] <= found.upper["y"] < found.gains["y"] + 1e-9
    assert bl.exploitability(alone, {"y": best}, restarts=2).gains["y"] < 1e-12


def test_certify_says_who_knows_constraints():
    with pytest.raises(ValueError, match="certify: 'y' has the domain Second.*check_hypergradient and certify_nash"):
        bl.certify(game("cone"), {"x": X, "y": torch.zeros(3, dtype=D)})


MIXED = ((1.0, 0.5), (-0.5, 0.25), (0.25, 0.0))
FAMILIES = [
    bl.testing.BoxQuadratic((0.25, 1.0, 0.5), MIXED, (0.75, 0.5), (1.0, -1.0, 0.5), (1.0, 0.5, 0.0)),
    bl.testing.NonNegativeLeastSquares(((1.0, 0.5, -0.5), (0.25, 0.0, 1.0)), (0.75, -0.25), (1.0, -1.0, 0.5)),
    bl.testing.WaterFilling(((1.0, 0.5), (-0.5, 0.25), (0.25, 1.0)), (0.75, 0.5), (1.0, -1.0, 0.5)),
    bl.testing.Lasso((1.0, -0.25, 0.5), (-0.71,), (1.0, -1.0, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize("known", FAMILIES, ids=lambda known: type(known).__name__)
def test_the_families_own_formulas(known):
    """Their best responses are optima, and their derivatives those of differences of them."""
    played, x, h = known.game(), known.x0, 1e-6
    y, slope = known.best_response(x), known.hypergradient(x)
    assert bl.certify_nash(bl.Game(y=bl.Player(lambda y: known.follower(x, y), y, domain=known.domain,
                                               prox=None if known.prox is None else L1(float(x[0].exp())))),
                           {"y": y}).standing.value == "certified"  # fmt: skip
    rows = torch.eye(len(x), dtype=D)
    differences = torch.stack([(known.value(x + h * row) - known.value(x - h * row)) / (2.0 * h) for row in rows])
    torch.testing.assert_close(slope, differences, rtol=0.0, atol=1e-8)
    assert check_hypergradient(played, RESPONSE, rtol=1e-5)


def plant(a, b):
    return a + b - 3.0


def sharing(of_b=plant):
    """Price 9 - a - b, costs 0 and 1: alone 3.33 and 2.33; one plant of 3 leaves a = 2, b = 1, l = 9 - 3 - 2 = 4."""
    one = number(0.5)
    return bl.Game(
        a=bl.Player(lambda a, b: -a * (9.0 - a - b), one, inequality=plant, domain=NonNegative()),
        b=bl.Player(lambda a, b: -b * (8.0 - a - b), one, inequality=of_b, domain=NonNegative()),
    )


def test_leaders_who_share_a_plant_are_certified_at_one_multiplier():
    right, other = {"a": number(2.0), "b": number(1.0)}, {"a": number(1.8), "b": number(1.2)}
    found = bl.certify_nash(sharing(), right)
    assert found.standing.value == "certified", str(found)
    assert "4 of a, 4 of b" in found.by_name["shared inequality of a, b"].remark
    # a + b = 3 elsewhere: neither gains alone, but a bears 9 - 3 - 1.8 and b 8 - 3 - 1.2.
    found = bl.certify_nash(sharing(), other)
    assert found.standing.value == "refuted"
    assert "4.2 of a, 3.8 of b" in found.by_name["shared inequality of a, b"].remark
    assert [name for name, part in found.by_name.items() if part.standing.value == "refuted"] == [
        "shared inequality of a, b"
    ]
    own = sharing(lambda a, b: a + b - 3.0)
    assert bl.certify_nash(own, other).standing.value == "certified"  # a generalised Nash equilibrium


def test_a_shared_multiplier_is_looked_for_together_with_each_players_own():
    """Price 9 - a - b, costs 0 and 1, a plant of 2.5 and b <= 0.5: a = 2, and 9 - 2.5 - 2 = 4.5 is the plant's price.

    b alone bears 8 - 2.5 - 0.5 = 5 in all: its least-squares multipliers need not be 4.5 and 0.5, which fit a as well.
    """

    def small(a, b):
        return a + b - 2.5

    one = number(0.5)
    game = bl.Game(
        a=bl.Player(lambda a, b: -a * (9.0 - a - b), one, inequality=small),
        b=bl.Player(lambda a, b: -b * (8.0 - a - b), one, inequality=small, domain=bl.Box(0.0, 0.5)),
    )
    found = bl.certify_nash(game, {"a": number(2.0), "b": number(0.5)})
    shared = found.by_name["shared inequality of a, b"]
    assert found.standing.value == "certified" and shared.value < 1e-9, str(found)
    # a = 2.3, b = 0.2: a asks 9 - 2.5 - 2.3 = 4.2 and b, below its own capacity, 8 - 2.5 - 0.2 = 5.3.
    found = bl.certify_nash(game, {"a": number(2.3), "b": number(0.2)})
    assert found.by_name["shared inequality of a, b"].standing.value == "refuted"


@pytest.mark.parametrize("judge", [bl.certify, bl.certify_nash, bl.exploitability])
def test_what_is_no_point_is_refused_by_name(judge):
    with pytest.raises(TypeError, match=rf"^{judge.__name__.split('_')[0]}: the point is a int; expected a Solution"):
        judge(sharing(), 3)


def test_exploitability_searches_within_functions_and_names_who_gains():
    convex = {"a": 2.0, "b": 2.0}
    found = bl.exploitability(sharing(), {"a": number(2.0), "b": number(1.0)}, strong_convexity=convex, restarts=2)
    assert found.nash_conv < 1e-12 and max(found.upper.values()) < 1e-12
    # With b at .5 the first could make 2.5: 2.5 * 6 in place of 2 * 6.5. The second makes 1 * 5 of .5 * 5.5.
    found = bl.exploitability(sharing(), {"a": number(2.0), "b": number(0.5)}, strong_convexity=convex, restarts=2)
    assert abs(found.gains["a"] - 2.0) < 1e-9 and abs(found.upper["a"] - 2.0) < 1e-9
    assert abs(found.gains["b"] - 2.25) < 1e-9 and abs(float(found.deviations["b"]) - 1.0) < 1e-9
    with pytest.raises(ValueError, match="'a' break its constraints: inequality is 1, wanted <= 0"):
        bl.exploitability(sharing(), {"a": number(3.0), "b": number(1.0)})
    with pytest.raises(ValueError, match="bounds names 'a', whom functions constrain already"):
        bl.exploitability(sharing(), {"a": number(1.0), "b": number(1.0)}, bounds={"a": (0.0, 1.0)})
