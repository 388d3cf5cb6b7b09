"""Several followers who answer together."""

import warnings
from functools import partial

import pytest
import torch

import bilevel as bl
from bilevel.testing import cournot_players

D = torch.float64


def oligopoly(followers=3, demand=10.0):
    """A leader and followers of Cournot's with their own costs; the followers' Nash answer in closed form."""
    costs = [1.0, *(0.5 + 0.25 * i for i in range(followers))]
    return cournot_players(demand, 1.0, costs).game(), costs, demand


def closed_form(costs, demand):
    """Followers' Nash answer to q is (A - q - (m + 1) c_i + sum c_j) / (m + 1); the leader's own optimum follows."""
    m, rivals = len(costs) - 1, sum(costs[1:])
    # p = A - q - sum q_j = (A - q + rivals) / (m + 1), so profit (p - c) q peaks where A + rivals - (m+1) c = 2 q.
    q = (demand + rivals - (m + 1) * costs[0]) / 2
    return q, [(demand - q - (m + 1) * c + rivals) / (m + 1) for c in costs[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "response",
    [
        bl.Implicit(bl.ScipyRoot(), steps=100, tolerance=1e-10, linear_solver=bl.GMRES(rtol=1e-12)),
        bl.Implicit(bl.ScipyRoot("krylov"), steps=100, tolerance=1e-10, linear_solver=bl.linear.Dense()),
        bl.Implicit(partial(torch.optim.SGD, lr=0.4), steps=200, tolerance=1e-11, linear_solver=bl.GMRES(rtol=1e-12)),
        bl.Unrolled(partial(torch.optim.SGD, lr=0.4), steps=80),
    ],
    ids=["hybr", "krylov", "SGD", "unrolled"],
)
def test_a_leader_of_three_firms_that_settle_among_themselves(response):
    game, costs, demand = oligopoly()
    leader, wanted = closed_form(costs, demand)
    solution = bl.solve(
        game.joined(firms=("b", "c", "d")), firms=response, optimizer=partial(torch.optim.SGD, lr=0.9), steps=40
    )
    assert float(solution.variables["a"]) == pytest.approx(leader, abs=1e-8)
    found = [float(solution.variables["firms"][name]) for name in "bcd"]
    assert found == pytest.approx(wanted, abs=1e-8)
    assert set(solution.values) == {"a", "b", "c", "d"}
    assert solution.history[-1]["b"] == pytest.approx(-(wanted[0] ** 2), abs=1e-6)  # profit q^2 at b = 1


@pytest.mark.slow
def test_a_learned_response_of_two_firms():
    game, costs, demand = oligopoly(2)
    learned = bl.Hypernetwork(partial(torch.optim.Adam, lr=5e-3), scale=0.3, warmup=3000, steps=10, tolerance=0.1)
    solution = bl.solve(
        game.joined(firms=("b", "c")), firms=learned, optimizer=partial(torch.optim.SGD, lr=0.2), steps=60
    )
    leader, wanted = closed_form(costs, demand)
    assert float(solution.variables["a"]) == pytest.approx(leader, rel=0.02)
    assert [float(solution.variables["firms"][n]) for n in "bc"] == pytest.approx(wanted, rel=0.05)


def rotating():
    """Two players of two dimensions whose stacked own gradients have a Jacobian far from symmetric."""
    m = torch.tensor([[1.0, 0.4], [-0.3, 0.8]], dtype=D)

    def first(x, y, z):
        return 0.5 * y.square().sum() + y @ (2.0 * m @ z) - (x * y).sum()

    def second(x, y, z):
        return z.square().sum() - y @ (3.0 * m.T @ z) + (x.flip(0) * z).sum() + 0.1 * z.pow(4).sum()

    zero = torch.zeros(2, dtype=D)
    game = bl.Game(
        x=bl.Player(lambda x, y, z: (y - z + 1).square().sum() + 0.5 * x.square().sum(), zero + 1.0),
        y=bl.Player(first, zero),
        z=bl.Player(second, zero),
    )
    return game.joined(pair=("y", "z"))


def test_its_hypergradient_is_that_of_the_settled_pair_by_finite_differences():
    game, x = rotating(), torch.tensor([0.7, -0.4], dtype=D)
    response = bl.Implicit(
        bl.ScipyRoot(options={"xtol": 1e-14}), steps=200, tolerance=1e-9, linear_solver=bl.linear.Dense()
    )
    state = response.init(game)

    def value(x):
        pair, _ = response(game, {"x": x}, state)
        return game.loss("x", {"x": x, "pair": pair})

    tracked = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(tracked), tracked)
    units = 1e-5 * torch.eye(2, dtype=D)
    differences = torch.stack([(value(x + e) - value(x - e)) / 2e-5 for e in units]).detach()
    assert torch.allclose(found, differences, atol=1e-8)
    (second,) = torch.autograd.functional.jacobian(
        lambda x: torch.autograd.grad(value(x), x, create_graph=True)[0], (tracked,), create_graph=False
    )
    slopes = []
    for e in units:
        ends = []
        for sign in (1.0, -1.0):
            at = (x + sign * e).requires_grad_()
            ends.append(torch.autograd.grad(value(at), at)[0])
        slopes.append((ends[0] - ends[1]) / 2e-5)
    assert torch.allclose(second, torch.stack(slopes), atol=1e-6)


