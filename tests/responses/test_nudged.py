"""Nudged: the implicit derivative from two nudged solves, by first derivatives alone."""

import io
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention

import bilevel as bl
from bilevel.errors import ConvergenceError, NonConvergenceWarning, SecondDerivativeError
from bilevel.testing import check_response

SGD, SLOW = partial(torch.optim.SGD, lr=0.3), partial(torch.optim.SGD, lr=0.02)
LBFGS = partial(torch.optim.LBFGS, max_iter=50, tolerance_grad=1e-13, tolerance_change=0.0)
DESIGN = torch.eye(5, dtype=torch.float64) + 0.1 * torch.linspace(-1.0, 1.0, 25, dtype=torch.float64).cos().view(5, 5)
TARGET = torch.linspace(-2.0, 1.0, 5, dtype=torch.float64)


def quartic(x, y):
    """Ridge, with a quartic term, so that differences have a truncation error; curvatures of some 2 to 4."""
    fit = 0.5 * (DESIGN.to(y) @ y - TARGET.to(y)).square().sum()
    return fit + 0.5 * (x.exp() * y.square()).sum() + 0.1 * y.pow(4).sum()


def lead(y):
    return (y - 1.0).square().sum()


def game_of(follow=quartic, dtype=torch.float64, size=5):
    start = torch.zeros(size, dtype=dtype)
    return bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, start))


def hypergradient(response, game, calls=1):
    state = response.init(game)
    for _ in range(calls):
        x = game.initial("x").requires_grad_()
        y, state = response(game, {"x": x}, state)
        (slope,) = torch.autograd.grad(lead(y), x)
        state = response.after_backward(state, y)
    return slope, state, response.report(state)


@pytest.fixture(scope="module")
def exact():
    response = bl.Implicit(SGD, steps=300, tolerance=1e-12, linear_solver=bl.linear.Dense())
    return hypergradient(response, game_of())[0]


def off(slope, exact):
    return float((slope - exact).norm() / exact.norm())


# How right it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("two_sided", "order"), [(True, 2.0), (False, 1.0)])
def test_the_error_falls_with_a_power_of_the_nudge(exact, two_sided, order):
    """Over the decades in which rounding, some 1e-16 / nudge, is far below."""
    nudges = [1e-1, 1e-2, 1e-3] if two_sided else [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]
    response = partial(bl.Nudged, SGD, steps=200, two_sided=two_sided, tolerance=None)
    found = [hypergradient(response(nudge=nudge), game_of()) for nudge in nudges]
    errors = [off(slope, exact) for slope, *_ in found]
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert math.log10(larger / smaller) == pytest.approx(order, abs=0.1)
    for error, (*_, report) in zip(errors, found, strict=True):  # it tells of no less than there is, and of that order
        assert error <= report.error <= 1e2 * error


@pytest.mark.parametrize("optimizer", [SGD, LBFGS], ids=["SGD", "LBFGS"])
def test_left_alone_it_finds_its_nudge(exact, optimizer):
    response = bl.Nudged(optimizer, steps=200, tolerance=1e-8)
    slope, _, report = hypergradient(response, game_of(), calls=3)
    # The best that central differences can do in float64 is some eps^(2/3), 4e-11.
    # The follower itself is left 1e-8 of its start away from where it rests.
    assert off(slope, exact) <= 1e-7
    assert report.error <= 2e-8
    assert report.products == 0


def well(x, y):
    """Wells at -.1 and .1; 1 % of the slope at the start, 2700 at y = 3, is far more than what holds y in one."""
    return 25.0 * (y.square() - 0.01).square().sum() + 1e-3 * (x * y).sum()


