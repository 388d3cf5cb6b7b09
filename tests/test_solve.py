"""The loop: what it finds, what it leaves on disk, what it says."""

import warnings
from functools import partial

import pytest
import torch
from torch.nn.functional import dropout
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl

D = torch.float64
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def scalar(value):
    return torch.tensor(value, dtype=D)


def noisy_game():
    """Minibatches in shuffled order, and dropout from the global random numbers."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(12, 4, generator=generator, dtype=D)
    targets = inputs @ torch.arange(4.0, dtype=D) + 0.1 * torch.randn(12, generator=generator, dtype=D)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True)

    def train(decay, weights, batch):
        return ((dropout(batch[0], 0.2) @ weights - batch[1]) ** 2).mean() + (decay.exp() * weights**2).sum()

    return bl.Game(
        decay=bl.Player(
            lambda weights, batch: ((batch[0] @ weights - batch[1]) ** 2).mean(), torch.zeros(4, dtype=D), loader
        ),
        weights=bl.Player(train, torch.zeros(4, dtype=D), loader),
    )


RESPONSES = {
    "unrolled": {"weights": bl.Unrolled(partial(ADAM, lr=0.05), steps=3)},
    "implicit": {"weights": bl.Implicit(partial(SGD, lr=0.05, momentum=0.5), steps=3, tolerance=None)},
    "hypernetwork": {"weights": bl.Hypernetwork(partial(ADAM, lr=0.02), scale=0.2, warmup=5, tolerance=None)},
}
OPTIONS = {
    "optimizer": partial(ADAM, lr=0.05),
    "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.7),
    "clip_norm": 0.5,
}


@pytest.mark.parametrize("responses", RESPONSES.values(), ids=RESPONSES)
def test_half_and_half_equals_the_whole(responses, tmp_path):
    torch.manual_seed(7)
    whole = bl.solve(noisy_game(), steps=14, **OPTIONS, **responses)
    torch.manual_seed(7)
    path = tmp_path / "run.pt"
    bl.solve(noisy_game(), steps=7, checkpoint=path, **OPTIONS, **responses)
    torch.manual_seed(99)  # the checkpoint brings its own random numbers
    rest = bl.solve(noisy_game(), steps=14, checkpoint=path, **OPTIONS, **responses)
    for name in whole.variables:
        assert torch.equal(whole.variables[name], rest.variables[name])
    untimed = [[{k: v for k, v in r.items() if k != "seconds"} for r in s.history] for s in (whole, rest)]
    assert untimed[0] == untimed[1]
    assert (whole.gradients, whole.products) == (rest.gradients, rest.products)
    assert torch.load(path, weights_only=True)["step"] == 14


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_killed_run_loses_nothing(error, tmp_path):
    def kill(step, record, variables):
        if step == 5:
            raise error

    options = {"optimizer": partial(SGD, lr=0.1), **RESPONSES["unrolled"]}
    path = tmp_path / "run.pt"
    torch.manual_seed(7)
    with pytest.raises(error):
        bl.solve(noisy_game(), steps=8, checkpoint=path, callbacks=[kill], **options)
    assert torch.load(path, weights_only=True)["step"] == 5
    rest = bl.solve(noisy_game(), steps=8, checkpoint=path, **options)
    torch.manual_seed(7)
    whole = bl.solve(noisy_game(), steps=8, **options)
    assert torch.equal(rest.variables["decay"], whole.variables["decay"])


def test_a_step_that_is_cut_in_two_is_not_saved(tmp_path):
    class Cut(SGD):
        left = 3

        def step(self, closure=None):
            super().step(closure)
            Cut.left -= 1
            if Cut.left == 0:
                raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        bl.solve(
            noisy_game(),
            steps=9,
            checkpoint=path,
            checkpoint_every=2,
            optimizer=partial(Cut, lr=0.1),
            **RESPONSES["unrolled"],
        )
    assert torch.load(path, weights_only=True)["step"] == 2


def test_checkpoints_of_others_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    bl.solve(noisy_game(), steps=2, checkpoint=path, **RESPONSES["unrolled"])
    with pytest.raises(bl.errors.CheckpointError, match=r"another run: its responses.*resume=False"):
        bl.solve(noisy_game(), steps=4, checkpoint=path, **RESPONSES["implicit"])
    with pytest.raises(bl.errors.CheckpointError, match="its seed"):
        bl.solve(noisy_game(), steps=4, checkpoint=path, seed=1, **RESPONSES["unrolled"])
    with pytest.raises(ValueError, match="has already 2"):
        bl.solve(noisy_game(), steps=1, checkpoint=path, **RESPONSES["unrolled"])
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(bl.errors.CheckpointError, match=r"Cannot read.*Delete it"):
        bl.solve(noisy_game(), steps=4, checkpoint=path, **RESPONSES["unrolled"])
    with pytest.raises(ValueError, match="folder does not exist"):
        bl.solve(noisy_game(), steps=4, checkpoint=tmp_path / "no" / "run.pt", **RESPONSES["unrolled"])


def test_three_levels_nest():
    # c = 2b; then b minimises (b - a)^2 + (2b - 1/2)^2 / 2: b = (a + 1/2) / 3; a minimises (a - 1)^2 + (a - 1/2)^2.
    game = bl.Game(
        a=bl.Player(lambda a, b, c: (a - 1) ** 2 + (b + c - 1) ** 2, scalar(0.0)),
        b=bl.Player(lambda a, b, c: (b - a) ** 2 + (c - 0.5) ** 2 / 2, scalar(0.0)),
        c=bl.Player(lambda b, c: (c - 2 * b) ** 2, scalar(0.1)),
    )
    exact = bl.linear.Dense(rtol=1e-10)
    b = bl.Implicit(partial(SGD, lr=1 / 6), steps=100, tolerance=1e-11, linear_solver=exact)
    c = bl.Implicit(partial(SGD, lr=0.5), steps=5, tolerance=1e-11, linear_solver=exact)
    solution = bl.solve(game, b=b, c=c, optimizer=partial(SGD, lr=0.25), steps=3)  # lr = 1 / curvature: one step
    for name, value in {"a": 3 / 4, "b": 5 / 12, "c": 5 / 6}.items():
        assert solution.variables[name].item() == pytest.approx(value, abs=1e-10)


def cournot(a=10.0, b=1.0, c1=1.0, c2=2.0):
    def profit(own, other, cost):
        return -(a - b * (own + other) - cost) * own

    return bl.Game(
        leader=bl.Player(lambda leader, follower: profit(leader, follower, c1), scalar(1.0)),
        follower=bl.Player(lambda leader, follower: profit(follower, leader, c2), scalar(1.0)),
    )


def test_cournot_without_a_response_and_stackelberg_with_one():
    a, b, c1, c2 = 10.0, 1.0, 1.0, 2.0
    nash = bl.solve(cournot(), optimizer=partial(SGD, lr=0.3), steps=100)
    assert nash.variables["leader"].item() == pytest.approx((a - 2 * c1 + c2) / (3 * b), abs=1e-8)
    assert nash.variables["follower"].item() == pytest.approx((a - 2 * c2 + c1) / (3 * b), abs=1e-8)
    exact = bl.ConjugateGradient(rtol=1e-12)
    response = bl.Implicit(partial(SGD, lr=0.5), steps=10, tolerance=1e-12, linear_solver=exact)
    lead = bl.solve(cournot(), follower=response, optimizer=partial(SGD, lr=0.5), steps=60)
    assert lead.variables["leader"].item() == pytest.approx((a - 2 * c1 + c2) / (2 * b), abs=1e-8)
    assert lead.variables["follower"].item() == pytest.approx((a + 2 * c1 - 3 * c2) / (4 * b), abs=1e-8)


def test_simultaneous_play_spirals_at_the_known_rate():
    game = bl.Game(x=bl.Player(lambda x, y: x * y, scalar(1.0)), y=bl.Player(lambda x, y: -x * y, scalar(0.5)))
    lr, steps = 0.1, 20
    end = bl.solve(game, optimizer=partial(SGD, lr=lr), steps=steps).variables
    radius = (end["x"] ** 2 + end["y"] ** 2).sqrt().item()
    assert radius == pytest.approx(1.25**0.5 * (1 + lr**2) ** (steps / 2), rel=1e-12)


def test_each_leader_may_have_its_own_optimiser():
    game = cournot()
    still = {"leader": partial(SGD, lr=0.3), "follower": partial(SGD, lr=0.0)}
    assert bl.solve(game, optimizer=still, steps=3).variables["follower"].item() == 1.0
    with pytest.raises(ValueError, match="expected one for each leader"):
        bl.solve(game, optimizer={"leader": partial(SGD, lr=0.3)}, steps=3)


def test_what_cannot_be_is_refused():
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=1)
    with pytest.raises(ValueError, match="'leader' moves first and leads"):
        bl.solve(cournot(), leader=response)
    with pytest.raises(TypeError, match="'folower' is neither an option nor a player"):
        bl.solve(cournot(), folower=response)
    with pytest.raises(TypeError, match="is no response"):
        bl.solve(cournot(), follower=partial(SGD, lr=0.1))
    with pytest.raises(TypeError, match="'leader' is LBFGS, whose step.. wants a closure.*Use one such as Adam"):
        bl.solve(cournot(), follower=response, optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="steps=0"):
        bl.solve(cournot(), steps=0)


def test_a_gradient_that_is_not_a_number_stops_the_run():
    def lead(x, y):
        return (x - 1).sqrt() * y + x

    game = bl.Game(x=bl.Player(lead, scalar(1.5)), y=bl.Player(lambda x, y: (y - x) ** 2, scalar(0.0)))
    with pytest.raises(bl.errors.NonFiniteError, match="'x': its gradient at step .* has norm nan"):
        bl.solve(game, y=bl.Unrolled(partial(SGD, lr=0.5), steps=1), optimizer=partial(SGD, lr=1.0), steps=20)


def test_a_step_in_which_several_leaders_hear_of_it_is_one_step():
    def lead(a, b, y):
        return (a - y) ** 2 + (b - y) ** 2

    game = bl.Game(
        a=bl.Player(lead, scalar(1.5)),
        b=bl.Player(lambda a, b, y: lead(b, a, y) + b**2, scalar(0.5)),
        y=bl.Player(lambda a, b, y: (y - a - b) ** 2, scalar(0.0)),
    )
    # An adjoint that is short of its equation is told in each leader's backward pass.
    poor = bl.Implicit(partial(SGD, lr=0.4), steps=50, linear_solver=bl.linear.Identity(scale=1.5))
    with pytest.warns(bl.errors.BilevelWarning):
        solution = bl.solve(game, y=poor, optimizer=partial(SGD, lr=0.01), steps=3)
    assert ["in 3 of 3 steps" in told for told in solution.warnings] == [True]


def test_warnings_are_gathered_and_issued_once_while_they_hold():
    short = bl.Implicit(partial(SGD, lr=0.01), steps=1)
    with pytest.warns(bl.errors.FollowerNonConvergenceWarning) as caught:
        solution = bl.solve(cournot(), follower=short, optimizer=partial(SGD, lr=0.1), steps=4)
    assert len(caught) == 1 and len(solution.warnings) == 1
    assert "in 4 of 4 steps" in solution.warnings[0] and "wanted 0.001" in solution.warnings[0]
    assert "Warning" in str(solution)
    # Far away at first, converged at the end: told in the solution, no longer a warning.
    later = bl.Implicit(partial(SGD, lr=0.25), steps=4)
    solution = bl.solve(cournot(), follower=later, optimizer=partial(SGD, lr=0.05), steps=30)
    assert len(solution.warnings) == 1 and solution.stationarity["follower"] <= 1e-3


def test_the_solution_tells_the_work(capsys):
    seen = []
    response = bl.Implicit(partial(SGD, lr=0.5), steps=10, tolerance=1e-10)
    solution = bl.solve(
        cournot(),
        follower=response,
        steps=5,
        progress=True,
        callbacks=[lambda step, record, variables: seen.append((step, sorted(variables)))],
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5] and seen[0][1] == ["follower", "leader"]
    assert solution.products >= 5 and solution.gradients >= 5 * 3
    assert solution.residuals["follower"] <= 1e-6
    assert [r["work"] for r in solution.history] == sorted(r["work"] for r in solution.history)
    assert "Hessian-vector products" in str(solution)
    assert "5/5" in capsys.readouterr().out


def test_clipping_bounds_the_step():
    before, lr, norm = 1.0, 0.5, 0.01
    end = bl.solve(cournot(), optimizer=partial(SGD, lr=lr), clip_norm=norm, steps=1).variables["leader"].item()
    assert abs(end - before) == pytest.approx(lr * norm)


def test_a_callback_ends_the_run_and_it_goes_on_from_there(tmp_path):
    path, calls = tmp_path / "run.pt", []

    def stop(step, record, variables):
        calls.append(step)
        if step == 3:
            raise bl.errors.StopRun

    def run(**options):
        torch.manual_seed(0)
        return bl.solve(noisy_game(), optimizer=partial(ADAM, lr=0.1), **RESPONSES["unrolled"], **options)

    whole = run(steps=6)
    stopped = run(steps=6, checkpoint=path, callbacks=[stop, lambda *_: calls.append("after")])
    assert calls == [1, "after", 2, "after", 3, "after"]  # whoever else listens hears of the last step too
    assert [record["step"] for record in stopped.history] == [1, 2, 3]
    resumed = run(steps=6, checkpoint=path)
    for name in whole.variables:
        assert torch.equal(resumed.variables[name], whole.variables[name])


def far_leader(start):
    """Right is x = 0; y follows exactly, and the loss is x^2."""
    return bl.Game(
        x=bl.Player(lambda x, y: x * y, torch.tensor(start, dtype=torch.float64)),
        y=bl.Player(lambda x, y: (y - x) ** 2, torch.tensor(0.0, dtype=torch.float64)),
    )


def test_a_leader_who_has_hardly_begun_is_told_with_its_gradient():
    """Adam's default step of .01 takes 1 of the 20,000 that there are; the gradient is 2 x."""
    response = bl.Implicit(bl.ClosedForm(lambda x: x))
    with pytest.warns(
        bl.errors.LeaderNonConvergenceWarning, match=r"'x' was far from an optimum: after 100 .* 39998, 100%"
    ):
        found = bl.solve(far_leader(2e4), y=response)
    assert "norm of the leaders' gradient in the last step: 39998, 1 of that at the start" in str(found)
    assert any("was far from an optimum" in text for text in found.warnings)


