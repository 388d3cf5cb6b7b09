"""Leaders with a domain, whose steps are projected, and leaders in coordinates."""

import math
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam

import bilevel as bl
from bilevel.constraints import L1, Ball, Box, NonNegative, Simplex
from bilevel.dynamics import LOLA, Alternating, Extragradient, Optimistic

D = torch.float64
ZERO = torch.zeros(3, dtype=D)
ADAM = partial(Adam, lr=0.1)


def number(value):
    return torch.tensor(value, dtype=D)


def game(x, domain=None, aim=(1.4, 0.3, -0.5)):
    """y = x + 1/2, and the leader's loss is (x - aim)^2 / 2: its optimum is the projection of aim."""
    aim = number(aim) + 0.5
    return bl.Game(
        x=bl.Player(lambda y: 0.5 * (y - aim).square().sum(), x, domain=domain),
        y=bl.Player(lambda x, y: (y - x - 0.5).square().sum(), torch.zeros(3, dtype=D)),
    )


RESPONSE = bl.Implicit(bl.ClosedForm(lambda x: x + 0.5), linear_solver=bl.linear.Dense())


@pytest.mark.parametrize(
    ("domain", "optimizer"),
    [
        (Box(0.0, 1.0), partial(SGD, lr=0.5)),
        (Box(0.0, 1.0), partial(Adam, lr=0.05)),
        (Box(0.0, 1.0), partial(SGD, lr=0.2, momentum=0.5)),
        (Simplex(), partial(SGD, lr=0.5)),
        (Ball(0.8), partial(SGD, lr=0.5)),
        (NonNegative(), None),  # Adam at its default rate, .01
    ],
)
def test_a_leader_ends_at_the_optimum_within_its_domain(domain, optimizer):
    start = domain.project(torch.full((3,), 0.4, dtype=D))
    seen = []

    def watch(step, record, variables):
        seen.append(domain.contains(variables["x"]))

    found = bl.solve(game(start, domain), y=RESPONSE, optimizer=optimizer, steps=400, callbacks=[watch])
    wanted = domain.project(number([1.4, 0.3, -0.5]))
    torch.testing.assert_close(found.variables["x"], wanted, rtol=0.0, atol=1e-6)
    assert all(seen) and found.history[-1]["gradient_norm"] < 1e-4
    # While it is not there, the projected gradient says so.
    assert found.history[0]["gradient_norm"] > 1e-2


def test_the_gradient_of_a_leader_that_nothing_holds_is_its_own():
    start = torch.full((3,), 0.4, dtype=D)
    free, held = (bl.solve(game(start, domain), y=RESPONSE, steps=1) for domain in (None, Box(0.0, 1.0)))
    # The projected one is a difference over sqrt(eps): half of the digits.
    assert abs(free.history[0]["gradient_norm"] - held.history[0]["gradient_norm"]) < 1e-6


@pytest.mark.parametrize("dynamics", [None, Alternating(), Optimistic()])
def test_a_nash_equilibrium_at_a_bound(dynamics):
    """Two firms of the Cournot game 10 - q1 - q2 - cost; the first has a capacity of 1: q2 = (8 - 1) / 2."""
    players = bl.Game(
        a=bl.Player(lambda a, b: -a * (9.0 - a - b), number(0.5), domain=Box(0.0, 1.0)),
        b=bl.Player(lambda a, b: -b * (8.0 - a - b), number(0.5), domain=NonNegative()),
    )
    found = bl.solve(players, dynamics=dynamics, optimizer=partial(SGD, lr=0.2), steps=200)
    assert found.variables["a"].item() == 1.0 and abs(found.variables["b"].item() - 3.5) < 1e-9
    assert found.history[-1]["gradient_norm"] < 1e-6


