"""Running statistics of BatchNorm move with the weights: what a leader is told of them, held to closed forms."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD

import bilevel as bl
from bilevel.game.modules import CallableVariables, replaced
from bilevel.game.statistics import moving_layers, settled, watching

D = torch.float64
EPS = 1e-5
ROWS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=D) + 0.3
SEEN = 1.5 * torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=D)
WANTED = torch.linspace(-1.0, 1.0, 7, dtype=D)


def network(momentum=1.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 1, bias=False), nn.BatchNorm1d(1, affine=False, momentum=momentum)).double()


def follow(weights, x, batch):
    """Rests where the weights are x: its network is run for its statistics alone."""
    return (weights["0.weight"][0] - x).square().sum() + 0.0 * weights(batch).sum()


def lead(weights, x, batch):
    return (weights(batch)[:, 0] - WANTED).square().mean() + 0.05 * x.sum()


def game(momentum=1.0, follow=follow, lead=lead, rows=ROWS):
    return bl.Game(
        x=bl.Player(lead, torch.tensor([0.5, -0.4, 0.8], dtype=D), [SEEN]),
        weights=bl.Player(follow, network(momentum), [rows]),
    )


def exact(x, rows=ROWS):
    """The leader's loss where the weights are x and the statistics those of the follower's rows."""
    at = rows @ x
    out = (SEEN @ x - at.mean()) / (at.var() + EPS).sqrt()
    return (out - WANTED).square().mean() + 0.05 * x.sum()


def slope(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def hypergradient(played, response, calls=1, moved=True):
    state = response.init(played)
    for _ in range(calls):
        x = played.initial("x").requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.BilevelWarning)
            weights, state = response(played, {"x": x}, state)
            everybody = {"x": x, "weights": weights}
            buffers = played.statistics(everybody, {"weights": state}) if moved else {"weights": state["buffers"]}
            value = played.loss("x", everybody, SEEN, buffers)
        (found,) = torch.autograd.grad(value, x)
        state = response.after_backward(state, weights)
    return value.detach(), found


# On this quadratic SGD with a rate of 1/2 is at the optimum after one step, with its whole derivative.
AT_ONCE = partial(SGD, lr=0.5)
RESPONSES = [
    bl.Unrolled(AT_ONCE, steps=2),
    bl.Unrolled(AT_ONCE, steps=4, differentiation=bl.Segments()),
    bl.Unrolled(AT_ONCE, steps=2, differentiation=bl.ForwardMode()),
    bl.Implicit(AT_ONCE, steps=3),
    bl.Nudged(AT_ONCE, steps=3, nudge=1e-5),
]


@pytest.mark.parametrize("response", RESPONSES, ids=lambda r: type(r).__name__)
def test_the_hypergradient_has_the_statistics_path(response):
    played = game()
    x = played.initial("x")
    wanted = slope(exact, x)
    value, found = hypergradient(played, response)
    # momentum=1: the running statistics are those of the one batch, at the weights of the last step's start, x itself.
    torch.testing.assert_close(value, exact(x), rtol=1e-9, atol=1e-12)
    # Nudged: a one-sided difference in 1e-5, of a curvature of order 1.
    tolerance = 1e-4 if isinstance(response, bl.Nudged) else 1e-9
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    _, held = hypergradient(played, response, moved=False)
    assert torch.linalg.vector_norm(held - wanted) > 0.5 * torch.linalg.vector_norm(wanted)


def test_a_scale_that_batch_norm_divides_out_is_worth_nothing():
    # The loss does not change along x itself, but for the variance's 1e-5; with statistics held it seems to.
    played = game(lead=lambda weights, batch: (weights(batch)[:, 0] - WANTED).square().mean())
    x = played.initial("x")
    response = bl.Implicit(AT_ONCE, steps=3)
    _, found = hypergradient(played, response)
    _, held = hypergradient(played, response, moved=False)
    variance = float((ROWS @ x).var())
    assert abs(float(found @ x)) <= 10.0 * EPS / variance * float(held.norm() * x.norm())
    assert abs(float(held @ x)) > 0.1 * float(held.norm() * x.norm())


def test_solve_follows_it():
    played = game()
    step = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error", bl.errors.UnreliableResponseWarning)
        solution = bl.solve(played, optimizer=partial(SGD, lr=step), steps=1, weights=bl.Unrolled(AT_ONCE, steps=2))
    x = played.initial("x")
    torch.testing.assert_close(solution.variables["x"], x - step * slope(exact, x), rtol=1e-9, atol=1e-12)


def test_a_leader_that_scipy_moves_sees_it_too():
    played = game()
    response = bl.Unrolled(AT_ONCE, steps=2)
    with pytest.warns(bl.errors.NonConvergenceWarning):  # one evaluation is no end
        solution = bl.solve(played, optimizer=bl.Scipy("L-BFGS-B"), steps=1, weights=response)
    wanted = slope(exact, played.initial("x")).norm()
    assert solution.history[0]["gradient_norm"] == pytest.approx(float(wanted), rel=1e-9)


def test_a_certificate_within_constraints_has_it_too():
    def within(**options):
        own = bl.Player(lead, torch.tensor([0.5, -0.4, 0.8], dtype=D), [SEEN], **options)
        return bl.Game(x=own, weights=bl.Player(follow, network(), [ROWS]))

    still = {"optimizer": partial(SGD, lr=0.0), "steps": 1, "weights": bl.Unrolled(AT_ONCE, steps=2)}
    free = within()
    x = free.initial("x")
    for played in (free, within(domain=bl.Box(-5.0, 5.0))):
        found = bl.certify(played, bl.solve(played, **still)).corrected
        # The follower is at its optimum to rounding; its two-dimensional systems have condition 1.
        torch.testing.assert_close(found, slope(exact, x), rtol=1e-8, atol=1e-10)


def test_a_follower_that_runs_another_one_by_its_statistics_is_told_of():
    second = network()

    def middle(y, x, z, batch):
        return (z(batch)[:, 0] - y.sum()).square().mean() + (y - x).square().sum()

    def last(z, y, batch):
        return (z["0.weight"][0] - y).square().sum() + 0.0 * z(batch).sum()

    played = bl.Game(
        x=bl.Player(lambda x, y: (y - x).square().sum() + x.sum(), torch.ones(3, dtype=D)),
        y=bl.Player(middle, torch.zeros(3, dtype=D), [ROWS]),
        z=bl.Player(last, second, [ROWS]),
    )
    responses = {name: bl.Unrolled(AT_ONCE, steps=1, tolerance=None) for name in ("y", "z")}
    with pytest.warns(bl.errors.UnreliableResponseWarning, match="follower 'y' runs the module of follower 'z'"):
        bl.solve(played, steps=1, **responses)


def test_rules_that_move_the_follower_themselves_see_it_too():
    # A value function's difference in nu is wrong by O(nu^2); its followers settle within rounding.
    played, step = game(), 0.1
    rule = bl.dynamics.ValueFunction(AT_ONCE, method=bl.dynamics.F2SA2(steps=30, nudge=1e-3))
    solution = bl.solve(played, optimizer=partial(SGD, lr=step), steps=1, dynamics=rule)
    x = played.initial("x")

    def wanted(moving):  # in the first step the running statistics are 0 and 1 still, and move from there
        at, there = ROWS @ moving, ROWS @ x
        out = (SEEN @ moving - at.mean() + there.mean()) / (1.0 + at.var() - there.var() + EPS).sqrt()
        return (out - WANTED).square().mean() + 0.05 * moving.sum()

    torch.testing.assert_close(solution.variables["x"], x - step * slope(wanted, x), rtol=1e-3, atol=1e-4)


def test_what_the_leader_does_to_the_inputs_reaches_the_statistics_directly():
    def scaled(weights, x, batch):
        return (weights["0.weight"][0] - 1.0).square().sum() + 0.0 * weights(batch * x).sum()

    def wanted(x):
        at = (ROWS * x).sum(1)
        out = (SEEN.sum(1) - at.mean()) / (at.var() + EPS).sqrt()
        return (out - WANTED).square().mean() + 0.05 * x.sum()

    played = game(follow=scaled)
    _, found = hypergradient(played, bl.Unrolled(AT_ONCE, steps=2))
    torch.testing.assert_close(found, slope(wanted, played.initial("x")), rtol=1e-9, atol=1e-12)


def test_many_games_have_statistics_of_their_own():
    one = game()
    starts = torch.tensor([[0.5, -0.4, 0.8], [1.0, 0.2, -0.3], [-0.7, 0.9, 0.1]], dtype=D)
    games = bl.Games(one, 3, init={"x": starts})
    response = bl.Unrolled(AT_ONCE, steps=2)
    x = games.initial("x").requires_grad_()
    weights, state = response(games, {"x": x}, response.init(games))
    everybody = {"x": x, "weights": weights}
    value = games.loss("x", everybody, SEEN, games.statistics(everybody, {"weights": state}))
    (found,) = torch.autograd.grad(value.sum(), x)
    for index, start in enumerate(starts):
        torch.testing.assert_close(found[index], slope(exact, start), rtol=1e-9, atol=1e-12)


def test_tasks_too():
    tasks = bl.Tasks(
        meta=bl.Player(
            lambda meta, task, batch: (task(batch[0])[:, 0] - WANTED).square().mean() + 0.05 * meta.sum(),
            torch.tensor([0.5, -0.4, 0.8], dtype=D),
        ),
        task=bl.Player(
            lambda meta, task, batch: (task["0.weight"][0] - meta).square().sum() + 0.0 * task(batch[0]).sum(),
            network(),
        ),
        data=[{"support": (torch.stack([ROWS, 2.0 * ROWS]),), "query": (torch.stack([SEEN, SEEN]),)}],
    )
    solution = bl.solve(tasks, optimizer=partial(SGD, lr=0.1), steps=1, task=bl.Unrolled(AT_ONCE, steps=2))
    x = tasks.initial("meta")
    wanted = slope(lambda x: 0.5 * (exact(x) + exact(x, 2.0 * ROWS)), x)
    torch.testing.assert_close(solution.variables["meta"], x - 0.1 * wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm1d(4), (6, 4, 5)),
        (nn.BatchNorm2d(4, affine=False), (6, 4, 3, 3)),
        (nn.BatchNorm3d(4, momentum=None), (6, 4, 2, 2, 2)),
        (nn.InstanceNorm1d(4, track_running_stats=True), (6, 4, 5)),
        (nn.InstanceNorm1d(4, track_running_stats=True, affine=True), (4, 5)),
        (nn.InstanceNorm2d(4, track_running_stats=True, affine=True), (6, 4, 3, 3)),
    ],
)
def test_moments_are_what_running_statistics_go_to_and_values_are_torchs(layer, shape):
    torch.manual_seed(0)
    model = nn.Sequential(layer).double()
    inputs = torch.randn(shape, dtype=D) * 2.0 + 1.0
    moving = moving_layers(model)
    assert list(moving) == ["0"]
    seen = {}
    own = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    with replaced(model, watching(model, seen, dict(model.named_buffers()))):
        CallableVariables(own, model, True)(inputs)
    found = settled(model, seen)
    for _ in range(400):  # (1 - 0.1)^400 of where they began is left
        CallableVariables(own, model, True)(inputs)
    after = dict(model.named_buffers())
    for path, value in found.items():
        torch.testing.assert_close(value, after[path], rtol=1e-9, atol=1e-9)
        assert not torch.equal(before[path], after[path])
    with torch.no_grad():
        plain = CallableVariables(own, model, False)(inputs)
    for name in ("running_mean", "running_var"):
        model[0]._buffers[name] = after[f"0.{name}"].clone().requires_grad_()
    with replaced(model, watching(model, None, dict(model.named_buffers()))):
        moved = CallableVariables(own, model, False)(inputs)
    torch.testing.assert_close(moved, plain, rtol=1e-12, atol=1e-12)
    assert all(
        g is not None for g in torch.autograd.grad(moved.square().sum(), [model[0].running_mean, model[0].running_var])
    )


def test_a_layer_that_is_run_twice_counts_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1, affine=False, momentum=0.3)
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.norm(self.norm(x) + 2.0 * x)

    model, seen = Twice().double(), {}
    own = dict(model.named_parameters())
    with replaced(model, watching(model, seen, dict(model.named_buffers()))):
        CallableVariables(own, model, True)(ROWS[:, :1])
    for _ in range(100):  # (1 - 0.3)^200 is left
        CallableVariables(own, model, True)(ROWS[:, :1])
    for path, value in settled(model, seen).items():
        torch.testing.assert_close(value, model.get_buffer(path), rtol=1e-9, atol=1e-9)


def test_frozen_and_own_layers_are_left_as_they_are():
    class Own(nn.BatchNorm1d):
        def forward(self, inputs):
            return super().forward(inputs)

    layers = [nn.BatchNorm1d(2), nn.BatchNorm1d(2), Own(2), nn.BatchNorm1d(2, track_running_stats=False)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(2, momentum=0.0), nn.InstanceNorm1d(2))
    model[1].eval()
    assert list(moving_layers(model)) == ["0"]
    assert list(moving_layers(model.eval())) == ["0", "1"]  # as a whole in evaluation mode: all of it is trained


def test_a_loop_of_ones_own_is_told_of_what_it_leaves_out():
    played, response = game(), bl.Unrolled(AT_ONCE, steps=2)
    x = played.initial("x").requires_grad_()
    weights, state = response(played, {"x": x}, response.init(played))
    everybody = {"x": x, "weights": weights}
    hint = r"buffers=game\.statistics\(variables, \{'weights': state\}\)"
    for buffers in (None, {"weights": state["buffers"]}):
        with pytest.warns(bl.errors.UnreliableResponseWarning, match=hint):
            played.loss("x", everybody, SEEN, buffers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        played.loss("x", everybody, SEEN, played.statistics(everybody, {"weights": state}))
        played.loss("x", {"x": x, "weights": played.initial("weights")}, SEEN)
        with torch.no_grad():
            played.loss("x", everybody, SEEN, {"weights": state["buffers"]})


def test_random_numbers_go_on_as_if_nothing_had_been_looked_at():
    played = game(follow=lambda weights, x, batch: follow(weights, x, batch + 0.1 * torch.rand_like(batch)))
    response = bl.Unrolled(AT_ONCE, steps=1)
    x = played.initial("x").requires_grad_()
    torch.manual_seed(3)
    weights, state = response(played, {"x": x}, response.init(played))
    before = torch.random.get_rng_state()
    played.statistics({"x": x, "weights": weights}, {"weights": state})
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_state_is_not_put_on_a_graph():
    played, response = game(), bl.Unrolled(AT_ONCE, steps=1)
    x = played.initial("x").requires_grad_()
    weights, state = response(played, {"x": x}, response.init(played))
    moved = played.statistics({"x": x, "weights": weights}, {"weights": state})
    assert (
        moved["weights"]["1.running_var"].requires_grad and not moved["weights"]["1.num_batches_tracked"].requires_grad
    )
    assert not any(tensor.requires_grad for tensor in state["buffers"].values())


def test_the_check_and_the_certificate_hold_it_to_followers_solved_anew():
    played = game()
    response = bl.Implicit(AT_ONCE, steps=3)
    assert bool(bl.testing.check_hypergradient(played, response))


def test_several_processes_hold_them_and_say_so():
    played = bl.DataParallel(coupled=True).game(game())
    response = bl.Unrolled(AT_ONCE, steps=2)
    x = played.initial("x").requires_grad_()
    weights, state = response(played, {"x": x}, response.init(played))
    everybody = {"x": x, "weights": weights}
    with pytest.warns(bl.errors.UnreliableResponseWarning, match=r"DataParallel\(coupled=True\).*held fixed"):
        moved = played.statistics(everybody, {"weights": state})
    assert not any(tensor.requires_grad for tensor in moved["weights"].values())
