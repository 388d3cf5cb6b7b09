"""Followers constrained by functions: values, multipliers and derivatives against closed forms and re-solved followers.

Answers are polished to rounding: with curvatures and gradients of size 1 to 10, 1e-10 is far above what it leaves.
"""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.optim import LBFGS, SGD, Adam

import bilevel as bl

from ..testing.mutants import FunctionsUnseen

D = torch.float64
INNER = {
    "SLSQP": bl.Scipy("SLSQP"),
    "trust-constr": bl.Scipy("trust-constr"),
}


def tensor(*values):
    return torch.tensor(values, dtype=D)


def answer(game, response=None, **others):
    """The answer, the state after it, and the hypergradient of the first player's loss in its own variables."""
    response = bl.Implicit(bl.Scipy("SLSQP")) if response is None else response
    leader, follower = game.names[0], game.names[-1]
    given = {name: others.get(name, game.initial(name)) for name in game.names[:-1]}
    given[leader] = given[leader].clone().requires_grad_()
    y, state = response(game, given, response.init(game))
    (slope,) = torch.autograd.grad(game.loss(leader, {**given, follower: y}), given[leader])
    return y.detach(), state, slope


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=atol)


# Closed forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER)
def test_a_firm_at_its_capacity_stays_there_and_its_multiplier_is_what_more_of_it_would_earn(inner):
    """Cournot: price 10 - q1 - q2, costs 1 and 2, a capacity of 1. At q1 = 4 the second would like 2; it makes 1."""

    def first(q1, q2):
        return -q1 * (10.0 - q1 - q2 - 1.0)

    def second(q1, q2):
        return -q2 * (10.0 - q1 - q2 - 2.0)

    game = bl.Game(
        q1=bl.Player(first, torch.tensor(4.0, dtype=D)),
        q2=bl.Player(second, torch.tensor(0.5, dtype=D), inequality=lambda q2: q2 - 1.0),
    )
    response = bl.Implicit(INNER[inner])
    y, state, slope = answer(game, response)
    close(y, torch.tensor(1.0, dtype=D))
    close(state["multipliers"]["inequality"], torch.tensor(2.0, dtype=D))  # 8 - 4 - 2 * 1
    close(slope, torch.tensor(0.0, dtype=D))  # -(9 - 2 * 4 - 1): where the second does not move, 4 is the first's best
    _, state, slope = answer(game, response, q1=torch.tensor(7.0, dtype=D))
    close(state["multipliers"]["inequality"], torch.tensor(0.0, dtype=D))
    # It makes (8 - q1) / 2 = .5: d/dq1 of -q1 (9 - q1 - (8 - q1) / 2) is q1 - 5.
    close(slope, torch.tensor(2.0, dtype=D))


CURVATURE = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.5]], dtype=D)
ROWS = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]], dtype=D)


def quadratic(x, y):
    return 0.5 * y @ CURVATURE @ y - x @ y


@pytest.mark.parametrize("inner", INNER)
def test_an_equality_constrained_quadratic_is_its_kkt_matrix(inner):
    level = tensor(1.0, -0.5)
    game = bl.Game(
        x=bl.Player(lambda x, y: (y**3).sum() + (x * x).sum(), tensor(1.0, -2.0, 0.5)),
        y=bl.Player(quadratic, torch.zeros(3, dtype=D), equality=lambda x, y: ROWS @ y - level - x[:2]),
    )
    x = game.initial("x")
    y, state, slope = answer(game, bl.Implicit(INNER[inner]))
    K = torch.zeros(5, 5, dtype=D)
    K[:3, :3], K[:3, 3:], K[3:, :3] = CURVATURE, ROWS.T, ROWS
    wanted = torch.linalg.solve(K, torch.cat([x, level + x[:2]]))
    close(y, wanted[:3])
    close(state["multipliers"]["equality"], wanted[3:])
    J = torch.linalg.solve(K, torch.cat([torch.eye(3, dtype=D), torch.eye(2, 3, dtype=D)]))[:3]
    close(slope, 2.0 * x + J.T @ (3.0 * y * y))
    assert state["stationarity"] < 1e-12


