"""Followers with a domain or a non-smooth term, against closed forms and finite differences of re-solved followers."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch.optim import LBFGS, SGD, Adam

import bilevel as bl
from bilevel.constraints import (
    L1,
    Affine,
    Ball,
    Box,
    ElasticNet,
    GroupLasso,
    Halfspace,
    NonNegative,
    SecondOrderCone,
    Simplex,
)
from bilevel.errors import KinkWarning
from bilevel.inner import ProjectedGradient

D = torch.float64


def number(value):
    return torch.tensor(value, dtype=D)


def answered(game, response, x):
    """The follower's answer to x, and the leader's hypergradient there."""
    x = x.clone().requires_grad_()
    y, state = response(game, {"x": x}, response.init(game))
    (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
    return y.detach(), slope, response.after_backward(state, y)


# A duopoly with a capacity: inverse demand 10 - q1 - q2, costs 1 and 2, and q2 <= 1 -------------------------------


def duopoly(**options):
    return bl.Game(
        x=bl.Player(lambda x, y: -x * (9.0 - x - y), number(2.0)),
        y=bl.Player(lambda x, y: -y * (8.0 - x - y), number(0.5), **options),
    )


CAPPED = duopoly(domain=Box(0.0, 1.0))
SOLVERS = {
    "L-BFGS-B": bl.Scipy("L-BFGS-B"),
    "SLSQP": bl.Scipy("SLSQP", options={"ftol": 1e-15}),
    "TNC": bl.Scipy("TNC", options={"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-12}),
    "SGD": partial(SGD, lr=0.3),
    "SGD with momentum": partial(SGD, lr=0.2, momentum=0.5),
    "Adam": partial(Adam, lr=0.05),
    "projected gradient": ProjectedGradient(accelerate=False),
    "accelerated": ProjectedGradient(),
    "closed form": bl.ClosedForm(lambda x: ((8.0 - x) / 2).clamp(0.0, 1.0)),
}


@pytest.mark.parametrize("x", [2.0, 7.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_capacity_that_binds_stands_still_and_one_that_does_not_moves(solver, x):
    response = bl.Implicit(SOLVERS[solver], steps=4000, tolerance=1e-10)
    y, slope, _ = answered(CAPPED, response, number(x))
    wanted, moves = (1.0, 0.0) if x == 2.0 else (0.5, -0.5)
    assert abs(float(y) - wanted) < 1e-9
    assert abs(float(slope) - (-(9.0 - 2 * x - wanted) + x * moves)) < 1e-8


@pytest.mark.parametrize("bounds", [(0.0, 1.0), [(0, 1)], [(None, 1)]])
def test_bounds_of_the_solver_are_differentiated_as_a_domain_is(bounds):
    response = bl.Implicit(bl.Scipy("L-BFGS-B", bounds=bounds), tolerance=1e-10)
    y, slope, state = answered(duopoly(), response, number(2.0))
    assert float(y) == 1.0 and abs(float(slope) + 4.0) < 1e-9 and state["stationarity"] <= 1e-10
    free = bl.Implicit(bl.Scipy("L-BFGS-B", bounds=[(0, None)]), tolerance=1e-10)
    y, slope, _ = answered(duopoly(), free, number(2.0))
    assert abs(float(y) - 3.0) < 1e-9 and abs(float(slope) + 3.0) < 1e-8


def test_the_capped_duopoly_ends_where_theory_says():
    found = bl.solve(CAPPED, y=bl.Implicit(bl.Scipy("L-BFGS-B")), optimizer=partial(SGD, lr=0.3), steps=60)
    # The leader's gradient contracts by 1 - .6: after 60 steps rounding is left.
    assert abs(found.variables["x"].item() - 4.0) < 1e-9 and found.variables["y"].item() == 1.0
    assert abs(found.values["x"] + 16.0) < 1e-9 and not found.warnings


def test_a_kink_is_named_and_said_to_be_one():
    with pytest.warns(KinkWarning, match="'y' is at a kink.*: y at its upper bound"):
        y, slope, _ = answered(CAPPED, bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-10), number(6.0))
    # Held or free: -(9 - 12 - 1) + 6 * 0 or 6 * -1/2.
    assert float(y) == 1.0 and min(abs(float(slope) - 4.0), abs(float(slope) - 1.0)) < 1e-8


def test_a_loose_solve_that_cannot_tell_whether_a_bound_holds_says_so():
    game = bl.Game(
        x=bl.Player(lambda x, y: y**2, number(1.0)),
        y=bl.Player(lambda x, y: (y - x) ** 2, number(0.5), domain=Box(0.0, 0.9)),
    )
    with pytest.warns(KinkWarning, match="y at its upper bound"):
        answered(game, bl.Implicit(partial(SGD, lr=0.02), steps=60, tolerance=0.2), number(0.92))


# Closed forms ------------------------------------------------------------------------------------------------------


def water(noise, total):
    """argmax sum log(1 + y / noise) over y >= 0 with sum y = total: y = max(level - noise, 0)."""
    ordered = noise.detach().sort().values
    for count in range(len(noise), 0, -1):
        level = (total + ordered[:count].sum()) / count
        if level > ordered[count - 1]:
            break
    kept = noise.detach() < level
    level = (total + noise[kept].sum()) / kept.sum()
    return torch.where(kept, level - noise, 0.0)


@pytest.mark.parametrize("response", [
    bl.Implicit(ProjectedGradient(), steps=5000, tolerance=1e-11),
    bl.Implicit(ProjectedGradient(accelerate=False), steps=5000, tolerance=1e-11, linear_solver=bl.linear.Dense()),
    bl.Implicit(partial(SGD, lr=0.1), steps=5000, tolerance=1e-11),
    bl.Unrolled(partial(SGD, lr=0.1), steps=2000),
], ids=["accelerated", "projected", "SGD", "unrolled"])  # fmt: skip
def test_water_filling(response):
    noise, total = torch.tensor([0.3, 0.5, 1.0, 2.5], dtype=D), 1.3
    aim = torch.tensor([0.2, 0.9, 0.1, 0.3], dtype=D)
    game = bl.Game(
        x=bl.Player(lambda x, y: (y - aim).square().sum(), noise),
        y=bl.Player(
            lambda x, y: -torch.log1p(y / x).sum(), torch.full((4,), total / 4, dtype=D), domain=Simplex(total)
        ),
    )
    y, slope, _ = answered(game, response, noise)
    leaf = noise.clone().requires_grad_()
    wanted = water(leaf, total)
    (derivative,) = torch.autograd.grad((wanted - aim).square().sum(), leaf)
    torch.testing.assert_close(y, wanted.detach(), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(slope, derivative, rtol=0.0, atol=1e-8)
    assert float(y[3]) == 0.0  # a corner


def test_entropy_on_a_simplex_is_a_softmax():
    x = torch.tensor([0.3, -0.7, 1.1], dtype=D)
    game = bl.Game(
        x=bl.Player(lambda x, y: (y * torch.tensor([1.0, 2.0, -1.0], dtype=D)).sum() ** 2, x),
        y=bl.Player(lambda x, y: (y * y.log() - x * y).sum(), torch.full((3,), 1 / 3, dtype=D), domain=Simplex()),
    )
    y, slope, _ = answered(game, bl.Implicit(ProjectedGradient(), steps=2000, tolerance=1e-12), x)
    leaf = x.clone().requires_grad_()
    soft = leaf.softmax(0)
    (wanted,) = torch.autograd.grad((soft * torch.tensor([1.0, 2.0, -1.0], dtype=D)).sum() ** 2, leaf)
    torch.testing.assert_close(y, soft.detach(), rtol=0.0, atol=1e-9)
    torch.testing.assert_close(slope, wanted, rtol=0.0, atol=1e-8)


def test_non_negative_least_squares():
    generator = torch.Generator().manual_seed(3)
    design = torch.randn(8, 5, generator=generator, dtype=D)
    x = torch.randn(8, generator=generator, dtype=D)
    game = bl.Game(
        x=bl.Player(lambda x, y: (y - 0.2).square().sum() + 0.1 * x.square().sum(), x),
        y=bl.Player(lambda x, y: 0.5 * (design @ y - x).square().sum(), torch.ones(5, dtype=D), domain=NonNegative()),
    )
    y, slope, _ = answered(game, bl.Implicit(ProjectedGradient(), steps=5000, tolerance=1e-12), x)
    free = y > 0
    assert 0 < int(free.sum()) < 5 and bool((design.T @ (design @ y - x) > -1e-9).all())
    part = design[:, free]
    wanted = torch.zeros(5, dtype=D)
    wanted[free] = torch.linalg.lstsq(part, x).solution
    torch.testing.assert_close(y, wanted, rtol=0.0, atol=1e-9)
    pulled = part @ torch.linalg.solve(part.T @ part, 2.0 * (wanted[free] - 0.2))
    torch.testing.assert_close(slope, 0.2 * x + pulled, rtol=0.0, atol=1e-8)


def test_a_toll_that_empties_a_road():
    """Drivers on three roads with travel times a + b flow + toll: used roads are equally slow, the empty one slower."""
    a, b = number([1.0, 1.5, 2.0]), number([2.0, 1.0, 1.0])
    tolls = number([0.2, 0.1, 0.9])
    game = bl.Game(
        x=bl.Player(lambda x, y: -(x * y).sum(), tolls),
        y=bl.Player(
            lambda x, y: ((a + x) * y + 0.5 * b * y**2).sum(), torch.full((3,), 1 / 3, dtype=D), domain=Simplex()
        ),
    )
    for response in (
        bl.Implicit(ProjectedGradient(), steps=2000, tolerance=1e-12),
        bl.Implicit(partial(SGD, lr=0.4), steps=2000, tolerance=1e-12),
    ):
        y, slope, _ = answered(game, response, tolls)
        # Roads 1 and 2: 1.2 + 2 f = 1.6 + (1 - f), f = 7/15, 32/15 minutes; road 3 would take 2.9.
        torch.testing.assert_close(y, number([7 / 15, 8 / 15, 0.0]), rtol=0.0, atol=1e-10)
        # df1/dx1 = -1 / (b1 + b2) = -1/3, df2/dx1 = 1/3: the derivatives of -(x1 f1 + x2 f2).
        wanted = number([-7 / 15 + (0.2 - 0.1) / 3, -8 / 15 - (0.2 - 0.1) / 3, 0.0])
        torch.testing.assert_close(slope, wanted, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_calls_that_find_a_follower_at_rest_do_not_lengthen_its_steps(dtype):
    """The step's length is remembered from call to call: two hundred calls at one point leave it as it is."""
    # Not at its optimum for the leader's start: tolerances would be relative to rounding.
    begun = torch.tensor([0.5, 0.25, 0.25], dtype=dtype)
    game = bl.Game(
        x=bl.Player(lambda x, y: (y**2).sum() + (x**2).sum(), torch.ones(3, dtype=dtype)),
        y=bl.Player(lambda x, y: ((y - x) ** 2).sum(), begun, domain=Simplex()),
    )
    response = bl.Implicit(ProjectedGradient())
    state = response.init(game)
    x = torch.tensor([1.0, 0.9, 0.0], dtype=dtype)
    with torch.no_grad():
        for _ in range(200):
            y, state = response(game, {"x": x}, state)
    torch.testing.assert_close(y, torch.tensor([0.55, 0.45, 0.0], dtype=dtype), rtol=0.0, atol=1e-5)
    assert 1.0 <= float(state["optimizer"]["curvature"]) <= 4.0