@pytest.mark.parametrize("start", [0.0, 1e-9, 0.5, 3.0])
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_a_leader_who_arrives_is_not(start, rate):
    found = bl.solve(
        far_leader(start),
        y=bl.Implicit(bl.ClosedForm(lambda x: x)),
        optimizer=partial(torch.optim.SGD, lr=rate),
        steps=100,
    )
    assert not found.warnings


def two_speeds(slow):
    """The leader pulls y0 down, which follows x at once, and pushes y1 up, which follows slowly."""
    speeds = torch.tensor([1.0, slow], dtype=torch.float64)
    return bl.Game(
        x=bl.Player(lambda y: y[0] - 4.0 * y[1], torch.tensor(1.0, dtype=torch.float64)),
        y=bl.Player(lambda x, y: 0.5 * (speeds * (y - x) ** 2).sum(), torch.zeros(2, dtype=torch.float64)),
    )


def played(game, leads, **options):
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.5), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bl.solve(game, y=response, optimizer=partial(torch.optim.SGD, lr=1e-3), steps=leads)
    return found, [str(warning.message) for warning in caught]


def test_a_horizon_that_is_too_short_is_told_now_and_then():
    """By hand dy_K/dx = 1 - (1 - h / 2)^K: h_K is .616 for K = 5, -.330 for 20, and -3 in the end."""
    found, told = played(two_speeds(0.04), 17, steps=5)
    short, farther = (1 - 0.5**k - 4 * (1 - 0.98**k) for k in (5, 20))
    assert len(told) == 1 and "Short horizon" in told[0] and "points the other way" in told[0]
    assert f"misses {(short - farther) / -farther:.0%}" in told[0] and f"norm {short:.3g} for {-farther:.3g}" in told[0]
    assert found.variables["x"] < 1.0  # the wrong way: x is to grow
    silent = played(two_speeds(0.04), 17, steps=5, tolerance=None)[0]
    # To look changes nothing: neither the run nor its work.
    assert torch.equal(found.variables["x"], silent.variables["x"]) and found.gradients == silent.gradients
    last = played(two_speeds(0.04), 17, steps=200, backprop_steps=5)[1]
    assert len(last) == 1 and "differentiates 5 steps; 20 from the same place" in last[0]


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [1, 5, 400])
def test_a_horizon_that_only_scales_is_not_told(horizon):
    """Of one speed the short horizon sees a part of the same direction, at least a quarter of the longer one's."""
    assert not played(two_speeds(1.0), 17, steps=horizon)[1]
    assert not played(two_speeds(0.04), 17, steps=400)[1]