@pytest.mark.parametrize("two_sided", [True, False])
def test_a_first_nudge_that_leaves_the_valley_is_replaced_by_a_smaller_one(two_sided):
    start, x = torch.full((2,), 3.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    game = bl.Game(x=bl.Player(lead, x), y=bl.Player(well, start))
    response = bl.Nudged(LBFGS, steps=3, two_sided=two_sided, tolerance=1e-9)
    y, state = response(game, {"x": x.requires_grad_()}, response.init(game))
    (slope,) = torch.autograd.grad(lead(y), x)
    curvature = 300.0 * y.detach().square() - 1.0
    exact = -1e-3 * 2.0 * (y.detach() - 1.0) / curvature
    state = response.after_backward(state, y)
    # It accepts a nudge whose error it measures below 1 %. What it tells is right to its own order: 1 % of itself.
    told = response.report(state).error
    assert off(slope, exact) <= 1.01 * told
    assert told <= 1e-2
    # At the first guess the error is of the answer's own size, and told.
    with pytest.warns(NonConvergenceWarning, match="Nudged"):
        guessed, *_ = hypergradient(replace(response, nudge=1e-2), game)
    assert off(guessed, exact) > 0.5


def test_the_nudge_does_not_grow_out_of_the_valley():
    """A double well with a follower that settles exactly: nothing makes a larger nudge better than the measured one."""
    x, y = torch.full((1,), 0.1, dtype=torch.float64), torch.full((1,), 0.8, dtype=torch.float64)
    game = bl.Game(
        x=bl.Player(lead, x),
        y=bl.Player(lambda x, y: ((y.square() - 1.0).square() / 4.0 + x * y).sum(), y),
    )
    exact, *_ = hypergradient(bl.Implicit(LBFGS, steps=3, tolerance=1e-12), game)
    for calls in (1, 4, 8):
        slope, state, _ = hypergradient(bl.Nudged(LBFGS, steps=3), game, calls=calls)
        assert off(slope, exact) <= 1e-2
        assert state["nudge"]["size"] <= 1e-2


def test_a_nudge_that_cannot_be_checked_is_told():
    """The nudged solves step over a hole in the loss, and the check of a nudge of .01 falls into it."""

    def holed(x, y):
        apart = (y - x).detach().abs()
        hole = torch.where((apart > 5e-4) & (apart < 2e-3), math.nan, 0.0)
        return 0.5 * (y - x).square().sum() + (hole * y).sum()

    one = torch.ones(1, dtype=torch.float64)
    game = bl.Game(x=bl.Player(lead, 0.0 * one), y=bl.Player(holed, one))
    step = partial(torch.optim.SGD, lr=1.0)
    with pytest.warns(NonConvergenceWarning, match="it alone makes an error of about inf"):
        hypergradient(bl.Nudged(step, steps=1, nudge=1e-2), game)


def test_in_float32_it_is_as_good_as_differences_can_be(exact):
    slope, *_ = hypergradient(bl.Nudged(SGD, steps=200, tolerance=1e-4), game_of(dtype=torch.float32), calls=3)
    assert off(slope.double(), exact) <= 1e-3  # eps^(2/3) is 2e-5


@pytest.mark.slow
def test_it_holds_what_laws_ask_of_a_response():
    check_response(bl.Nudged(partial(torch.optim.SGD, lr=1.0), steps=200, tolerance=1e-10), examples=4)


def test_what_is_left_of_the_gradient_at_the_answer_does_not_enter():
    """A quadratic follower far from its optimum: the derivative of one that settles is as exact as ever."""
    game = game_of(lambda x, y: 0.5 * (y - x).square().sum() + 0.5 * y.square().sum())
    response = bl.Nudged(partial(torch.optim.SGD, lr=0.4), steps=30, tolerance=None)
    state = response.init(game) | {"variables": torch.full((5,), 1e3, dtype=torch.float64)}
    x = game.initial("x").requires_grad_()
    y, _ = bl.Nudged(partial(torch.optim.SGD, lr=0.4), steps=1, tolerance=None)(game, {"x": x}, state)
    assert float(y.detach().norm()) > 100.0
    short, _ = response(game, {"x": x}, state)
    (slope,) = torch.autograd.grad(short.sum(), x)
    # The solves leave .2^30 = 1e-21; a difference of numbers of size .5 * 1e6, at 1e-2 of 1e3: rounding.
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5), atol=1e-9, rtol=0.0)


def test_a_warm_start_saves_work():
    game = game_of()
    cold, _, first = hypergradient(bl.Nudged(SGD, steps=200, tolerance=1e-6, nudge=1e-3), game)
    warm, _, again = hypergradient(bl.Nudged(SGD, steps=200, tolerance=1e-6, nudge=1e-3), game, calls=2)
    assert again.gradients - first.gradients < 0.5 * first.gradients
    torch.testing.assert_close(warm, cold, atol=1e-4, rtol=1e-4)


def test_under_vmap_each_task_sees_its_own_batch():
    def follow(x, y, batch):
        return quartic(x, y) + 0.5 * (y - batch).square().sum()

    start = torch.zeros(5, dtype=torch.float64)
    batches = torch.linspace(-1.0, 1.0, 15, dtype=torch.float64).view(3, 5)
    game = bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, start, [batches[0]]))
    response = bl.Nudged(SGD, steps=200, tolerance=1e-10)
    state = response.init(game)

    def value(x, batch):
        return lead(response(game, {"x": x}, state, batch)[0])

    together = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(start, batches)
    for row, batch in zip(together, batches, strict=True):
        x = start.clone().requires_grad_()
        torch.testing.assert_close(row, torch.autograd.grad(value(x, batch), x)[0], atol=1e-9, rtol=1e-9)


