"""A follower that owns its residual: projected, at a fixed point, among others; differentiated where it rests."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam

import bilevel as bl
from bilevel.extend import UserResidual

D = torch.float64
CURVATURE = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.5]], dtype=D)
STEP = 0.3  # below 2 / the largest eigenvalue of CURVATURE, 2.2: the projected gradient method converges
LOW, HIGH = 0.0, 1.0
X = torch.tensor([1.5, -0.5, 0.9], dtype=D)
AIM = torch.tensor([0.3, 0.2, -0.4], dtype=D)


def follow(x, y):
    return 0.5 * y @ CURVATURE @ y - x @ y


def projected(y, gradient):
    return y - (y - STEP * gradient).clamp(LOW, HIGH)


def lead(x, y):
    return ((y - AIM) ** 2).sum() + 0.1 * (x**2).sum()


def game(residual=projected):
    return bl.Game(x=bl.Player(lead, X), y=bl.Player(follow, torch.full((3,), 0.5, dtype=D), residual=residual))


def active_set(x):
    """The box-constrained optimum by enumeration: which entries are at LOW, at HIGH, free; KKT holds for one of 27."""
    for code in range(27):
        kinds = [(code // 3**i) % 3 for i in range(3)]  # 0 low, 1 high, 2 free
        free = [i for i, kind in enumerate(kinds) if kind == 2]
        y = torch.tensor([LOW if kind == 0 else HIGH for kind in kinds], dtype=D)
        if free:
            rest = x[free] - (CURVATURE[free] @ torch.where(torch.tensor([k == 2 for k in kinds]), 0.0, y))
            y[free] = torch.linalg.solve(CURVATURE[free][:, free], rest)
        slope = CURVATURE @ y - x
        good = all(
            (kind == 0 and slope[i] >= 0) or (kind == 1 and slope[i] <= 0) or (kind == 2 and LOW < y[i] < HIGH)
            for i, kind in enumerate(kinds)
        )
        if good:
            return y, free
    raise AssertionError("a convex programme has an optimum")


def exact(x):
    """The optimum, and the leader's derivative: free entries move by the inverse of their own block, others do not."""
    y, free = active_set(x)
    slope = 0.2 * x
    slope[free] = slope[free] + torch.linalg.solve(CURVATURE[free][:, free], (2.0 * (y - AIM))[free])
    return y, slope


def hypergradient(response, played=None, x=X):
    played = game() if played is None else played
    x = x.clone().requires_grad_()
    y, state = response(played, {"x": x}, response.init(played))
    (slope,) = torch.autograd.grad(played.loss("x", {"x": x, "y": y}), x)
    return y.detach(), slope, response.after_backward(state, y)


SOLVERS = {
    "projected gradient": (partial(SGD, lr=1.0), {}),
    "scipy": (bl.ScipyRoot(options={"xtol": 1e-14}), {}),
    "closed form": (bl.ClosedForm(lambda x: active_set(x)[0]), {}),
}


def test_the_case_has_entries_at_both_bounds_and_a_free_one():
    y, free = active_set(X)
    assert (len(free) == 1 and {float(v) for i, v in enumerate(y) if i not in free} == {LOW, HIGH}) or len(free) == 2


@pytest.mark.parametrize("inner", SOLVERS)
@pytest.mark.parametrize("solver", [bl.GMRES(rtol=1e-12), bl.linear.Dense()], ids=["GMRES", "Dense"])
def test_a_projected_follower_is_differentiated_at_its_constrained_optimum(inner, solver):
    optimizer, options = SOLVERS[inner]
    response = bl.Implicit(optimizer, steps=500, tolerance=1e-11, linear_solver=solver, **options)
    y, slope, state = hypergradient(response)
    wanted, derivative = exact(X)
    # 1e-11 of the residual at the start, over 1 - |I - step CURVATURE| >= .2: a contraction's error bound.
    torch.testing.assert_close(y, wanted, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(slope, derivative, rtol=0.0, atol=1e-9)
    assert state["stationarity"] <= 1e-11 and response.report(state).residual <= 1e-9


def test_its_hypergradient_is_that_of_re_solved_followers():
    _, slope, _ = hypergradient(
        bl.Implicit(partial(SGD, lr=1.0), steps=500, tolerance=1e-12, linear_solver=bl.GMRES(rtol=1e-12))
    )

    def value(x):
        return lead(x, active_set(x)[0])

    h = 1e-5
    differences = torch.stack([(value(X + h * e) - value(X - h * e)) / (2 * h) for e in torch.eye(3, dtype=D)])
    torch.testing.assert_close(slope, differences, rtol=0.0, atol=1e-9)  # piecewise quadratic: exact but for rounding


def test_unrolling_the_projected_gradient_method_ends_there_too():
    y, slope, _ = hypergradient(bl.Unrolled(partial(SGD, lr=1.0), steps=400))
    wanted, derivative = exact(X)
    torch.testing.assert_close(y, wanted, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(slope, derivative, rtol=0.0, atol=1e-9)


def test_transforms_and_second_derivatives_see_the_constrained_optimum():
    played = game()
    response = bl.Implicit(
        partial(SGD, lr=1.0), steps=500, tolerance=1e-12, linear_solver=bl.GMRES(rtol=1e-13), warm_start=False
    )
    state = response.init(played)

    def value(x):
        return lead(x, response(played, {"x": x}, state)[0])

    points = torch.stack([X, X + torch.tensor([0.05, -0.1, 0.02], dtype=D)])
    together = torch.func.vmap(torch.func.grad(value))(points)
    for row, point in zip(together, points, strict=True):
        torch.testing.assert_close(row, exact(point)[1], rtol=0.0, atol=1e-9)
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(x), x, create_graph=True)
    second = torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in slope])
    _, free = active_set(X)
    moves = torch.zeros(3, 3, dtype=D)
    for i, row in zip(free, torch.linalg.inv(CURVATURE[free][:, free]), strict=True):
        moves[i, free] = row
    torch.testing.assert_close(second, 2.0 * moves.T @ moves + 0.2 * torch.eye(3, dtype=D), rtol=0.0, atol=1e-8)


