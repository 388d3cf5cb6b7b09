"""What a backward solve tells of the follower's answer: that it is far from its optimum, flat, or no minimum at all."""

import warnings
from functools import partial

import pytest
import torch

import bilevel as bl
from bilevel.errors import (
    ConvergenceError,
    FollowerNonConvergenceWarning,
    NonConvergenceWarning,
    UnreliableResponseWarning,
)

D = torch.float64
ADAM = partial(torch.optim.Adam, lr=1.0)
DESCENT = partial(torch.optim.SGD, lr=0.1)


def quartic(start, *, scale=1.0, unit=1.0, count=2):
    """y* = x and dy*/dx = 1, whatever the units: the loss is `scale` times, variables are `unit` times as large."""

    def follow(x, y):
        away = (y - x) / unit
        return scale * ((away**4).sum() / 4 + 0.5 * away.square().sum())

    return bl.Game(
        x=bl.Player(lambda y: ((y - unit) / unit).square().sum(), torch.full((count,), unit, dtype=D)),
        y=bl.Player(follow, torch.full((count,), unit * start, dtype=D)),
    )


def answered(game, response, leader=None):
    """The answer, its hypergradient, and what was warned of."""
    x = (game.initial("x") if leader is None else leader).clone().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, _ = response(game, {"x": x}, response.init(game))
        loss = game.loss("x", {"x": x, "y": y})
        (slope,) = torch.autograd.grad(loss, x, materialize_grads=True)
    return y.detach(), slope, [warning.message for warning in caught]


@pytest.mark.parametrize(("scale", "unit"), [(1.0, 1.0), (1e-6, 1.0), (1.0, 1e4)])
def test_a_start_so_far_that_its_gradient_says_nothing_warns_in_any_units(scale, unit):
    game = quartic(100.0, scale=scale, unit=unit)
    y, slope, told = answered(game, bl.Implicit(partial(torch.optim.Adam, lr=unit), steps=5000))
    # Right is y = 1 and a hypergradient of 0. By hand: F / F' = (e^3 + e) / (3 e^2 + 1) with e = y - 1.
    away = y / unit - 1.0
    step = (away**3 + away) / (3 * away**2 + 1)
    assert bool((y > 5.0 * unit).all()) and bool((slope.abs() * unit > 1.0).all())
    assert [type(one) for one in told] == [FollowerNonConvergenceWarning]
    assert f"move its variables by {float(step.norm() / (away + 1).norm()):.0%} of their size" in str(told[0])
    with pytest.raises(ConvergenceError, match="is not at its optimum"):
        answered(game, bl.Implicit(partial(torch.optim.Adam, lr=unit), steps=5000, strict=True))


def test_following_the_hint_ends_the_warning():
    descend = partial(torch.optim.SGD, lr=1e-4)
    for game, tolerance in ((quartic(100.0), 1e-9), (quartic(1.5), 1e-3)):
        response = bl.Implicit(bl.Scipy("L-BFGS-B") if tolerance < 1e-3 else DESCENT, steps=5000, tolerance=tolerance)
        y, slope, told = answered(game, response)
        assert not told and float((y - 1.0).abs().max()) < 1e-2 and float(slope.abs().max()) < 2e-2
    assert answered(quartic(100.0), bl.Implicit(descend, steps=5000, tolerance=None))[2] == []  # none was asked for


def bowl(curvature, start, x=1.0):
    return bl.Game(
        x=bl.Player(lambda y: (y - 2.0).square().sum(), torch.full_like(curvature, x)),
        y=bl.Player(lambda x, y: 0.5 * (curvature * (y - x)).dot(y - x), torch.full_like(curvature, start)),
    )


def test_a_bowl_that_is_begun_a_million_times_too_far_warns():
    """At 1e-3 of the gradient at the start y is about a thousand where 1 is right."""
    y, _, told = answered(bowl(torch.ones(2, dtype=D), 1e6), bl.Implicit(DESCENT, steps=1000))
    assert float(y.min()) > 500.0 and "by 100% of their size" in str(told[0])