@pytest.mark.parametrize("inner", INNER)
def test_a_ball_turns_the_answer_on_its_surface(inner):
    """min |y - x|^2 / 2 within |y| <= r is r x / |x|, and d/dx of it r (1 - u u') / |x|: the constraint curves."""
    game = bl.Game(
        x=bl.Player(lambda x, y: tensor(1.0, 2.0, 3.0) @ y, tensor(3.0, -1.0, 2.0)),
        y=bl.Player(
            lambda x, y: 0.5 * ((y - x) ** 2).sum(),
            torch.zeros(3, dtype=D),
            inequality=lambda y: (y * y).sum() - 4.0,
        ),
    )
    x = game.initial("x")
    y, state, slope = answer(game, bl.Implicit(INNER[inner]))
    u = x / x.norm()
    close(y, 2.0 * u)
    close(state["multipliers"]["inequality"], (x.norm() / 2.0 - 1.0) / 2.0)
    close(slope, 2.0 / x.norm() * (torch.eye(3, dtype=D) - torch.outer(u, u)) @ tensor(1.0, 2.0, 3.0))


def test_a_transport_with_balances_moves_along_them():
    """Two plants, two towns, quadratic costs; a town's need is the leader's; its multiplier is the price."""
    cost, have = torch.tensor([[1.0, 3.0], [2.0, 1.5]], dtype=D), tensor(3.0, 2.5)

    def work(flow):
        return (0.5 * flow**2 + cost * flow).sum()

    def towns(need, flow):
        return {"towns": flow.sum(0) - need}

    def plants(flow):
        return {"plants": flow.sum(1) - have, "positive": -flow}

    game = bl.Game(
        need=bl.Player(lambda need, flow: (flow**2).sum() - 3.0 * need.sum(), tensor(2.0, 1.0)),
        flow=bl.Player(work, torch.full((2, 2), 0.5, dtype=D), inequality=plants, equality=towns),
    )
    y, state, slope = answer(game)
    # Town 0: f00 + 1 = f10 + 2 = its price, f00 + f10 = 2: 1.5 and .5. Town 1: 0 + 3 > 1 + 1.5: all of 1 from plant 1.
    close(y, torch.tensor([[1.5, 0.0], [0.5, 1.0]], dtype=D))
    close(state["multipliers"]["equality"]["towns"], tensor(-2.5, -2.5))
    close(state["multipliers"]["inequality"]["positive"], torch.tensor([[0.0, 0.5], [0.0, 0.0]], dtype=D))
    close(slope, tensor(-3.0 + 2.0 * 1.5 * 0.5 + 2.0 * 0.5 * 0.5, -3.0 + 2.0))


# Derivatives ----------------------------------------------------------------------------------------------------------


def bent(x, y):
    return 0.5 * y @ CURVATURE @ y - x @ y + 0.1 * (y**4).sum()


def cut(x, y):
    return torch.stack([y[0] ** 2 + y[1] ** 2 - 0.05 - 0.01 * x[2], y[1] - x[0] * y[2] - 5.0])


def bent_game():
    return bl.Game(
        x=bl.Player(lambda x, y: (y**3).sum() + 0.1 * (x**2).sum(), tensor(1.5, 0.7, 0.9)),
        y=bl.Player(
            bent, torch.zeros(3, dtype=D), inequality=cut, equality=lambda x, y: y.exp().sum() - 3.0 - 0.2 * x[1]
        ),
    )


@pytest.mark.slow
def test_a_nonlinear_follower_is_differentiated_as_its_re_solved_selves():
    game, response = bent_game(), bl.Implicit(bl.Scipy("SLSQP"))
    x = game.initial("x")
    _, state, slope = answer(game)
    assert state["multipliers"]["inequality"].gt(0).tolist() == [True, False]

    def value(x):
        with torch.no_grad():
            y, _ = response(game, {"x": x}, response.init(game))
        return game.loss("x", {"x": x, "y": y})

    h = 1e-4
    differences = torch.stack([(value(x + h * e) - value(x - h * e)) / (2.0 * h) for e in torch.eye(3, dtype=D)])
    close(slope, differences, atol=1e-7)  # h^2 times third derivatives of size 10