def test_a_run_moves_the_leader_along_the_constrained_hypergradient():
    response = bl.Implicit(partial(SGD, lr=1.0), steps=500, tolerance=1e-11, linear_solver=bl.GMRES(rtol=1e-11))
    found = bl.solve(game(), y=response, optimizer=partial(SGD, lr=0.4), steps=300)
    x, y = found.variables["x"], found.variables["y"]
    torch.testing.assert_close(y, active_set(x)[0], rtol=0.0, atol=1e-9)
    # Where an entry is held the leader's curvature is .2: 300 steps of .4 contract by (1 - .08)^300 = 1e-11.
    assert not found.warnings and exact(x)[1].norm() < 1e-8


def test_without_symmetry_conjugate_gradients_are_refused_and_with_its_promise_taken():
    with pytest.raises(bl.errors.NotSymmetricError, match=r"'y'.*no symmetric Jacobian.*GMRES"):
        hypergradient(bl.Implicit(partial(SGD, lr=1.0), linear_solver=bl.ConjugateGradient()))
    plain = UserResidual(lambda x, y: CURVATURE @ y - x, symmetric=True)
    free = bl.Game(x=bl.Player(lead, X), y=bl.Player(follow, torch.zeros(3, dtype=D), residual=plain))
    response = bl.Implicit(
        partial(SGD, lr=0.5), steps=500, tolerance=1e-12, linear_solver=bl.ConjugateGradient(rtol=1e-12)
    )
    y, slope, _ = hypergradient(response, free)
    wanted = torch.linalg.solve(CURVATURE, X)
    torch.testing.assert_close(y, wanted, rtol=0.0, atol=1e-10)
    torch.testing.assert_close(
        slope, 0.2 * X + torch.linalg.solve(CURVATURE, 2.0 * (wanted - AIM)), rtol=0.0, atol=1e-9
    )


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (bl.Implicit(LBFGS, linear_solver=bl.GMRES()), r"LBFGS minimises one loss"),
        (bl.Implicit(bl.Scipy("L-BFGS-B"), linear_solver=bl.GMRES()), r"Scipy\('L-BFGS-B'\) minimises one loss"),
        (bl.Hypernetwork(partial(Adam, lr=1e-2)), r"Hypernetwork goes by the loss of player 'y'"),
    ],
    ids=["LBFGS", "Scipy", "Hypernetwork"],
)
def test_what_goes_by_the_loss_is_refused_by_name(response, text):
    with pytest.raises(TypeError, match=text):
        hypergradient(response)


@pytest.mark.parametrize("ask", [bl.certify, bl.certify_nash, bl.exploitability], ids=lambda f: f.__name__)
def test_certificates_do_not_take_its_rest_for_a_minimum(ask):
    point = {"x": X, "y": active_set(X)[0]}
    with pytest.raises(ValueError, match="'y' rests where a residual of its own vanishes"):
        ask(game(), point)


def test_the_check_of_hypergradients_says_that_it_cannot_re_solve_it():
    response = bl.Implicit(partial(SGD, lr=1.0), linear_solver=bl.GMRES())
    with pytest.raises(ValueError, match="'y' rests where a residual of its own vanishes"):
        bl.testing.check_hypergradient(game(), response)


def test_a_module_and_a_batch_reach_a_residual_and_buffers_advance_once():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    inputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=D)

    def call(weights, batch):
        return torch.func.functional_call(model, weights, (batch,))

    def train(decay, weights, batch):
        return call(weights, batch).square().mean() + sum((decay.exp() * w.square()).sum() for w in weights.values())

    def fixed(decay, weights, gradient, batch):
        return {name: 0.1 * slope + 0.0 * batch.sum() for name, slope in gradient.items()}

    played = bl.Game(
        decay=bl.Player(lambda weights, batch: call(weights, batch).mean(), torch.tensor(-1.0, dtype=D), [inputs]),
        weights=bl.Player(train, model, [inputs], residual=fixed),
    )
    response = bl.Unrolled(partial(SGD, lr=1.0), steps=5)
    state = response.init(played)
    _, state = response(played, {"decay": torch.tensor(-1.0, dtype=D)}, state)
    assert int(state["buffers"]["0.num_batches_tracked"]) == 5