@pytest.mark.parametrize("x", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("start", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("condition", [1.0, 10.0])
def test_a_run_that_converged_does_not_warn(x, start, condition):
    curvature = torch.logspace(0.0, -torch.tensor(condition).log10().item(), 4, dtype=D)
    response = bl.Implicit(partial(torch.optim.SGD, lr=1.0), steps=1000)
    assert answered(bowl(curvature, start, x), response)[2] == []


@pytest.mark.parametrize("tolerance", [1e-3, 1e-9])
def test_an_equilibrium_at_0_is_no_reason_to_worry(tolerance):
    """x and y end at 0, where neither tells its own size: what they started from does."""
    game = bl.Game(
        x=bl.Player(lambda x, y: x.square().sum() + y.square().sum(), torch.ones(2, dtype=D)),
        y=bl.Player(lambda x, y: (y - x).square().sum(), torch.full((2,), -1.0, dtype=D)),
    )
    response = bl.Implicit(DESCENT, steps=200, tolerance=tolerance)
    found = bl.solve(game, y=response, optimizer=partial(torch.optim.SGD, lr=0.2), steps=60)
    assert not found.warnings and float(found.variables["x"].abs().max()) < 1e-2


def test_a_far_game_among_many_is_named():
    one = bowl(torch.ones(2, dtype=D), 1.0)
    starts = torch.tensor([[1.0, 1.0], [1e6, 1e6], [2.0, 2.0]], dtype=D)
    games = bl.Games(one, 3, init={"y": starts})
    with pytest.warns(NonConvergenceWarning, match="in 1 of 3 games, the worst being game 1"):
        found = bl.solve(games, y=bl.Implicit(DESCENT, steps=1000), steps=1)
    assert [len(alone.warnings) for alone in found] == [0, 1, 0]


@pytest.mark.parametrize("solver", [bl.GMRES(), bl.linear.Dense()], ids=repr)
def test_a_hilltop_is_told_by_solvers_that_need_no_minimum(solver):
    """y = 0 is stationary and the loss's maximum; its derivative in x is right there, and nobody would stay."""
    game = bl.Game(
        x=bl.Player(lambda y: (y - 1.0) ** 2, torch.tensor(0.5, dtype=D)),
        y=bl.Player(lambda x, y: -0.5 * (y - x) ** 2 + (y - x) ** 4, torch.tensor(0.4, dtype=D)),
    )
    response = bl.Implicit(bl.ScipyRoot(), tolerance=1e-6, linear_solver=solver)
    y, _, told = answered(game, response)
    assert float((y - 0.5).abs()) < 1e-6
    assert [type(one) for one in told] == [UnreliableResponseWarning]
    assert "'y' is not at a minimum of its own loss" in str(told[0]) and "curvature is -1" in str(told[0])
    low = bl.Game(x=game.players["x"], y=bl.Player(game.players["y"].objective, torch.tensor(1.1, dtype=D)))
    y, _, told = answered(low, response)  # a minimum is at y - x = 1/2, with a curvature of 2
    assert float((y - 1.0).abs()) < 1e-6 and not told


SADDLES = [bl.GMRES(), bl.linear.Dense(), bl.linear.Extrapolated(bl.GMRES()), bl.ConjugateGradient(), bl.Neumann()]


@pytest.mark.parametrize("solver", SADDLES, ids=repr)
@pytest.mark.parametrize("seen", [0.1, 0.5, 0.9])
def test_a_saddle_is_told_though_the_way_the_leader_sees_curves_up(solver, seen):
    """A^-1 v weighs the directions of v by one over their curvatures: u'A u = 1 - seen^2 is above 0 at the saddle."""

    def follow(x, y):
        return 0.5 * (y[0] - x) ** 2 - 0.5 * y[1] ** 2 + 0.25 * y[1] ** 4

    game = bl.Game(
        x=bl.Player(lambda y: y[0] + seen * y[1], torch.tensor(0.2, dtype=D)),
        y=bl.Player(follow, torch.tensor([0.3, 0.0], dtype=D)),
    )
    response = bl.Implicit(partial(torch.optim.SGD, lr=0.5), steps=100, tolerance=1e-8, linear_solver=solver)
    if solver.tells_indefinite:
        with pytest.raises((bl.errors.IndefiniteSystemError, ConvergenceError)):
            answered(game, response)
        return
    _, _, told = answered(game, response)
    assert [type(warning) for warning in told] == [UnreliableResponseWarning]
    assert "'y' is not at a minimum of its own loss" in str(told[0])


@pytest.mark.parametrize("solver", [bl.GMRES(), bl.linear.Dense()], ids=repr)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_a_minimum_is_no_saddle_however_stiff(solver, condition):
    weights = torch.logspace(0.0, 1.0, 12, base=condition, dtype=D) / condition

    def follow(x, y):
        return 0.5 * (weights * (y - x) ** 2).sum()

    game = bl.Game(
        x=bl.Player(lambda y: (y * torch.linspace(1.0, 2.0, 12, dtype=D)).sum(), torch.ones(12, dtype=D)),
        y=bl.Player(follow, torch.zeros(12, dtype=D)),
    )
    _, _, told = answered(game, bl.Implicit(bl.ClosedForm(lambda x: x), linear_solver=solver))
    assert not [str(warning) for warning in told if "own loss" in str(warning)]


def bertrand(units=1.0):
    """Three firms with a logit demand; by hand 2.0386, and 1.7174 and 1.4251 in answer."""
    worth, cost = torch.tensor([3.0, 2.5, 2.0], dtype=D), torch.tensor([1.0, 1.0, 0.8], dtype=D)

    def loss(i):
        def profit(p1, p2, p3):
            p = torch.stack([p1, p2, p3])
            logits = torch.cat([torch.zeros(1, dtype=D), (worth - p) / 0.5])
            return -(p[i] - cost[i]) * torch.softmax(logits, 0)[i + 1] * (units if i == 2 else 1.0)

        return profit

    two = torch.tensor(2.0, dtype=D)
    players = {f"p{i + 1}": bl.Player(loss(i), two) for i in range(3)}
    return bl.Game(**players).joined(rest=("p2", "p3"))


@pytest.mark.slow
@pytest.mark.parametrize("units", [1.0, 100.0])
def test_a_zero_where_demand_has_died_out_is_told(units):
    """Powell's method walks to a price of 115, where each derivative of the profit is 1e-97."""
    response = bl.Implicit(bl.ScipyRoot(), tolerance=1e-9, linear_solver=bl.GMRES())
    descend = partial(torch.optim.SGD, lr=0.3)
    with pytest.warns(UnreliableResponseWarning, match="Player 'p3' has no curvature where it ended"):
        found = bl.solve(bertrand(), rest=response, optimizer=descend, steps=60)
    assert found.variables["rest"]["p3"] > 50.0
    # What descends finds the answer, in any units of one firm's profit, and nothing is told.
    descent = bl.Implicit(
        bl.inner.TorchOptimizer(partial(torch.optim.Adam, lr=0.1)),
        steps=3000,
        tolerance=1e-6,
        linear_solver=bl.linear.Dense(),
    )
    right = bl.solve(bertrand(units), rest=descent, optimizer=descend, steps=60)
    assert right.variables["p1"].item() == pytest.approx(2.0386, abs=2e-3) and not right.warnings
    assert right.variables["rest"]["p3"].item() == pytest.approx(1.4251, abs=2e-3)


def test_a_saturated_softmax_is_told():
    """A traveller on the cheaper of two roads in logits, without congestion: at infinity, and flat on the way there."""
    game = bl.Game(
        x=bl.Player(lambda x, y: -x * y.softmax(0)[0], torch.tensor(0.5, dtype=D)),
        y=bl.Player(lambda x, y: (1.0 + x) * y.softmax(0)[0] + y.softmax(0)[1], torch.tensor([0.0, 0.0], dtype=D)),
    )
    ends = bl.ClosedForm(lambda x: torch.tensor([-12.0, 12.0], dtype=D))
    response = bl.Implicit(ends, tolerance=1e-9, linear_solver=bl.GMRES())
    y, _, told = answered(game, response)
    assert float(y.softmax(0)[0]) < 1e-9
    assert any("'y' has no curvature where it ended" in str(one) for one in told)


def test_a_constrained_follower_whose_largest_slope_hides_another_is_told():
    """One coordinate in thousandths: it has used up the gradient's norm, and the other one has hardly moved."""
    scale = torch.tensor([1e-3, 1.0], dtype=D)

    def follow(x, y):
        return 0.5 * (y / scale - x).square().sum()

    def lead(y):
        return 0.5 * (y / scale).square().sum()

    game = bl.Game(
        x=bl.Player(lead, torch.tensor([-0.9, -0.5], dtype=D)),
        y=bl.Player(follow, torch.zeros(2, dtype=D), domain=bl.Box(-0.7 * scale, 0.9 * scale)),
    )
    x = torch.tensor([-0.9, -0.5], dtype=D, requires_grad=True)

    def hypergradient(response):
        y, _ = response(game, {"x": x}, response.init(game))
        return torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)[0]

    with pytest.warns(NonConvergenceWarning, match="'y' is not at its optimum, although its gradient is within"):
        hypergradient(bl.Implicit(bl.inner.ProjectedGradient()))
    # The second follows x1, and the first is held at its bound.
    found = hypergradient(bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-9))
    torch.testing.assert_close(found, torch.tensor([0.0, -0.5], dtype=D), rtol=1e-6, atol=1e-9)