# The lasso ---------------------------------------------------------------------------------------------------------

DATA = torch.tensor([1.5, -0.8, 0.4, -0.1], dtype=D)


def lasso(prox=None, init=None, domain=None):
    """An orthogonal design: y = soft(DATA, weight), weight = exp(x)."""
    return bl.Game(
        x=bl.Player(lambda y: (y - torch.tensor([1.0, -1.0, 0.1, 0.2], dtype=D)).square().sum(), number(-1.0)),
        y=bl.Player(
            lambda y: 0.5 * (y - DATA).square().sum(),
            torch.zeros(4, dtype=D) if init is None else init,
            prox=L1(lambda x: x.exp()) if prox is None else prox,
            domain=domain,
        ),
    )


RESPONSES = {
    "accelerated": bl.Implicit(ProjectedGradient(), tolerance=1e-12, steps=500),
    "SGD": bl.Implicit(partial(SGD, lr=0.5), tolerance=1e-12, steps=500),
    "closed form": bl.Implicit(
        bl.ClosedForm(lambda x: DATA.sign() * (DATA.abs() - x.exp()).clamp(min=0.0)), tolerance=1e-12
    ),
    "unrolled": bl.Unrolled(partial(SGD, lr=0.5), steps=100),
    "segments": bl.Unrolled(partial(SGD, lr=0.5), steps=100, differentiation=bl.Segments()),
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("weight", [0.2, 0.5, 1.0])
def test_the_lassos_hypergradient_in_its_weight(name, weight):
    y, slope, _ = answered(lasso(), RESPONSES[name], number(weight).log())
    wanted = DATA.sign() * (DATA.abs() - weight).clamp(min=0.0)
    moves = -weight * DATA.sign() * (DATA.abs() > weight)
    aim = torch.tensor([1.0, -1.0, 0.1, 0.2], dtype=D)
    torch.testing.assert_close(y, wanted, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(slope, 2.0 * (wanted - aim) @ moves, rtol=0.0, atol=1e-9)


def test_the_lassos_kink_is_named():
    with pytest.warns(KinkWarning, match=r"y\[2\] at its value 0"):
        answered(lasso(), RESPONSES["accelerated"], number(0.4).log())


def test_a_box_with_the_lasso_and_the_elastic_net():
    game = lasso(domain=Box(-0.2, 0.6))
    y, slope, _ = answered(game, RESPONSES["accelerated"], number(0.3).log())
    assert torch.allclose(y, number([0.6, -0.2, 0.1, 0.0]), atol=1e-10)
    # Only the third entry is free: dy/dx = -weight.
    assert abs(float(slope) - 2.0 * (0.1 - 0.1) * -0.3) < 1e-9
    net = lasso(prox=ElasticNet(0.3, lambda x: x.exp()))
    y, slope, _ = answered(net, RESPONSES["accelerated"], number(0.5).log())
    wanted = DATA.sign() * (DATA.abs() - 0.3).clamp(min=0.0) / 1.5
    torch.testing.assert_close(y, wanted, rtol=0.0, atol=1e-10)
    aim = torch.tensor([1.0, -1.0, 0.1, 0.2], dtype=D)
    torch.testing.assert_close(slope, 2.0 * (wanted - aim) @ (-0.5 * wanted / 1.5), rtol=0.0, atol=1e-9)


def test_the_group_lasso():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=D)
    game = bl.Game(
        x=bl.Player(lambda y: y.square().sum(), number(0.0)),
        y=bl.Player(
            lambda y: 0.5 * (y - rows).square().sum(), torch.zeros(2, 2, dtype=D), prox=GroupLasso(lambda x: x.exp())
        ),
    )
    y, slope, _ = answered(game, RESPONSES["accelerated"], number(0.0))
    torch.testing.assert_close(y, torch.tensor([[2.4, 3.2], [0.0, 0.0]], dtype=D), rtol=0.0, atol=1e-10)
    # |y_1|^2 = (5 - w)^2: its derivative in log w at w = 1 is -8.
    torch.testing.assert_close(slope, number(-8.0), rtol=0.0, atol=1e-9)


# Players who set the bounds, several at once, transforms -----------------------------------------------------------


def test_a_leader_may_set_the_bounds():
    game = bl.Game(
        x=bl.Player(lambda x, y: (y**2).sum() + x**2, number(0.5)),
        y=bl.Player(lambda y: ((y - torch.tensor([2.0, 0.2], dtype=D)) ** 2).sum(), torch.zeros(2, dtype=D),
                    domain=Box(0.0, lambda x: x)),
    )  # fmt: skip
    y, slope, _ = answered(game, bl.Implicit(ProjectedGradient(), tolerance=1e-12), number(0.5))
    assert torch.allclose(y, number([0.5, 0.2]), atol=1e-12) and abs(float(slope) - 2.0) < 1e-9
    with pytest.raises(ValueError, match="'y': its Box is empty"):
        answered(game, bl.Implicit(ProjectedGradient()), number(-0.5))


@pytest.mark.parametrize("inner", ["accelerated", "SGD", "L-BFGS-B"])
def test_many_games_rest_each_where_it_rests_alone(inner):
    xs = torch.tensor([2.0, 7.0, 9.0, 5.0], dtype=D)
    games = bl.Games(CAPPED, 4, init={"x": xs})
    response = bl.Implicit(SOLVERS[inner], steps=4000, tolerance=1e-11)
    x = xs.clone().requires_grad_()
    y, _ = response(games, {"x": x}, response.init(games))
    games.loss("x", {"x": x, "y": y}).sum().backward()
    for index, point in enumerate(xs):
        alone, slope, _ = answered(CAPPED, response, point)
        torch.testing.assert_close(y[index].detach(), alone, rtol=0.0, atol=1e-9)
        torch.testing.assert_close(x.grad[index], slope, rtol=0.0, atol=1e-8)


def test_many_games_whose_leaders_set_weights_each():
    logs = torch.tensor([0.2, 0.5, 1.0], dtype=D).log()
    games = bl.Games(lasso(), 3, init={"x": logs})
    for response in (RESPONSES["accelerated"], RESPONSES["unrolled"]):
        x = logs.clone().requires_grad_()
        y, _ = response(games, {"x": x}, response.init(games))
        games.loss("x", {"x": x, "y": y}).sum().backward()
        for index, log in enumerate(logs):
            torch.testing.assert_close(x.grad[index], answered(lasso(), response, log)[1], rtol=0.0, atol=1e-9)


def test_a_kink_of_one_of_many_games_names_the_game():
    games = bl.Games(CAPPED, 3, init={"x": torch.tensor([2.0, 6.0, 7.0], dtype=D)})
    response = bl.Implicit(SOLVERS["accelerated"], steps=4000, tolerance=1e-11)
    with pytest.warns(KinkWarning, match="y of game 1 at its upper bound") as told:
        response(games, {"x": games.initial("x").requires_grad_()}, response.init(games))
    assert told[0].message.games == [1]


def test_second_derivatives_and_transforms_see_the_constrained_optimum():
    curved = torch.tensor([[2.0, 0.5, 0.3], [0.5, 1.0, 0.2], [0.3, 0.2, 1.5]], dtype=D)
    start = torch.tensor([1.0, -2.0, 0.8], dtype=D)
    game = bl.Game(
        x=bl.Player(lambda x, y: y.square().sum(), start),
        y=bl.Player(lambda x, y: 0.5 * y @ curved @ y - x @ y, torch.zeros(3, dtype=D), domain=NonNegative()),
    )
    response = bl.Implicit(
        ProjectedGradient(), steps=3000, tolerance=1e-12, warm_start=False, linear_solver=bl.GMRES(rtol=1e-12)
    )
    state = response.init(game)

    def value(x):
        return response(game, {"x": x}, state)[0].square().sum()

    free = [0, 2]
    inverse = torch.zeros(3, 3, dtype=D)
    inverse[0, free], inverse[2, free] = torch.linalg.inv(curved[free][:, free])
    torch.testing.assert_close(torch.func.grad(value)(start), 2.0 * inverse.T @ inverse @ start, rtol=0.0, atol=1e-9)
    rows = torch.stack([start, start + 0.1])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(value))(rows), 2.0 * rows @ inverse.T @ inverse, rtol=0.0, atol=1e-9
    )
    x = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(x), x, create_graph=True)
    second = torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in slope])
    torch.testing.assert_close(second, 2.0 * inverse.T @ inverse, rtol=0.0, atol=1e-8)