def test_members_with_modules_and_data_of_their_own():
    class Firm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros((), dtype=D))
            self.register_buffer("calls", torch.zeros((), dtype=D))

        def forward(self):
            self.calls += 1
            return self.weight

    b, c = Firm(), Firm()

    def own(module, name):
        def loss(a, b, c, batch):
            mine = torch.func.functional_call(module, {"weight": (b if name == "b" else c)["weight"]})
            return mine**2 + 0.5 * mine * (c if name == "b" else b)["weight"] - mine * a * batch

        return loss

    one = torch.ones((), dtype=D)
    game = bl.Game(
        a=bl.Player(lambda a, b, c: (a - 1) ** 2 + b["weight"] + c["weight"], one),
        b=bl.Player(own(b, "b"), b, data=[one, 2 * one]),
        c=bl.Player(own(c, "c"), c, data=[3 * one]),
    ).joined(pair=("b", "c"))
    response = bl.Implicit(
        partial(torch.optim.SGD, lr=0.4), steps=40, tolerance=None, linear_solver=bl.GMRES(), warm_start=True
    )
    state = response.init(game)
    answer, after = response(game, {"a": one}, state, {"b": one, "c": 3 * one})
    # 2 b + c / 2 = 1, 2 c + b / 2 = 3
    wanted = torch.linalg.solve(torch.tensor([[2.0, 0.5], [0.5, 2.0]], dtype=D), torch.tensor([1.0, 3.0], dtype=D))
    assert [float(answer[n]["weight"]) for n in "bc"] == pytest.approx(wanted.tolist(), abs=1e-8)
    # The 40 steps' own; the judgement of the answer holds the buffers, as backward does.
    assert {name: float(t) for name, t in after["buffers"].items()} == {"b.calls": 40.0, "c.calls": 40.0}
    assert float(b.calls) == float(c.calls) == 0.0
    drawn, later = game.draw("pair", game.start("pair"))
    assert drawn == {"b": one, "c": 3 * one} and game.draw("pair", later)[0]["b"] == 2 * one


@pytest.mark.slow
def test_three_levels_with_a_pair_in_the_last():
    """A leader, a follower, and two who settle below both: against elimination by hand."""
    game, costs, demand = oligopoly(3)
    pair = bl.Implicit(bl.ScipyRoot(), steps=50, tolerance=1e-10, linear_solver=bl.linear.Dense())
    middle = bl.Unrolled(partial(torch.optim.SGD, lr=1.5), steps=2)  # 1 / its curvature: there in one step
    solution = bl.solve(
        game.joined(pair=("c", "d")), b=middle, pair=pair, optimizer=partial(torch.optim.SGD, lr=2.5), steps=30
    )
    # p = (A - a - b + c_c + c_d) / 3; b: A - a - 2 b + s - 3 c_b = 0; then p = (A - a + s + 3 c_b) / 6 and a likewise.
    rest = costs[2] + costs[3]
    a = (demand + rest + 3 * costs[1] - 6 * costs[0]) / 2
    b = (demand - a + rest - 3 * costs[1]) / 2
    assert float(solution.variables["a"]) == pytest.approx(a, abs=1e-8)
    assert float(solution.variables["b"]) == pytest.approx(b, abs=1e-8)