def test_many_games_project_each():
    starts = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=D)
    games = bl.Games(game(starts[0], Simplex()), 2, init={"x": starts})
    found = bl.solve(games, y=RESPONSE, optimizer=partial(SGD, lr=0.5), steps=60)
    wanted = Simplex().project(number([1.4, 0.3, -0.5]))
    torch.testing.assert_close(found.variables["x"], torch.stack([wanted] * 2), rtol=0.0, atol=1e-6)
    with pytest.raises(ValueError, match="'x': init lies .* outside its domain .* in game 1"):
        bl.Games(game(starts[0], Simplex()), 2, init={"x": starts * number([[1.0], [2.0]])})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: bl.solve(game(number([1.0, 0.0, 0.0]), Simplex()), y=RESPONSE), "optimiser of player 'x' is Adam"),
        (lambda: bl.solve(game(ZERO, Box(0.0, 1.0)), y=RESPONSE, dynamics=Extragradient(0.1)), "bound"),
        (lambda: bl.solve(game(ZERO, Box(0.0, 1.0)), y=RESPONSE, dynamics=LOLA(0.1)), "Optimistic"),
        (lambda: bl.solve(bl.Game(x=bl.Player(lambda x: x**2, number(1.0), prox=L1(1.0)))), "leads and has prox="),
        (
            lambda: bl.solve(
                bl.Game(
                    x=bl.Player(lambda x: x**2, number(1.0)),
                    z=bl.Player(lambda x, z: (z - x) ** 2, number(0.0), domain=Box(0.0, lambda x: x)),
                )
            ),
            r"depends on \['x'\]; a leader's domain is a set that stands still",
        ),
    ],
)  # fmt: skip
def test_what_would_end_elsewhere_is_refused(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def test_a_run_with_a_domain_resumes_and_knows_it(tmp_path):
    start = torch.full((3,), 0.4, dtype=D)
    whole = bl.solve(game(start, Box(0.0, 1.0)), y=RESPONSE, optimizer=partial(SGD, lr=0.5), steps=20)
    path = tmp_path / "run.pt"
    bl.solve(game(start, Box(0.0, 1.0)), y=RESPONSE, optimizer=partial(SGD, lr=0.5), steps=9, checkpoint=path)
    again = bl.solve(game(start, Box(0.0, 1.0)), y=RESPONSE, optimizer=partial(SGD, lr=0.5), steps=20, checkpoint=path)
    assert torch.equal(whole.variables["x"], again.variables["x"])
    with pytest.raises(bl.errors.CheckpointError, match=r"domain\.high"):
        bl.solve(game(start, Box(0.0, 2.0)), y=RESPONSE, optimizer=partial(SGD, lr=0.5), steps=30, checkpoint=path)


# Coordinates -------------------------------------------------------------------------------------------------------

RANGES = [bl.Log(1e-6, 1e-1), bl.Log(1e-6, 1e-1, start=1e-4), bl.Unit(), bl.Unit(0.0, 0.9, start=0.2)]
RANGES += [bl.Interval(-3.0, 5.0), bl.Positive(), bl.Positive(1e-8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", RANGES, ids=repr)
def test_a_coordinate_and_its_inverse(chosen, dtype):
    z = chosen.tensor(torch.zeros((), dtype=dtype))
    u = chosen.inverse(z).double().requires_grad_()
    assert torch.autograd.gradcheck(chosen.natural, (u,))
    # |d log z| is at most the range's log-length times the rounding of u.
    torch.testing.assert_close(chosen.natural(chosen.inverse(z)), z, rtol=100.0 * torch.finfo(dtype).eps, atol=0.0)
    low, high = chosen.range
    far = chosen.natural(torch.tensor([-30.0, 30.0], dtype=torch.float64))
    assert bool(((far >= low) & (far <= high)).all()) and bool(far[1] > far[0])


def tuned(init, optimizer=ADAM, steps=400, **options):
    """Ridge regression of one weight: y = 1 / (1 + x), and the leader would like it to be .8: x = 1/4."""
    played = bl.Game(
        x=bl.Player(lambda y: (y - 0.8) ** 2, init),
        y=bl.Player(lambda x, y: (y - 1.0) ** 2 + x * y**2, number(0.0)),
    )
    response = bl.Implicit(bl.ClosedForm(lambda x: 1.0 / (1.0 + x)))
    return bl.solve(played, y=response, optimizer=optimizer, steps=steps, **options)


@pytest.mark.parametrize(
    "init", [bl.Log(1e-3, 1e1), bl.Unit(0.0, 0.9), bl.Interval(-0.5, 4.0), bl.Positive(3.0)], ids=repr
)
def test_a_leader_in_a_coordinate_is_seen_in_natural_values_by_everybody(init):
    seen = []

    def watch(step, record, variables):
        seen.append(float(variables["x"]))

    found = tuned(init, callbacks=[watch])
    assert found.variables["x"].dtype == D and abs(found.variables["x"].item() - 0.25) < 1e-4
    assert all(init.range[0] < value < init.range[1] for value in seen) and seen[-1] == found.variables["x"].item()


def test_one_step_is_the_optimisers_in_the_coordinate():
    init = bl.Log(1e-3, 1e1, start=0.5)
    found = tuned(init, partial(SGD, lr=0.1), 1)
    u = init.inverse(number(0.5)).requires_grad_()
    loss = (1.0 / (1.0 + init.natural(u)) - 0.8) ** 2
    (slope,) = torch.autograd.grad(loss, u)
    torch.testing.assert_close(found.variables["x"], init.natural(u - 0.1 * slope).detach(), rtol=1e-6, atol=0.0)


@pytest.mark.slow
def test_coordinates_in_a_pytree_beside_tensors_and_in_many_games(tmp_path):
    def lead(x, y):
        return (y - 0.8) ** 2 + (x["shift"] - 2.0) ** 2

    played = bl.Game(
        x=bl.Player(lead, {"decay": bl.Log(1e-3, 1e1), "shift": number(0.0)}),
        y=bl.Player(lambda x, y: (y - 1.0) ** 2 + x["decay"] * y**2, number(0.0)),
    )
    response = bl.Implicit(bl.ClosedForm(lambda x: 1.0 / (1.0 + x["decay"])))
    found = bl.solve(played, y=response, optimizer=partial(Adam, lr=0.1), steps=400)
    assert abs(found.variables["x"]["decay"].item() - 0.25) < 1e-3
    assert abs(found.variables["x"]["shift"].item() - 2.0) < 1e-3
    games = bl.Games(played, 2, init={"x": {"decay": number([0.1, 1.0]), "shift": number([0.0, 1.0])}})
    many = bl.solve(games, y=response, optimizer=partial(Adam, lr=0.1), steps=400)
    assert bool((many.variables["x"]["decay"] - 0.25).abs().max() < 1e-3)
    path = tmp_path / "run.pt"
    bl.solve(played, y=response, steps=5, checkpoint=path)
    again, whole = (bl.solve(played, y=response, steps=9, **options) for options in ({"checkpoint": path}, {}))
    assert torch.equal(again.variables["x"]["decay"], whole.variables["x"]["decay"])


def test_a_follower_with_a_range_stays_in_it_as_in_a_box():
    played = bl.Game(
        x=bl.Player(lambda x, y: (y - x) ** 2, number(2.0)),
        y=bl.Player(lambda x, y: (y - x) ** 2, bl.Interval(0.0, 1.0)),
    )
    response = bl.Implicit(bl.Scipy("L-BFGS-B"))
    x = number(2.0).requires_grad_()
    y, _ = response(played, {"x": x}, response.init(played))
    assert float(y.detach()) == 1.0 and float(torch.autograd.grad(y, x)[0]) == 0.0


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: bl.Log(0.0, 1.0), ValueError, "expected low > 0"),
        (lambda: bl.Log(1e-1, 1e-3), ValueError, "expected low < high"),
        (lambda: bl.Log(1e-3, 1e-1, start=1e-3), ValueError, "expected numbers between 0.001 and 0.1, and neither"),
        (lambda: bl.Unit(0.0, 1.1), ValueError, "expected a range within 0 and 1"),
        (lambda: bl.Unit(start=float("nan")), ValueError, "start=nan"),
        (lambda: bl.Interval(0.0, math.inf), ValueError, "expected finite ends"),
        (lambda: bl.Positive(0.0), ValueError, "start=0.0"),
        (lambda: bl.Positive("1"), TypeError, "start is a str"),
        (lambda: bl.Player(lambda x: x, bl.Unit(), domain=Box()), ValueError, "Say where the player stays once"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