def test_joined_players_with_domains():
    def tax(x, a, b):
        return -x * (a + b)

    one = number(1.0)
    game = bl.Game(
        x=bl.Player(tax, one),
        a=bl.Player(lambda x, a, b: -(a * (9.0 - x - a - b)), one, domain=Box(0.0, 1.5)),
        b=bl.Player(lambda x, a, b: -(b * (9.0 - x - a - b)), one, domain=NonNegative()),
    ).joined(firms=("a", "b"))
    for inner in (partial(SGD, lr=0.3), partial(Adam, lr=0.05), ProjectedGradient(accelerate=False)):
        response = bl.Implicit(inner, steps=5000, tolerance=1e-11)
        x = one.clone().requires_grad_()
        firms, _ = response(game, {"x": x}, response.init(game))
        (slope,) = torch.autograd.grad(firms["a"] + firms["b"], x)
        firms = {name: firm.detach() for name, firm in firms.items()}
        assert abs(float(firms["a"]) - 1.5) < 1e-9 and abs(float(firms["b"]) - 3.25) < 1e-8
        assert abs(float(slope) + 0.5) < 1e-8


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (bl.Implicit(LBFGS), "LBFGS minimises a loss without constraints, and 'y' has the domain Simplex"),
        (bl.Implicit(bl.Scipy("L-BFGS-B")), "minimises a loss without constraints.*Simplex.*ProjectedGradient"),
        (bl.Implicit(partial(Adam, lr=0.1)), "optimiser of player 'y' is Adam, whose steps have no one length"),
        (bl.Unrolled(partial(Adam, lr=0.1)), "Unrolled: the optimiser of player 'y' is Adam"),
        (bl.Unrolled(partial(SGD, lr=0.1), differentiation=bl.ForwardMode()), "ForwardMode: the steps of player 'y'"),
        (bl.Hypernetwork(partial(Adam, lr=1e-2)), "Hypernetwork goes by the loss of player 'y'.*domain Simplex"),
        (bl.Implicit(ProjectedGradient(), linear_solver=bl.ConjugateGradient()), "no symmetric Jacobian.*GMRES"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(response, text):
    game = bl.Game(
        x=bl.Player(lambda x, y: (y**2).sum(), number([1.0, 2.0])),
        y=bl.Player(lambda x, y: ((y - x) ** 2).sum(), number([0.5, 0.5]), domain=Simplex()),
    )
    with pytest.raises((TypeError, bl.errors.NotSymmetricError), match=text):
        answered(game, response, number([1.0, 2.0]))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: bl.Scipy("BFGS", bounds=(0.0, 1.0)), "SciPy's method has no bounds"),
        (lambda: bl.Scipy("L-BFGS-B", bounds=(1.0, 0.0)), "expected low <= high"),
        (lambda: bl.Scipy("L-BFGS-B", bounds=3.0), "expected \\(low, high\\) for every entry"),
        (lambda: bl.Implicit(bl.Scipy("BFGS")).init(CAPPED), "Scipy\\('BFGS'\\) was given a follower with"),
        (
            lambda: bl.Implicit(bl.Scipy("L-BFGS-B", bounds=[(0, 1)] * 2)).init(duopoly()),
            "has 2 pairs, and the player has 1",
        ),
        (lambda: bl.Unrolled(partial(SGD, lr=0.1, momentum=0.9)).init(lasso()), "momentum changes its steps' length"),
    ],
)
def test_solvers_that_cannot_keep_bounds_are_refused(make, text):
    with pytest.raises((TypeError, ValueError), match=text):
        found = make()
        answered(CAPPED, bl.Implicit(bl.Scipy("BFGS")), number(2.0))
        del found


