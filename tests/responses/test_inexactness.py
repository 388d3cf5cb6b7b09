"""Tolerances that tighten as the leader gets on: less work, the same end, and a resume bit for bit."""

from functools import partial

import pytest
import torch

import bilevel as bl

D = torch.float64


@pytest.fixture
def game():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 12, generator=generator, dtype=D) * torch.logspace(0, -2, 12, dtype=D)
    aims = torch.randn(30, generator=generator, dtype=D)
    other = torch.randn(30, 12, generator=generator, dtype=D)

    def lead(x, y):
        return (other @ y - aims).square().mean() + 0.1 * x.square().sum()

    def follow(x, y):
        return (rows @ y - aims).square().mean() + (x.exp() * y.square()).sum()

    return bl.Game(x=bl.Player(lead, torch.full((12,), -2.0, dtype=D)), y=bl.Player(follow, torch.zeros(12, dtype=D)))


def response(inexactness, **options):
    return bl.Implicit(
        partial(torch.optim.SGD, lr=0.2, momentum=0.9),
        steps=2000,
        tolerance=1e-8,
        linear_solver=bl.ConjugateGradient(rtol=1e-8, **options),
        inexactness=inexactness,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [bl.responses.Geometric(start=1e5, rate=0.7), bl.responses.AsLeaderMoves(start=1e5, power=2.0)], ids=repr
)
def test_the_end_is_the_same_for_less_work(game, kind):
    descent = partial(torch.optim.SGD, lr=0.5)
    tight = bl.solve(game, y=response(None), optimizer=descent, steps=60)
    loose = bl.solve(game, y=response(kind), optimizer=descent, steps=60)
    assert torch.allclose(loose.variables["x"], tight.variables["x"], rtol=0.0, atol=1e-6)
    assert loose.gradients + loose.products < 0.9 * (tight.gradients + tight.products)
    assert loose.stationarity["y"] <= 1e-8 and loose.residuals["y"] <= 1e-8


@pytest.mark.filterwarnings("ignore:The run ended while")
def test_a_run_with_it_resumes_bit_for_bit(game, tmp_path):
    kind = response(bl.responses.AsLeaderMoves(start=1e3))
    run = partial(bl.solve, game, y=kind, optimizer=partial(torch.optim.SGD, lr=0.5))
    whole = run(steps=8)
    run(steps=4, checkpoint=tmp_path / "run.pt")
    rest = run(steps=8, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["x"], rest.variables["x"])
    assert whole.products == rest.products


def test_both_tolerances_are_loosened_but_never_beyond_one_half(game):
    seen = []

    class Spy(bl.responses.Inexactness):
        def factor(self, calls, movement):
            seen.append((calls, movement))
            return 1e12

    kind = response(Spy(), stopping=bl.linear.HypergradientTolerance(1e-6))
    state = kind.init(game)
    x = torch.full((12,), -2.0, dtype=D, requires_grad=True)
    y, state = kind(game, {"x": x}, state)
    game.loss("x", {"x": x, "y": y}).backward()
    state = kind.after_backward(state, y)
    assert 1e-3 < state["stationarity"] <= 0.5 and 1e-6 < float(state["linear"]["residual"]) <= 0.5
    _, state = kind(game, {"x": x + 0.5}, state)
    _, state = kind(game, {"x": x + 0.75}, state)
    assert (0, 1.0) in seen and any(calls == 2 and movement == pytest.approx(0.5) for calls, movement in seen)


def test_both_are_loosened_alike_inside_a_transform(game):
    x = torch.full((12,), -2.0, dtype=D)

    def hypergradient(inexactness, *, inside):
        kind = response(inexactness)
        state = kind.init(game)

        def loss(x):
            return game.loss("x", {"x": x, "y": kind(game, {"x": x}, state)[0]})

        if inside:
            return torch.func.grad(loss)(x)
        tracked = x.clone().requires_grad_()
        return torch.autograd.grad(loss(tracked), tracked)[0]

    loose, exact = bl.responses.Geometric(start=1e6), hypergradient(None, inside=True)
    outside, inside = (hypergradient(loose, inside=where) for where in (False, True))
    # The same stop of the follower and of the solve: what differs is rounding, far below what the looseness leaves.
    assert (inside - outside).norm() <= 1e-9 * outside.norm()
    assert (inside - exact).norm() > 1e-4 * exact.norm()


def test_movement_goes_by_name_and_a_state_without_it_begins_anew():
    seen = []

    class Spy(bl.responses.Inexactness):
        def factor(self, calls, movement):
            seen.append((calls, movement))
            return 1.0

    one, three = torch.ones(1, dtype=D), torch.zeros(3, dtype=D)
    game = bl.Game(
        x=bl.Player(lambda x, y: (y**2).sum() + x.sum(), one),
        z=bl.Player(lambda x, z, y: ((z - x) ** 2).sum() + (y**2).sum(), three),
        y=bl.Player(lambda x, y: ((y - x) ** 2).sum(), one),
    )
    kind, plain = (bl.Implicit(partial(torch.optim.SGD, lr=0.5), inexactness=i) for i in (Spy(), None))
    state = plain.init(game)  # inexactness may be given to a run that began without it
    for others in {"x": one, "z": three}, {"z": three, "x": one + 2.0}, {"x": one + 3.0}:
        _, state = kind(game, others, state)
    assert set(seen) == {(0, 1.0), (1, 1.0), (2, 0.5)}


def test_an_error_is_not_told_twice(game):
    kind = response(None, stopping=bl.linear.HypergradientTolerance(1e-3))
    x = torch.full((12,), -2.0, dtype=D, requires_grad=True)
    y, state = kind(game, {"x": x}, kind.init(game))
    game.loss("x", {"x": x, "y": y}).backward()
    state = kind.after_backward(state, y)
    assert float(state["linear"]["error"]) >= 0.0
    _, state = kind(game, {"x": x}, state)
    assert torch.isnan(state["linear"]["error"]) and torch.isnan(state["linear"]["residual"])


def test_solvers_without_a_tolerance_stay_as_they_are():
    still = bl.Neumann(max_steps=5, rtol=None)
    assert still.loosened(100.0) is still
    assert bl.GMRES(rtol=1e-4).loosened(10.0).rtol == pytest.approx(1e-3)
    assert bl.GMRES(rtol=0.9).loosened(10.0).rtol == 0.9


@pytest.mark.parametrize(
    "made",
    [
        lambda: bl.responses.Geometric(start=0.5),
        lambda: bl.responses.Geometric(rate=1.0),
        lambda: bl.responses.AsLeaderMoves(start=0.0),
        lambda: bl.responses.AsLeaderMoves(power=0.0),
    ],
)
def test_settings_that_cannot_work_are_refused(made):
    with pytest.raises(ValueError, match="expected a start"):
        made()


def test_a_run_that_ends_loose_says_so_and_its_end_is_solved_as_asked(game):
    loose = response(bl.responses.Geometric(start=1e5, rate=0.9))
    with pytest.warns(
        bl.errors.FollowerNonConvergenceWarning, match=r"inexactness= of 'y' was still 8.1e\+04 times looser"
    ):
        solution = bl.solve(game, y=loose, optimizer=partial(torch.optim.SGD, lr=0.5), steps=3)
    assert solution.stationarity["y"] <= 1e-8
    assert any("times looser" in told for told in solution.warnings)


@pytest.mark.parametrize("wrong", [10.0, bl.responses.Geometric])
def test_what_is_no_schedule_is_refused(wrong):
    with pytest.raises(TypeError, match="inexactness is"):
        response(wrong)