def test_a_resumed_run_knows_what_a_look_found(tmp_path):
    whole, _ = played(two_speeds(0.04), 19, steps=5)
    path = tmp_path / "run.pt"
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=5)
    for steps in (17, 19):
        with pytest.warns(bl.errors.UnreliableResponseWarning, match="Short horizon"):
            half = bl.solve(
                two_speeds(0.04), y=response, optimizer=partial(torch.optim.SGD, lr=1e-3), steps=steps, checkpoint=path
            )
    assert half.warnings == whole.warnings and torch.equal(half.variables["x"], whole.variables["x"])


def turning(start=0.5):
    """x y: the gradients turn round the equilibrium at 0, and steps along them lead outwards."""
    half = torch.tensor(start, dtype=torch.float64)
    return bl.Game(x=bl.Player(lambda x, y: x * y, half), y=bl.Player(lambda x, y: -x * y, half))


def test_players_who_run_away_in_finite_numbers_are_told():
    """Each step is (1 + .3^2)^(1/2) times as far out: from quarter to quarter (25 steps) 2.9 times, in 100 steps 74."""
    with pytest.warns(bl.errors.LeaderNonConvergenceWarning, match=r"'x' and 'y' ran away: in 100 steps"):
        bl.solve(turning(), optimizer=partial(torch.optim.SGD, lr=0.3), steps=100)


