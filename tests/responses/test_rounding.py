"""A follower that starts at its optimum has rounding for a gradient there, and no tolerance is relative to that.

f = a/2 sum h (y - c - B x)^2 rests at c + B x. The terms of its gradient are of size a |h y| and a |h B x|, and eps
as much of it is rounding: the size of y that this leaves open is that over the least curvature, a h.
"""

import warnings
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam

import bilevel as bl
from bilevel.errors import FollowerNonConvergenceWarning
from bilevel.game import rounding

H = torch.tensor([1.0, 0.3, 0.1])
B = torch.tensor([[0.1, 0.1], [0.3, -0.2], [0.7, 0.4]])
TYPES = [torch.float32, torch.float64]


def optimum(x, c):
    return c + B.to(x) @ x


def game_of(dtype, scale=1.0, c=0.0, at=(1.0, -1.0), away=0.0):
    """A game whose follower starts at its optimum for `at`, up to rounding, or `away` from it."""

    def follow(x, y):
        return 0.5 * scale * (H.to(y) * (y - optimum(x, c)).square()).sum()

    x = torch.tensor(at, dtype=dtype)
    return bl.Game(
        x=bl.Player(lambda x, y: (y - c - 1.0).square().sum() + x.square().sum(), x),
        y=bl.Player(follow, optimum(x, c) + away),
    )


def sgd(scale):
    return partial(SGD, lr=0.9 / scale)


SOLVERS = {
    "SGD": lambda scale: bl.Implicit(sgd(scale), steps=400),
    "projected": lambda scale: bl.Implicit(bl.inner.ProjectedGradient(), steps=400),
    "root": lambda scale: bl.Implicit(bl.ScipyRoot(), steps=400),
    "closed form": lambda scale: bl.Implicit(bl.ClosedForm(lambda x: optimum(x, 0.0)), tolerance=1e-6),
    "nudged": lambda scale: bl.Nudged(sgd(scale), steps=400),
}


def left_open(dtype, c, moved):
    """How far y may lie from its optimum: SURE roundings, or a thousandth of the gradient that a move has made."""
    eps, size = torch.finfo(dtype).eps, 3.0**0.5 * (abs(c) + 2.0)
    # Differences take entries for up to 1.5 times as large, of y and of B x.
    return (rounding.SURE * eps * 3.0 * size + 1e-3 * moved) / float(H.min())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("at", [(0.0, 0.0), (1.0, -1.0)], ids=str)
@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize(("scale", "c"), [(1.0, 0.0), (1e-12, 0.0), (1e12, 0.0), (1.0, 1e3)])
def test_who_starts_at_its_optimum_follows_and_is_not_told_of(dtype, at, name, scale, c):
    if name == "closed form" and c:
        pytest.skip("its form is that of c = 0")
    game, response = game_of(dtype, scale, c, at), SOLVERS[name](scale)
    state, x = response.init(game), game.initial("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FollowerNonConvergenceWarning)
        for step in range(6):
            given = x.clone().requires_grad_()
            y, state = response(game, {"x": given}, state)
            # The gradient that a move of .1 in both entries makes, |h B dx| <= .11.
            off = float((y.detach() - optimum(x, c)).norm())
            assert off <= left_open(dtype, c, 0.11 if step else 0.0), (step, off)
            if step == 0 and name != "nudged":
                # Nothing was to be gained, and it was noticed: of 400 steps one, or a solver's own few.
                assert state["gradients"] <= 12
            if step == 2:
                (slope,) = torch.autograd.grad(y.sum(), given)
                wanted = B.to(x).sum(0)
                # A nudge of 1 % leaves 1 % by its own tolerance; elsewhere a linear solve to 1e-5.
                assert float((slope - wanted).norm()) <= 0.02 * float(wanted.norm())
                state = response.after_backward(state, y)
            x = x + 0.1


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("c", "at"), [(0.0, (0.0, 0.0)), (1e3, (1.0, -1.0))], ids=str)
@pytest.mark.parametrize("kind", [bl.Implicit, bl.Nudged])
def test_who_started_at_its_optimum_and_cannot_follow_is_told_of(dtype, scale, c, at, kind):
    game, response = game_of(dtype, scale, c, at), kind(partial(SGD, lr=1e-2 / scale), steps=2)
    _, state = response(game, {"x": game.initial("x")}, response.init(game))
    # Two steps undo 2 % of a move at most.
    with pytest.warns(FollowerNonConvergenceWarning, match=r"is still (0\.9[89]\d*|1) of its value"):
        response(game, {"x": game.initial("x") + 1.0}, state)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_who_starts_near_its_optimum_is_held_to_its_start(dtype):
    """At a thousandth of its size: the start tells enough, in single precision too."""
    game, short = game_of(dtype, away=1e-3), bl.Implicit(partial(SGD, lr=1e-2), steps=2)
    with pytest.warns(FollowerNonConvergenceWarning, match=r"is still 0\.98\d* of its value"):
        short(game, {"x": game.initial("x")}, short.init(game))