def test_joined_players_stack_their_own_residuals():
    """Two firms with capacities: a corner for one of them, where the other answers to what it can sell."""

    def objective(mine, theirs):
        source = f"def loss(tax, {mine}, {theirs}): return -({mine} * (9.0 - tax - {mine} - {theirs}))"
        scope: dict = {}
        exec(source, scope)
        return scope["loss"]

    def capacity(name, most):
        scope: dict = {}
        exec(f"def rests({name}, gradient): return {name} - ({name} - .4 * gradient).clamp(0.0, {most})", scope)
        return scope["rests"]

    one = torch.tensor(1.0, dtype=D)
    played = bl.Game(
        tax=bl.Player(lambda tax, a, b: -tax * (a + b), one),
        a=bl.Player(objective("a", "b"), one, residual=capacity("a", 1.5)),
        b=bl.Player(objective("b", "a"), one, residual=capacity("b", 10.0)),
    ).joined(firms=("a", "b"))
    response = bl.Implicit(partial(SGD, lr=1.0), steps=500, tolerance=1e-12, linear_solver=bl.linear.Dense())
    tax = one.clone().requires_grad_()
    firms, _ = response(played, {"tax": tax}, response.init(played))
    # a is at its capacity 1.5 (it would like (8 - b) / 2 > 1.5), and b answers (9 - tax - 1.5) / 2.
    torch.testing.assert_close(firms["a"], 1.5 * one)
    torch.testing.assert_close(firms["b"], 3.25 * one)
    (slope,) = torch.autograd.grad(firms["a"] + firms["b"], tax)
    torch.testing.assert_close(slope, -0.5 * one)


def test_many_games_rest_each_where_it_rests_alone():
    starts = torch.stack([X, X + 0.3, -X])
    games = bl.Games(game(), 3, init={"x": starts})
    response = bl.Implicit(partial(SGD, lr=1.0), steps=500, tolerance=1e-11, linear_solver=bl.GMRES(rtol=1e-12))
    x = games.initial("x").requires_grad_()
    y, _ = response(games, {"x": x}, response.init(games))
    games.loss("x", {"x": x, "y": y}).sum().backward()
    for index, start in enumerate(starts):
        wanted, derivative = exact(start)
        torch.testing.assert_close(y[index].detach(), wanted, rtol=0.0, atol=1e-9)
        torch.testing.assert_close(x.grad[index], derivative, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize(
    ("residual", "error", "text"),
    [
        (1.0, TypeError, "residual is a float; expected a function"),
        (lambda *y: y, TypeError, r"parameter '\*y' of the residual cannot be named"),
        (lambda y, z: y, ValueError, "its residual has a parameter 'z', which names no player"),
        (lambda y, gradient: gradient.sum(), ValueError, r"its residual returned \(\); expected.*\(3,\)"),
        (lambda y, gradient: gradient / 0.0, ValueError, "residual at init.*NaN or infinite"),
        (lambda y, gradient: gradient.float(), ValueError, r"residual at init is torch\.float32"),
        (lambda x, y: x, ValueError, "its residual does not depend on its own variables"),
        (lambda x, y: (x - y).detach(), ValueError, "its residual is not differentiable"),
    ],
)
def test_a_residual_that_cannot_be_meant_is_refused_before_any_work(residual, error, text):
    with pytest.raises(error, match=text):
        game(residual)


def test_a_residual_that_nobody_moves_is_no_followers():
    with pytest.raises(ValueError, match="its residual does not depend on 'x', who moves before"):
        bl.Unrolled(partial(SGD, lr=1.0)).init(game(lambda y: y - 1.0))


def test_no_name_of_a_player_reaches_an_optimisers_own_options():
    def loss(weight_decay, y):
        return ((y - 2.0) ** 2).sum() + weight_decay * (y**2).sum()

    played = bl.Game(
        weight_decay=bl.Player(lambda y: ((y - 1.0) ** 2).sum(), torch.tensor(0.5, dtype=D)),
        y=bl.Player(loss, torch.zeros(2, dtype=D)),
    )
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=400)
    x = torch.tensor(0.5, dtype=D, requires_grad=True)
    y, _ = response(played, {"weight_decay": x}, response.init(played))
    (slope,) = torch.autograd.grad(played.loss("weight_decay", {"y": y}), x)
    # y = 2 / (1 + x), so that d/dx of 2 (y - 1)^2 is -8 (y - 1) / (1 + x)^2 = -32/27.
    torch.testing.assert_close(slope, torch.tensor(-32.0 / 27.0, dtype=D))