def test_a_leader_whose_rate_is_too_large_is_told():
    """A rate of 1.2 for a curvature of 2 multiplies the distance by -1.4 a step."""
    game = bl.Game(
        x=bl.Player(lambda y: y.square().sum(), torch.tensor([0.3], dtype=torch.float64)),
        y=bl.Player(lambda x, y: (y - x).square().sum(), torch.tensor([0.3], dtype=torch.float64)),
    )
    with pytest.warns(bl.errors.LeaderNonConvergenceWarning, match=r"'x' ran away: in 30 steps"):
        bl.solve(game, y=bl.Implicit(bl.ClosedForm(lambda x: x)), optimizer=partial(torch.optim.SGD, lr=1.2), steps=30)


def test_a_leader_whose_follower_runs_away_is_told_although_it_hardly_moves():
    """A rate of 1.05 for a curvature of 2 takes the follower 1.1 times as far away a step: 2e8 times in 200."""
    game = bl.Game(
        x=bl.Player(lambda y: y.square().sum(), torch.tensor([0.3], dtype=torch.float64)),
        y=bl.Player(lambda x, y: (y - x).square().sum(), torch.tensor([0.5], dtype=torch.float64)),
    )
    away = bl.Unrolled(partial(torch.optim.SGD, lr=1.05), steps=5, warm_start=True)
    with pytest.warns(bl.errors.LeaderNonConvergenceWarning, match=r"loss of 'x' at .* its followers ran away"):
        bl.solve(game, y=away, optimizer=partial(torch.optim.SGD, lr=1e-12), steps=40)


@pytest.mark.parametrize(
    ("dynamics", "steps"),
    [(bl.dynamics.Extragradient(step_size=0.3), 200), (bl.dynamics.Alternating(), 200), (None, 12)],
    ids=["converges", "circles", "too few steps to say"],
)
def test_players_who_arrive_or_circle_are_not(dynamics, steps):
    found = bl.solve(turning(), dynamics=dynamics, optimizer=partial(torch.optim.SGD, lr=0.3), steps=steps)
    assert not found.warnings