@pytest.mark.slow
def test_second_derivatives_and_transforms_see_the_constraints():
    game, response = bent_game(), bl.Implicit(bl.Scipy("SLSQP"))
    state = response.init(game)

    def value(x):
        return game.loss("x", {"x": x, "y": response(game, {"x": x}, state)[0]})

    x = game.initial("x")
    _, _, slope = answer(game)
    close(grad(value)(x), slope)
    points = torch.stack([x, x + tensor(0.1, -0.1, 0.05)])
    for row, point in zip(vmap(grad(value))(points), points, strict=True):
        close(row, answer(game, x=point)[2])
    point = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(point), point, create_graph=True)
    second = torch.stack([torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in first])
    h = 1e-4
    rows = [(answer(game, x=x + h * e)[2] - answer(game, x=x - h * e)[2]) / (2.0 * h) for e in torch.eye(3, dtype=D)]
    close(second, torch.stack(rows), atol=1e-6)
    close(second, second.T, atol=1e-8)


def random_programme(seed):
    """A convex quadratic programme in y, moved in all its parts by x: matrices and where it starts."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=D)

    n, m, k = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 9), (1, 7), (1, 5)))
    p = min(int(torch.randint(0, 3, (1,), generator=g)), n - 1)
    root, spread = normal(n, n), 10.0 ** float(4.0 * torch.rand(1, generator=g) - 2.0)
    H = root @ root.T + 10.0 ** float(3.0 * torch.rand(1, generator=g) - 2.0) * torch.eye(n, dtype=D)
    A, B, E, F, Q, inside = normal(m, n), normal(m, k), normal(p, n), normal(p, k), normal(n, k), normal(n)
    b = A @ inside + torch.rand(m, generator=g, dtype=D) * spread
    return H, 5.0 * spread * normal(n), Q, A, b, B, E, E @ inside, F, normal(n), torch.zeros(k, dtype=D)


def enumerated(H, q, A, b, E, d):
    """The optimum, by trying all sets of binding constraints."""
    n, m = len(q), len(b)
    for count in range(min(m, n - len(d)) + 1):
        for chosen in itertools.combinations(range(m), count):
            rows = torch.cat([A[list(chosen)], E])
            K = torch.zeros(n + len(rows), n + len(rows), dtype=D)
            K[:n, :n], K[:n, n:], K[n:, :n] = H, rows.T, rows
            z, singular = torch.linalg.solve_ex(K, torch.cat([-q, b[list(chosen)], d]))
            slack = 1e-9 * (1.0 + float(z[:n].abs().max()))
            if not int(singular) and bool((A @ z[:n] <= b + slack).all()) and bool((z[n : n + count] >= -1e-9).all()):
                return z[:n]
    return None


@pytest.mark.parametrize("seed", range(40))
def test_random_quadratic_programmes_and_leaders(seed):
    H, q, Q, A, b, B, E, d, F, w, x = random_programme(seed)

    def lead(x, y):
        return w @ y + 0.5 * (y * y).sum() + 0.0 * x.sum()

    game = bl.Game(
        x=bl.Player(lead, x),
        y=bl.Player(
            lambda x, y: 0.5 * y @ H @ y + (q + Q @ x) @ y,
            torch.zeros_like(q),
            inequality=lambda x, y: A @ y - b - B @ x,
            equality=(lambda x, y: E @ y - d - F @ x) if len(d) else None,
        ),
    )
    y, _, slope = answer(game)

    def solved(x):
        return enumerated(H, q + Q @ x, A, b + B @ x, E, d + F @ x)

    wanted, h = solved(x), 1e-5
    close(y / (1.0 + wanted.abs().max()), wanted / (1.0 + wanted.abs().max()), atol=1e-9)
    steps = torch.eye(len(x), dtype=D) * h
    differences = torch.stack([(lead(x, solved(x + e)) - lead(x, solved(x - e))) / (2.0 * h) for e in steps])
    # The value is piecewise quadratic: exact but for rounding, eps |value| / h.
    size = 1.0 + float(differences.norm()) + float(wanted.square().sum())
    close(slope / size, differences / size, atol=1e-8)


# A run ----------------------------------------------------------------------------------------------------------------


def toll_game():
    """A road with a capacity: who tolls it earns most where the capacity just does not bind, or where it does."""
    return bl.Game(
        toll=bl.Player(lambda toll, flow: -(toll * flow).sum(), tensor(0.5, 0.5)),
        flow=bl.Player(
            lambda toll, flow: (0.5 * flow**2 - (tensor(4.0, 4.0) - toll) * flow).sum(),
            torch.zeros(2, dtype=D),
            inequality=lambda flow: {"road": flow[0] - 1.0, "both": flow.sum() - 3.5},
        ),
    )


def test_a_run_gives_multipliers_and_prints_them():
    # Road 0 is full at toll 3 and below; the other earns most at toll 2 and flow 2.
    solution = bl.solve(toll_game(), flow=bl.Implicit(bl.Scipy("SLSQP")), optimizer=lambda p: SGD(p, lr=0.3), steps=60)
    close(solution.variables["flow"][1], torch.tensor(2.0, dtype=D), atol=1e-6)
    found = solution.multipliers["flow"]["inequality"]
    assert set(found) == {"road", "both"} and float(found["both"]) == 0.0
    assert "Multipliers of flow's inequality['road'] (" in str(solution)
    assert "multipliers" in solution.states["flow"] and solution.stationarity["flow"] < 1e-10


def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path):
    def run(steps, path):
        return bl.solve(
            toll_game(),
            flow=bl.Implicit(bl.Scipy("SLSQP")),
            optimizer=lambda p: Adam(p, lr=0.1),
            steps=steps,
            checkpoint=path,
        )

    run(5, tmp_path / "a")
    resumed, whole = run(10, tmp_path / "a"), run(10, tmp_path / "b")
    assert torch.equal(resumed.variables["toll"], whole.variables["toll"])
    assert torch.equal(
        resumed.multipliers["flow"]["inequality"]["road"], whole.multipliers["flow"]["inequality"]["road"]
    )


@pytest.mark.slow
def test_many_games_rest_each_where_it_rests_alone():
    game = bent_game()
    starts = torch.stack([game.initial("x"), game.initial("x") - 0.3, tensor(-1.0, 0.2, 0.4)])
    games = bl.Games(game, 3, init={"x": starts})
    response = bl.Implicit(bl.Scipy("SLSQP"))
    x = games.initial("x").requires_grad_()
    y, state = response(games, {"x": x}, response.init(games))
    games.loss("x", {"x": x, "y": y}).sum().backward()
    for index, start in enumerate(starts):
        alone, single, slope = answer(game, x=start)
        close(y[index].detach(), alone)
        close(x.grad[index], slope, atol=1e-9)
        close(state["multipliers"]["inequality"][index], single["multipliers"]["inequality"])
    ends = bl.solve(games, y=response, optimizer=lambda p: SGD(p, lr=0.05), steps=3)
    assert ends[1].multipliers["y"]["inequality"].shape == (2,)


def test_a_module_with_data_may_be_constrained():
    model = nn.Linear(2, 1).double()
    inputs = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    target = inputs @ tensor(2.0, -1.0)

    def train(decay, weights, batch):
        return (weights(batch)[:, 0] - target).square().mean() + decay * weights["bias"].square().sum()

    def budget(weights, batch):
        return weights["weight"].square().sum() - 1.0 + 0.0 * batch.sum()

    game = bl.Game(
        decay=bl.Player(lambda decay, weights: weights["weight"].sum() + decay, torch.tensor(0.3, dtype=D)),
        weights=bl.Player(train, model, [inputs], inequality=budget),
    )
    response = bl.Implicit(bl.Scipy("SLSQP"))
    decay = torch.tensor(0.3, dtype=D, requires_grad=True)
    weights, state = response(game, {"decay": decay}, response.init(game))
    close(weights["weight"].detach().norm(), torch.tensor(1.0, dtype=D))
    assert float(state["multipliers"]["inequality"]) > 0.0
    assert torch.autograd.grad(weights["weight"].sum(), decay)[0].isfinite()


def test_float32_rests_as_well_as_it_can():
    game = bl.Game(
        x=bl.Player(lambda y: (y**2).sum(), torch.tensor([2.0, 0.2])),
        y=bl.Player(lambda x, y: ((y - x) ** 2).sum(), torch.zeros(2), inequality=lambda y: y - 1.0),
    )
    y, state, slope = answer(game)
    assert y.dtype == slope.dtype == state["multipliers"]["inequality"].dtype == torch.float32
    torch.testing.assert_close(y, torch.tensor([1.0, 0.2]))
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.4]))


# Kinks ----------------------------------------------------------------------------------------------------------------


def at_a_kink(weight=1.0):
    """y = min(x, 1) at x = 1: a derivative of 1 on the left and of 0 on the right."""
    return bl.Game(
        x=bl.Player(lambda x, y: weight * y.sum() + 0.0 * x.sum(), tensor(1.0, 0.3)),
        y=bl.Player(lambda x, y: 0.5 * ((y - x) ** 2).sum(), torch.zeros(2, dtype=D), inequality=lambda y: y - 1.0),
    )


def test_a_kink_is_told_with_its_constraint_and_both_derivatives():
    with pytest.warns(bl.errors.KinkWarning, match=r"inequality\[0\] \(multiplier 0, slack") as told:
        _, _, slope = answer(at_a_kink())
    (text,) = {str(w.message) for w in told}
    sides = re.findall(r"d/d x = \[(.*?)\]", text)
    assert {tuple(map(float, side.split(", "))) for side in sides} == {(1.0, 1.0), (0.0, 1.0)}
    assert tuple(slope.tolist()) == tuple(map(float, sides[0].split(", ")))


def test_a_kink_in_one_of_many_games_is_told_of_that_one():
    games = bl.Games(at_a_kink(), 3, init={"x": torch.tensor([[0.5, 0.3], [1.0, 0.3], [2.0, 0.3]], dtype=D)})
    response = bl.Implicit(bl.Scipy("SLSQP"))
    x = games.initial("x").requires_grad_()
    y, _ = response(games, {"x": x}, response.init(games))
    with pytest.warns(bl.errors.KinkWarning, match=r"in 1 of 3 games, in game 1 of inequality\[0\]") as told:
        y.sum().backward()
    assert [w.message.games for w in told] == [[1]]
    close(x.grad[[0, 2]], torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=D))


def test_constrained_followers_of_constrained_followers():
    game = bl.Game(
        a=bl.Player(lambda a, b, c: (b**2).sum() + (c**2).sum() + 0.0 * a.sum(), tensor(1.0, 2.0)),
        b=bl.Player(
            lambda a, b, c: ((b - a) ** 2).sum() + 0.5 * (c * b).sum(), torch.zeros(2, dtype=D),
            inequality=lambda b: b - 1.3,
        ),
        c=bl.Player(
            lambda b, c: ((c - b) ** 2).sum(), torch.zeros(2, dtype=D), inequality=lambda c: c.sum() - 1.0
        ),
    )  # fmt: skip
    from bilevel.solving.followers import Followers

    response = bl.Implicit(bl.Scipy("SLSQP"))
    followers = Followers(game, {"b": response, "c": response})
    states = followers.init(0)

    def value(a):
        return game.loss("a", followers.respond({"a": a}, states, {})[0])

    a, h = tensor(1.0, 2.0).requires_grad_(), 1e-5
    (slope,) = torch.autograd.grad(value(a), a)
    with torch.no_grad():
        differences = [(value(a + h * e) - value(a - h * e)) / (2.0 * h) for e in torch.eye(2, dtype=D)]
    close(slope, torch.stack(differences), atol=1e-8)
    close(slope[1], torch.tensor(0.0, dtype=D))  # b[1] is at 1.3


def test_who_does_not_see_the_kink_is_not_warned():
    answer(at_a_kink(0.0))
    game, response = at_a_kink(), bl.Implicit(bl.Scipy("SLSQP"))
    y, _ = response(game, {"x": game.initial("x").requires_grad_()}, response.init(game))
    y[1].backward()
    with torch.no_grad():
        response(game, {"x": game.initial("x")}, response.init(game))


def test_a_kink_inside_a_transform_is_told_without_numbers():
    game, response = at_a_kink(), bl.Implicit(bl.Scipy("SLSQP"))
    state = response.init(game)
    with pytest.warns(bl.errors.KinkWarning, match=r"inequality\[0\].*outside torch\.func"):
        grad(lambda x: response(game, {"x": x}, state)[0].sum())(game.initial("x"))


# What cannot be -------------------------------------------------------------------------------------------------------


def game_with(loss=None, start=(0.5, 0.25), **constraints):
    loss = loss or (lambda x, y: ((y - x) ** 2).sum())
    return bl.Game(
        x=bl.Player(lambda x, y: (y * y).sum(), tensor(2.0, 1.0)), y=bl.Player(loss, tensor(*start), **constraints)
    )


FAULTS = {
    "contradiction": (
        {"inequality": lambda y: torch.stack([y[0] - 1.0, 2.0 - y[0]])},
        bl.errors.InfeasibleError,
        r"'y'.*inequality\[[01]\] is .*wanted <= 0.*contradict",
    ),
    "contradicting balances": (
        {"equality": lambda x, y: {"supply": y.sum() - 1.0, "demand": y.sum() - 3.0}},
        bl.errors.InfeasibleError,
        r"equality\['(supply|demand)'\] is .*wanted = 0",
    ),
    "the same bound twice": (
        {"inequality": lambda y: torch.stack([y[0] - 1.0, 2.0 * y[0] - 2.0])},
        bl.errors.DependentConstraintsError,
        r"inequality\[0\], inequality\[1\] bind.*linearly dependent.*Drop",
    ),
    "a gradient that vanishes": (
        {"equality": lambda y: (y[0] - 1.0) ** 2},
        bl.errors.DependentConstraintsError,
        r"equality.*gradient is 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_follower_without_a_derivative_is_an_error_by_name(fault):
    constraints, error, text = FAULTS[fault]
    with pytest.raises(error, match=text):
        answer(game_with(**constraints))


def test_a_saddle_and_a_flat_loss_are_told_apart():
    with pytest.raises(bl.errors.CurvatureError, match="curves downwards"):
        # From 0, where both are stationary and the constraint is met: a maximum along it.
        answer(game_with(lambda x, y: -(y * y).sum() + 0.0 * x.sum(), (0.0, 0.0), equality=lambda y: y[0] - y[1]))
    with pytest.raises(bl.errors.CurvatureError, match=r"flat along.*strictly convex term"):
        answer(game_with(lambda x, y: x[0] * (y[0] + y[1]), inequality=lambda y: 1.0 - y[0] - y[1]))


def test_a_loss_that_falls_for_ever_is_told():
    with pytest.raises(bl.errors.UnboundedError, match=r"falls without bound.*Add the missing constraint"):
        answer(game_with(lambda x, y: -(x * y).sum(), inequality=lambda y: y[0] - 1.0))


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (bl.Implicit(LBFGS), "does not see the constraints of player 'y'.*SLSQP"),
        (bl.Implicit(bl.Scipy("BFGS")), r"Scipy\(method='BFGS'.*does not see the constraints"),
        (bl.Implicit(bl.ScipyRoot()), "ScipyRoot.*does not see the constraints"),
        (bl.Unrolled(lambda p: SGD(p, lr=0.1)), "unlike Implicit, would not see the functions that constrain"),
        (bl.Hypernetwork(lambda p: Adam(p, lr=0.1)), "unlike Implicit, would not see the functions"),
    ],
    ids=["LBFGS", "BFGS", "ScipyRoot", "Unrolled", "Hypernetwork"],
)
def test_what_does_not_see_constraints_is_refused_by_name(response, text):
    with pytest.raises(TypeError, match=text):
        response.init(game_with(inequality=lambda y: y - 1.0))


def test_bounds_beside_constraints_are_refused():
    response = bl.Implicit(bl.Scipy("SLSQP", bounds=(0.0, 1.0)))
    with pytest.raises(TypeError, match="would not see these bounds"):
        answer(game_with(inequality=lambda y: y - 1.0), response)


def test_conjugate_gradients_are_refused_and_others_agree():
    game = game_with(inequality=lambda y: y.sum() - 1.0)
    with pytest.raises(bl.errors.IndefiniteSystemError, match=r"'y' has multipliers.*Leave linear_solver= out"):
        answer(game, bl.Implicit(bl.Scipy("SLSQP"), linear_solver=bl.ConjugateGradient()))
    _, _, wanted = answer(game)
    _, _, slope = answer(game, bl.Implicit(bl.Scipy("SLSQP"), linear_solver=bl.GMRES(rtol=1e-12)))
    close(slope, wanted)


REFUSED = {
    "no function": ({"inequality": 1.0}, TypeError, "inequality is a float; expected a function"),
    "nobody's name": ({"equality": lambda z: z}, ValueError, "its equality has a parameter 'z', which names no player"),
    "stars": ({"equality": lambda *y: y}, TypeError, r"parameter '\*y' of the equality cannot be named"),
    "nobody's variables": (
        {"inequality": lambda y: torch.ones(2, dtype=D)},
        ValueError,
        "its inequality depends on nobody's variables",
    ),
    "the leader's alone": ({"inequality": lambda x, y: x - 1.0}, ValueError, "its inequality depends on 'x' alone"),
    "detached": ({"inequality": lambda y: y.detach()}, ValueError, "depends on nobody's variables"),
    "NaN": ({"inequality": lambda y: (y - 5.0).log()}, ValueError, "its inequality at init holds NaN"),
    "float32": ({"inequality": lambda y: y.float()}, ValueError, r"its inequality is a tensor .* of torch\.float32"),
    "empty": ({"inequality": lambda y: y[:0]}, ValueError, r"of shape \(0,\)"),
    "a number": ({"inequality": lambda y: {"a": 1.0}}, TypeError, r"returned a float at \['a'\]; expected a tensor"),
    "raises": ({"inequality": lambda y: y @ torch.ones(3, dtype=D)}, ValueError, "its inequality raised RuntimeError"),
    "a residual too": (
        {"inequality": lambda y: y, "residual": lambda y: y},
        ValueError,
        "a residual of its own, and constraints as well",
    ),
    "batch": ({"inequality": lambda y, batch: y}, ValueError, "takes `batch`, but the player has no data="),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_constraint_that_cannot_be_meant_is_refused_before_any_work(fault):
    constraints, error, text = REFUSED[fault]
    with pytest.raises(error, match=text):
        game_with(**constraints)


def test_captured_tensors_are_found_in_constraints():
    level = torch.tensor(1.0, dtype=D, requires_grad=True)
    with pytest.raises(bl.errors.CapturedTensorError):
        bl.Implicit(bl.Scipy("SLSQP")).init(game_with(inequality=lambda y: y - level))


def test_a_leader_may_act_through_a_constraint_alone():
    game = game_with(lambda y: ((y - 3.0) ** 2).sum(), inequality=lambda x, y: y - x)
    y, _, slope = answer(game)
    close(y, tensor(2.0, 1.0))
    close(slope, tensor(4.0, 2.0))


# The check against re-solved followers --------------------------------------------------------------------------------


def test_the_check_re_solves_within_the_constraints():
    checked = bl.testing.check_hypergradient(bent_game(), bl.Implicit(bl.Scipy("SLSQP")), rtol=1e-5)
    assert checked, str(checked)
    game = game_with(inequality=lambda y: y - 1.5)  # the first entry is held at 1.5, the second free
    checked = bl.testing.check_hypergradient(game, bl.Implicit(bl.Scipy("SLSQP")), rtol=1e-6)
    assert checked, str(checked)


def test_the_check_finds_a_derivative_that_does_not_see_the_constraints():
    checked = bl.testing.check_hypergradient(game_with(inequality=lambda y: y - 1.5), FunctionsUnseen())
    assert checked.verdict.value == "wrong"
    assert "Constraints that bind move the answer, and hold it" in str(checked)


def test_the_law_within_functions_holds_for_implicit_and_finds_the_defect():
    from bilevel.testing.laws import LAWS

    law = [law for law in LAWS if law.name == "within functions"]
    assert bl.testing.check_response(bl.Implicit(bl.Scipy("SLSQP"), steps=200), laws=law, examples=40)
    report = bl.testing.check_response(FunctionsUnseen(), laws=law, examples=40, raises=False)
    assert [row.law for row in report.failures] == ["within functions"], str(report)
    assert "Programme(" in report.failures[0].game
    (row,) = bl.testing.check_response(bl.Unrolled(lambda p: SGD(p, lr=0.5)), laws=law, examples=4).rows
    assert row.verdict == "does not apply" and "would not see the functions" in row.note


def test_the_check_cannot_tell_at_a_kink():
    checked = bl.testing.check_hypergradient(at_a_kink(), bl.Implicit(bl.Scipy("SLSQP")))
    assert checked.verdict.value == "cannot tell" and "kink" in str(checked)


# Nash equilibria ------------------------------------------------------------------------------------------------------


def duopoly():
    """Cournot: price 10 - q1 - q2, costs 1 and 2, the second firm has a capacity of 1: they make 4 and 1."""
    return bl.Game(
        q1=bl.Player(lambda q1, q2: -q1 * (9.0 - q1 - q2), torch.tensor(2.0, dtype=D)),
        q2=bl.Player(
            lambda q1, q2: -q2 * (8.0 - q1 - q2),
            torch.tensor(0.5, dtype=D),
            inequality=lambda q2: {"capacity": q2 - 1.0},
        ),
    )


@pytest.mark.parametrize(
    ("q1", "q2", "standing", "told"),
    [
        (4.0, 1.0, "certified", None),
        (4.25, 0.5, "refuted", "q2: first order"),  # the first's best answer, but the second has capacity left
        (3.75, 1.5, "refuted", "q2: feasible"),
        (3.0, 1.0, "refuted", "q1: first order"),
    ],
)
def test_a_capacity_constrained_nash_equilibrium_is_certified_and_its_neighbours_are_refuted(q1, q2, standing, told):
    point = {"q1": torch.tensor(q1, dtype=D), "q2": torch.tensor(q2, dtype=D)}
    found = bl.certify_nash(duopoly(), point)
    assert found.standing.value == standing, str(found)
    if told:
        assert told in [finding.name for finding in found.findings if finding.standing.value == "refuted"]
    assert "feasible" in str(found)


# Beside a domain ------------------------------------------------------------------------------------------------------


def test_a_domain_beside_functions_is_one_of_them():
    """Shares of a total with a capacity on the first: projected onto both, and moved along what is left."""

    def capacity(flow):
        return flow[0] - 0.6

    game = bl.Game(
        toll=bl.Player(lambda toll, flow: tensor(1.0, 2.0, 4.0) @ flow + 0.0 * toll.sum(), tensor(0.1, 0.2, 0.3)),
        flow=bl.Player(
            lambda toll, flow: ((flow + toll - tensor(2.0, 1.0, 0.5)) ** 2).sum(),
            torch.full((3,), 1 / 3, dtype=D),
            domain=bl.Simplex(1.0),
            inequality=capacity,
        ),
    )
    y, state, slope = answer(game)
    close(y, tensor(0.6, 0.4, 0.0))  # a - toll = (1.9, .8, .2): the first is full, the rest goes to the second
    found = state["multipliers"]
    assert set(found) == {"inequality", "domain", "domain equality"}
    # t = 2 (.8 - .4) = .8 is the price of the total; the first would take 2 (1.9 - .6) = 2.6, the third 2 * .2.
    close(found["domain equality"]["total"], torch.tensor(0.8, dtype=D))
    close(found["inequality"], torch.tensor(1.8, dtype=D))
    close(found["domain"]["low"], tensor(0.0, 0.0, 0.4))
    close(slope, tensor(0.0, 0.0, 0.0))  # a vertex
    free = game.initial("toll") + tensor(0.0, 0.3, -0.3)  # a - toll = (1.9, .5, .5): the second and the third share .4
    y, _, slope = answer(game, toll=free)
    close(y, tensor(0.6, 0.2, 0.2))
    close(slope, tensor(0.0, 1.0, -1.0))  # -(1 - 1/2 11') (2, 4)


def test_bounds_that_a_leader_sets_move_the_answer():
    game = bl.Game(
        most=bl.Player(lambda most, y: (y**2).sum() + 0.0 * most, torch.tensor(0.75, dtype=D)),
        y=bl.Player(
            lambda y: ((y - tensor(2.0, 0.25)) ** 2).sum(),
            tensor(0.1, 0.1),
            domain=bl.Box(-1.0, lambda most: most),
            equality=lambda y: 0.0 * y[0] + y[1] - 0.5,
        ),
    )
    y, state, slope = answer(game)
    close(y, tensor(0.75, 0.5))
    close(state["multipliers"]["domain"]["high"], tensor(2.5, 0.0))
    close(slope, torch.tensor(1.5, dtype=D))
    games = bl.Games(game, 2, init={"most": tensor(0.75, 0.6)})
    response = bl.Implicit(bl.Scipy("SLSQP"))
    y, _ = response(games, {"most": games.initial("most")}, response.init(games))
    close(y.detach(), torch.tensor([[0.75, 0.5], [0.6, 0.5]], dtype=D))
    checked = bl.testing.check_hypergradient(game, response, rtol=1e-6)
    assert checked, str(checked)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"domain": bl.constraints.Ball(1.0, p=1.0)}, "no set of smooth functions"),
        ({"prox": bl.constraints.L1(0.1)}, "these need a smooth loss"),
    ],
)
def test_what_is_no_smooth_function_is_refused_beside_functions(options, text):
    with pytest.raises(ValueError, match=text):
        game_with(inequality=lambda y: y - 1.0, **options)