# What it needs -------------------------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 2.0 * y * grad


def test_no_second_derivative_is_taken(monkeypatch):
    asked = []
    plain = torch.autograd.grad

    def watched(*args, **kwargs):
        asked.append(kwargs.get("create_graph", False))
        return plain(*args, **kwargs)

    game = game_of(lambda x, y: 0.5 * Once.apply(y - x).sum() + 0.5 * y.square().sum())
    response = bl.Nudged(partial(torch.optim.SGD, lr=0.4), steps=100, tolerance=1e-8)
    x, state = game.initial("x").requires_grad_(), response.init(game)
    monkeypatch.setattr(torch.autograd, "grad", watched)
    y, state = response(game, {"x": x}, state)
    (slope,) = plain(y.sum(), x)
    assert asked
    assert not any(asked)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5), atol=1e-7, rtol=0.0)


class Attention(nn.Module):
    """One head of fused attention over eight tokens, and a linear readout."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, tokens):
        queries, keys, values = self.inner(tokens).chunk(3, dim=-1)
        return self.out(scaled_dot_product_attention(queries, keys, values).mean(dim=1))


def test_fused_attention_is_as_good_as_any():
    torch.manual_seed(0)
    tokens, labels = torch.randn(32, 8, 8), torch.randint(3, (32,))

    def train(decay, weights):
        penalty = sum(leaf.square().sum() for leaf in weights.values())
        return cross_entropy(weights(tokens), labels) + decay.exp() * penalty

    def valid(weights):
        return cross_entropy(weights(tokens + 0.1), labels)

    game = bl.Game(decay=bl.Player(valid, torch.tensor(-2.0)), weights=bl.Player(train, Attention()))
    solver = bl.inner.TorchOptimizer(partial(torch.optim.SGD, lr=0.3, momentum=0.9))
    response = bl.Nudged(solver, steps=400, tolerance=1e-3)

    def value(decay, budget=1500):
        own = response.with_budget(budget)
        y, state = own(game, {"decay": decay}, own.init(game))
        return game.loss("decay", {"decay": decay, "weights": y}), y, state

    decay = torch.tensor(-2.0, requires_grad=True)
    loss, *_ = value(decay)
    (slope,) = torch.autograd.grad(loss, decay)
    with torch.no_grad():
        up, down = value(torch.tensor(-1.9))[0], value(torch.tensor(-2.1))[0]
    # Differences over .2 are off by their own truncation, of the order of 1e-2, and by 1e-3 of the solves.
    assert float(slope) == pytest.approx(float(up - down) / 0.2, rel=0.05)


def test_minibatches_dropout_and_buffers_are_held_through_both_solves():
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 4), torch.randn(64, 1)
    batches = [(inputs[i : i + 16], targets[i : i + 16]) for i in range(0, 64, 16)]

    def train(decay, weights, batch):
        features, goals = batch
        fitted = dropout(weights(features), 0.5)
        return (fitted - goals).square().mean() + decay.exp() * sum(w.square().sum() for w in weights.values())

    def valid(weights):
        return (weights(inputs) - targets).square().mean()

    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))
    game = bl.Game(decay=bl.Player(valid, torch.tensor(-3.0)), weights=bl.Player(train, model, batches))
    response = bl.Nudged(partial(torch.optim.SGD, lr=0.1), steps=100, tolerance=None)
    state, decay = response.init(game), torch.tensor(-3.0, requires_grad=True)
    weights, after = response(game, {"decay": decay}, state)
    buffers = {name: buffer.clone() for name, buffer in after["buffers"].items()}
    everybody = {"decay": decay, "weights": weights}
    moving = game.statistics(everybody, {"weights": after})
    one = torch.autograd.grad(game.loss("decay", everybody, buffers=moving), decay, retain_graph=True)
    two = torch.autograd.grad(game.loss("decay", everybody, buffers=moving), decay)
    assert one == two, "the same draws in every solve"
    assert all(torch.equal(buffers[name], after["buffers"][name]) for name in buffers)
    implicit = bl.Implicit(partial(torch.optim.SGD, lr=0.1), steps=100, tolerance=None, linear_solver=bl.linear.Dense())
    torch.manual_seed(1)
    a, _ = response(game, {"decay": decay}, response.init(game))
    torch.manual_seed(1)
    b, _ = implicit(game, {"decay": decay}, implicit.init(game))
    torch.testing.assert_close(a["1.weight"], b["1.weight"])  # the same optimum


@pytest.mark.filterwarnings("ignore:The run ended while 'x' was far")  # 30 steps are few
def test_a_leader_is_solved_for_and_resumed_bit_for_bit(tmp_path):
    solve = partial(bl.solve, game_of(), y=bl.Nudged(SGD, steps=300, tolerance=1e-6), optimizer=SLOW)
    whole = solve(steps=30)
    solve(steps=12, checkpoint=tmp_path / "run.pt")
    resumed = solve(steps=30, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["x"], resumed.variables["x"])
    exact = bl.solve(game_of(), y=bl.Implicit(SGD, steps=200, tolerance=1e-8), optimizer=SLOW, steps=30)
    torch.testing.assert_close(whole.variables["x"], exact.variables["x"], atol=1e-5, rtol=1e-5)
    assert whole.residuals["y"] < 1e-4
    assert whole.products == 0


def test_its_state_is_plain():
    _, state, _ = hypergradient(bl.Nudged(SGD, steps=50, tolerance=None), game_of())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["nudge"]["size"] == state["nudge"]["size"]


# What it says --------------------------------------------------------------------------------------------------------


def test_solves_that_stop_short_are_told():
    with pytest.warns(NonConvergenceWarning) as caught:
        hypergradient(bl.Nudged(SGD, steps=3, tolerance=1e-3), game_of())
    assert any("nudged solves of player 'y' left" in str(warning.message) for warning in caught)
    with pytest.raises(ConvergenceError, match="after 3 steps"):
        hypergradient(bl.Nudged(SGD, steps=3, tolerance=1e-3, strict=True), game_of())


@pytest.mark.parametrize(("nudge", "told"), [(1e-14, "too small for player 'y'"), (1.0, "too large for player 'y'")])
def test_a_nudge_that_spoils_the_answer_is_told_and_the_advice_works(nudge, told):
    with pytest.warns(NonConvergenceWarning) as caught:
        hypergradient(bl.Nudged(SGD, steps=200, tolerance=1e-3, nudge=nudge), game_of())
    assert told in str(caught[-1].message)
    hypergradient(bl.Nudged(SGD, steps=200, tolerance=1e-3), game_of())


def test_a_nudge_that_leaves_the_domain_is_named():
    with pytest.raises(bl.errors.NonFiniteError, match="nudged solve, with nudge=30"):
        hypergradient(bl.Nudged(SGD, steps=200, tolerance=1e-3, nudge=30.0), game_of())


def test_a_second_derivative_is_refused_in_words():
    game, response = game_of(), bl.Nudged(SGD, steps=300, tolerance=1e-6)
    state = response.init(game)

    def value(x):
        return lead(response(game, {"x": x}, state)[0])

    x = game.initial("x").requires_grad_()
    (slope,) = torch.autograd.grad(value(x), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="Use Implicit"):
        torch.autograd.grad(slope.sum(), x)
    with pytest.raises(SecondDerivativeError, match="Use Implicit"):
        torch.func.hessian(value)(game.initial("x"))


def test_what_it_cannot_nudge_is_refused():
    with pytest.raises(TypeError, match="cannot be nudged"):
        bl.Nudged(bl.ClosedForm(lambda x: x))
    with pytest.raises(ValueError, match="nudge=0"):
        bl.Nudged(SGD, nudge=0.0)
    boxed = bl.Player(quartic, torch.zeros(5), domain=bl.Box(0.0, 1.0))
    with pytest.raises(TypeError, match="player 'y' is constrained.*Use Implicit"):
        bl.Nudged(SGD).init(bl.Game(x=bl.Player(lead, torch.zeros(5)), y=boxed))
    own = bl.Player(quartic, torch.zeros(5), residual=lambda y, gradient: gradient)
    with pytest.raises(TypeError, match="Nudged minimises one loss.*Use Implicit with bilevel.ScipyRoot"):
        bl.Nudged(SGD).init(bl.Game(x=bl.Player(lead, torch.zeros(5)), y=own))


def test_no_slope_takes_no_solve():
    game, response = game_of(), bl.Nudged(SGD, steps=300, tolerance=1e-6)
    x, state = game.initial("x").requires_grad_(), response.init(game)
    y, after = response(game, {"x": x}, state)
    (slope,) = torch.autograd.grad((0.0 * y).sum(), x)
    assert torch.equal(slope, torch.zeros_like(slope))
    assert response.after_backward(after, y)["gradients"] == after["gradients"]