def test_resume_goes_on_bit_for_bit(tmp_path):
    game, *_ = oligopoly()
    game = game.joined(firms=("b", "c", "d"))
    response = bl.Implicit(bl.ScipyRoot(), steps=50, linear_solver=bl.GMRES())
    whole = bl.solve(game, firms=response, steps=6)
    bl.solve(game, firms=response, steps=3, checkpoint=tmp_path / "run.pt")
    again = bl.solve(game, firms=response, steps=6, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["a"], again.variables["a"])


def test_what_cannot_be_joined_is_refused():
    game, *_ = oligopoly()
    for groups, wanted in (
        ({"firms": ("b",)}, "at least two"),
        ({"firms": ("b", "b")}, "at least two"),
        ({"firms": ("b", "d")}, "others move between them"),
        ({"firms": ("a", "b")}, "moves first"),
        ({"firms": ("b", "z")}, "'z' is no player"),
        ({"c": ("b", "d")}, "is taken"),
        ({"seed": ("b", "c")}, "is taken"),
    ):
        with pytest.raises(ValueError, match=wanted):
            game.joined(**groups)
    joined = game.joined(firms=("b", "c", "d"))
    with pytest.raises(bl.errors.NotSymmetricError, match="GMRES"):
        bl.solve(joined, firms=bl.Implicit(bl.ScipyRoot(), linear_solver=bl.ConjugateGradient()))
    for solver in (bl.Scipy("BFGS"), torch.optim.LBFGS):
        with pytest.raises(TypeError, match="ScipyRoot"):
            bl.solve(joined, firms=bl.Implicit(solver, linear_solver=bl.GMRES()))
    with pytest.raises(ValueError, match="no single Hessian"):
        bl.exploitability(joined, {name: joined.initial(name) for name in joined.names})


@pytest.mark.parametrize("solver", [bl.GMRES(), bl.linear.Dense()], ids=["GMRES", "Dense"])
def test_a_members_saddle_is_told_where_the_leader_sees_more_of_another_direction(solver):
    """q's own Hessian is diag(1, -1). Along its part of u, which is (2.4, -2), it curves up: 2.4^2 - 2^2 > 0."""
    from bilevel.testing.laws.resting import Pair

    game = Pair(maximum=False).game()
    response = bl.Implicit(bl.ScipyRoot(), linear_solver=solver)
    x = game.initial("x").requires_grad_()
    pair, _ = response(game, {"x": x}, response.init(game))
    with pytest.warns(bl.errors.UnreliableResponseWarning, match=r"'q' is not at a minimum.*own curvature is -1 "):
        torch.autograd.grad(game.loss("x", {"x": x, "pair": pair}), x)


def test_a_member_that_is_flat_in_some_directions_is_at_a_minimum():
    """q's own Hessian is a a^T, of rank one: rounding makes no saddle of it."""
    a = torch.linspace(-1.0, 1.3, 7, dtype=D)
    game = bl.Game(
        x=bl.Player(lambda x, p, q: (p - 1.0) ** 2 + q.square().sum() + x**2, torch.ones((), dtype=D)),
        p=bl.Player(lambda x, p, q: 0.5 * p**2 - x * p + p * q.sum(), torch.zeros((), dtype=D)),
        q=bl.Player(lambda x, p, q: 0.5 * (a @ q - x - p) ** 2, torch.zeros(7, dtype=D)),
    ).joined(pair=("p", "q"))
    response = bl.Implicit(bl.ScipyRoot("krylov"), tolerance=1e-6, linear_solver=bl.GMRES(damping=1e-3))
    x = game.initial("x").requires_grad_()
    pair, _ = response(game, {"x": x}, response.init(game))
    with warnings.catch_warnings():
        warnings.simplefilter("error", bl.errors.UnreliableResponseWarning)
        torch.autograd.grad(game.loss("x", {"x": x, "pair": pair}), x)