def test_a_tolerance_below_rounding_asks_for_what_numbers_can_tell():
    """From far away to 1e-12 in single precision: SGD ends at rounding, and is content."""
    game = game_of(torch.float32, away=10.0)
    response = bl.Implicit(sgd(1.0), steps=1000, tolerance=1e-12)
    state, x = response.init(game), game.initial("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FollowerNonConvergenceWarning)
        for _ in range(3):
            _, state = response(game, {"x": x}, state)
    assert state["stationarity"] <= 1e-6
    with pytest.warns(FollowerNonConvergenceWarning, match="wanted 1e-12"):
        bl.Implicit(sgd(1.0), steps=20, tolerance=1e-12)(game, {"x": x}, response.init(game))


def test_nobody_hides_beneath_another_members_rounding():
    """p starts at its optimum, in units of 1e10, where rounding is 1e-6; q in units of 1 does not, and is told of."""
    game = bl.Game(
        x=bl.Player(lambda x, p, q: (q - 1.0) ** 2 + x**2, torch.tensor(0.3, dtype=torch.float64)),
        p=bl.Player(lambda x, p, q: 5e9 * (p - x - 0.1) ** 2, torch.tensor(0.4, dtype=torch.float64)),
        q=bl.Player(lambda x, p, q: 0.5 * (q - x - p) ** 2, torch.tensor(0.7 + 1e-6, dtype=torch.float64)),
    ).joined(pair=("p", "q"))
    response = bl.Implicit(
        lambda leaves: SGD([{"params": leaves[:1], "lr": 1e-10}, {"params": leaves[1:], "lr": 1e-9}])
    )
    with pytest.warns(FollowerNonConvergenceWarning, match="'pair' is still"):
        response(game, {"x": game.initial("x")}, response.init(game))
    settled = bl.Implicit(lambda leaves: SGD([{"params": leaves[:1], "lr": 1e-10}, {"params": leaves[1:], "lr": 0.9}]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FollowerNonConvergenceWarning)
        settled(game, {"x": game.initial("x")}, settled.init(game))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_many_games_some_of_which_start_at_their_optimum(dtype, scale):
    one = game_of(dtype, scale)
    start = one.initial("y")
    games = bl.Games(one, 3, init={"y": torch.stack([start, start + 1.0, start])})
    response = bl.Implicit(sgd(scale), steps=400)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FollowerNonConvergenceWarning)
        found = bl.solve(games, y=response, optimizer=partial(SGD, lr=0.1), steps=5)
    off = found.variables["y"] - torch.stack([optimum(x, 0.0) for x in found.variables["x"]])
    # The second began 1 away, and may stop at a thousandth of that: |h| is 1.05.
    assert bool((off.norm(dim=1) <= left_open(dtype, 0.0, 1.05)).all())
    short = bl.Implicit(partial(SGD, lr=1e-2 / scale), steps=2)
    with pytest.warns(FollowerNonConvergenceWarning, match="in 3 of 3 games"):
        bl.solve(games, y=short, optimizer=partial(SGD, lr=0.1), steps=2)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_tasks_whose_followers_start_at_their_optimum(dtype, scale):
    """Each begins at the leader, which is its optimum wherever its data are: (3 / 10, ...) is no binary number."""

    def follow(meta, task, batch):
        return 0.5 * scale * ((task - meta) * batch).square().sum()

    data = torch.tensor([[0.3, 0.7], [1.1, 0.9]], dtype=dtype)
    begins = bl.Player(follow, torch.tensor([0.1, 0.2], dtype=dtype), start=lambda meta: meta * 3.0 / 3.0)
    tasks = bl.Tasks(
        meta=bl.Player(lambda meta, task, batch: (task - batch).square().sum(), torch.tensor([0.1, 0.2], dtype=dtype)),
        task=begins,
        data=[{"support": data, "query": data}],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", FollowerNonConvergenceWarning)
        bl.solve(tasks, task=bl.Implicit(sgd(scale), steps=300), optimizer=partial(SGD, lr=0.1), steps=3)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_learned_response_that_starts_at_the_optimum(dtype, scale):
    """What the leader's perturbations make of the gradient is what it is measured by."""
    game = game_of(dtype, scale)
    # Its rate of learning is the slope's own, in units of the loss.
    response = bl.Hypernetwork(partial(Adam, lr=0.02), scale=0.3, warmup=600, steps=10, tolerance=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FollowerNonConvergenceWarning)
        _, state = response(game, {"x": game.initial("x")}, response.init(game))
    assert 0.0 <= state["stationarity"] <= 0.5
    with pytest.warns(bl.errors.NonConvergenceWarning):
        short = bl.Hypernetwork(partial(Adam, lr=1e-9), scale=0.3, tolerance=0.5)
        short(game, {"x": game.initial("x") + 1.0}, short.init(game))


def test_terms_are_those_of_a_quadratic():
    """|H y| and |F_x x|, as differences along numbers of 1/2 to 3/2 see them; with the loss's own size where y is 0."""
    for c, at in ((0.0, (1.0, -1.0)), (1e3, (0.3, 0.4)), (0.0, (0.0, 0.0))):
        game = game_of(torch.float64, 7.0, c, at)
        follower = game.follower({"x": game.initial("x")}, bl.Implicit(sgd(1.0)).init(game))
        y = optimum(game.initial("x"), c)
        (found,) = rounding.measured_terms(follower, follower.held_residual(), y)
        exact = 7.0 * float((H.to(y) * y).norm()) + 7.0 * float((H.to(y)[:, None] * B.to(y) * game.initial("x")).norm())
        assert 0.3 * exact <= found <= 3.0 * exact
    # f = (y - 1)^2 / 2 at 0: a curvature of 1 and a value of 1/2 make a length of 1, and terms of 1.
    game = bl.Game(
        x=bl.Player(lambda x, y: (x - y) ** 2, torch.zeros((), dtype=torch.float64)),
        y=bl.Player(lambda x, y: 0.5 * (y - 1.0) ** 2 * (1.0 + x**2), torch.zeros((), dtype=torch.float64)),
    )
    state = bl.Implicit(sgd(1.0)).init(game)
    follower = game.follower({"x": game.initial("x")}, state)
    (found,) = rounding.measured_terms(follower, follower.held_residual(), torch.zeros(1, dtype=torch.float64))
    assert abs(found - 1.0) <= 1e-6