# Random programmes against finite differences ----------------------------------------------------------------------


def programme(seed):
    """A random quadratic programme of a follower, of any scale from 1e-3 to 1e3, and a leader of 1 to 3 entries."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=D)

    n, m = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 7), (1, 4)))
    scale = 10 ** float(6.0 * torch.rand((), generator=generator) - 3.0)
    root = normal(n, n)
    curved, mixed, shift, aim = (
        scale * (root @ root.T / n + 0.1 * torch.eye(n, dtype=D)),
        scale * normal(n, m),
        scale * normal(n),
        normal(n),
    )
    sets = (
        *(Box(-0.3, 0.5), NonNegative(), Simplex(1.5), Ball(0.7, p=1), Ball(0.7), Ball(0.4, p=math.inf)),
        *(Halfspace(normal(n), -0.2), Affine(normal(1, n), normal(1)), SecondOrderCone(), None),
    )
    domain = sets[seed % len(sets)]
    start = torch.zeros(n, dtype=D) if domain is None else domain.project(torch.zeros(n, dtype=D))
    return bl.Game(
        x=bl.Player(lambda x, y: (y - aim).square().sum() + 0.1 * x.square().sum(), normal(m)),
        y=bl.Player(
            lambda x, y: 0.5 * y @ curved @ y - (mixed @ x + shift) @ y,
            start,
            domain=domain,
            prox=L1(0.5 * scale) if domain is None else None,
        ),
    )


def hold_against_differences(seed):
    game = programme(seed)
    response = bl.Implicit(ProjectedGradient(), steps=20000, tolerance=1e-12, linear_solver=bl.linear.Dense())
    x, h = game.initial("x"), 1e-5
    _, slope, _ = answered(game, response, x)
    with torch.no_grad():
        _, state = response(game, {"x": x}, response.init(game))  # the follower begins next to each of its answers

    def value(x):
        with torch.no_grad():
            return float(game.loss("x", {"x": x, "y": response(game, {"x": x}, state)[0]}))

    rows = torch.eye(len(x), dtype=D)
    differences = number([(value(x + h * row) - value(x - h * row)) / (2.0 * h) for row in rows])
    # The values are right to about 1e-11 (1e-12 by a curvature of .1), 1 / h = 1e5, and third derivatives times h^2
    # are smaller still.
    assert float((slope - differences).norm()) <= 1e-5 * (1.0 + float(slope.norm())), seed


@pytest.mark.parametrize("seed", range(20))
def test_random_programmes_against_finite_differences(seed):
    hold_against_differences(seed)


@pytest.mark.slow
def test_two_hundred_random_programmes_against_finite_differences():
    with warnings.catch_warnings():
        warnings.simplefilter("error", KinkWarning)  # none of these is at one
        for seed in range(20, 220):
            hold_against_differences(seed)
