"""LastStep: the derivative of one step by a difference of first derivatives, and what it says of its bias."""

import io
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.errors import SecondDerivativeError, UnreliableResponseWarning
from bilevel.inner import TorchOptimizer
from bilevel.responses import LastStep
from bilevel.testing import Quadratic, check_response
from bilevel.testing.laws import LAWS

D = torch.float64
SGD = partial(torch.optim.SGD, lr=0.3)
ADAM = partial(torch.optim.Adam, lr=0.05)
DESIGN = torch.eye(5, dtype=D) + 0.1 * torch.linspace(-1.0, 1.0, 25, dtype=D).cos().view(5, 5)
TARGET = torch.linspace(-2.0, 1.0, 5, dtype=D)
START = torch.linspace(-0.5, 0.5, 5, dtype=D)
KNOWN = Quadratic(curvatures=(0.5, 1.0), coupling=((1.0,), (0.5,)), at=(0.5,), axis=(1.0, 0.5), target=(1.0, -1.0))


def quartic(x, y):
    """Ridge, with a quartic term, so that differences have a truncation error; curvatures of some 2 to 4."""
    fit = 0.5 * (DESIGN @ y - TARGET).square().sum()
    return fit + 0.5 * (x.exp() * y.square()).sum() + 0.1 * y.pow(4).sum()


def lead(y):
    return (y - 1.0).square().sum()


def game_of(follow=quartic):
    return bl.Game(x=bl.Player(lead, torch.zeros(5, dtype=D)), y=bl.Player(follow, START))


def hypergradient(response, game, calls=1):
    """That of the last of some calls, the leader moving in between, with the state after it."""
    state = response.init(game)
    for call in range(calls):
        x = (game.initial("x") + 0.1 * call).requires_grad_()
        y, state = response(game, {"x": x}, state)
        (slope,) = torch.autograd.grad(lead(y), x)
        state = response.after_backward(state, y)
    return slope, state, response.report(state)


def off(slope, exact):
    return float((slope - exact).norm() / exact.norm())


# The step's derivative -----------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "SGD": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": ADAM,
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "clipped": TorchOptimizer(SGD, clip_norm=0.5),
    "clipped by value": TorchOptimizer(SGD, clip_value=0.7),
    "on a schedule": TorchOptimizer(SGD, rates=[0.3, 0.2, 0.1, 0.05]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_is_differentiated_as_unrolling_it_does(name):
    """From the same place and memory, so that the third call's differs by the difference's own error alone."""
    found, *_ = hypergradient(LastStep(OPTIMIZERS[name]), game_of(), calls=3)
    exact, *_ = hypergradient(bl.Unrolled(OPTIMIZERS[name], steps=1, tolerance=None), game_of(), calls=3)
    # h is eps^(1/3) of y: truncation and rounding are some eps^(2/3), 4e-11, times derivatives of order 10.
    torch.testing.assert_close(found, exact, atol=1e-8, rtol=1e-8)


def test_of_several_steps_it_is_the_last_ones():
    found, *_ = hypergradient(LastStep(ADAM, steps=6), game_of(), calls=2)
    exact, *_ = hypergradient(bl.Unrolled(ADAM, steps=6, backprop_steps=1, tolerance=None), game_of(), calls=2)
    torch.testing.assert_close(found, exact, atol=1e-8, rtol=1e-8)


def test_its_error_falls_with_the_square_of_the_distance():
    """Over decades in which rounding, some 1e-16 / distance, is far below."""

    def follow(x, y):
        return 0.5 * y.square().sum() + 0.1 * (x.exp() * y.sin()).sum()

    exact, *_ = hypergradient(bl.Unrolled(SGD, steps=1, tolerance=None), game_of(follow))
    errors = [off(hypergradient(LastStep(SGD, distance=h), game_of(follow))[0], exact) for h in (1e-1, 1e-2, 1e-3)]
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert math.log10(larger / smaller) == pytest.approx(2.0, abs=0.1)


def test_it_is_the_formula_of_darts_on_a_network():
    """Weights' gradients at w + h v and w - h v, v the slope of the validation loss at the stepped weights."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 6, dtype=D), torch.randint(3, (40,))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    names = [name for name, _ in model.named_parameters()]

    def train(mixing, weights):
        return cross_entropy(weights(inputs[:20] * mixing), labels[:20])

    def valid(mixing, weights):
        return cross_entropy(weights(inputs[20:] * mixing), labels[20:])

    game = bl.Game(mixing=bl.Player(valid, torch.ones(6, dtype=D)), weights=bl.Player(train, model))
    response, rate, distance = LastStep(partial(torch.optim.SGD, lr=0.5), distance=1e-2), 0.5, 1e-2
    mixing = torch.ones(6, dtype=D, requires_grad=True)
    weights, _ = response(game, {"mixing": mixing}, response.init(game))
    (found,) = torch.autograd.grad(game.loss("mixing", {"mixing": mixing, "weights": weights}), mixing)

    def slopes(player, at):
        w, m = {n: v.detach().requires_grad_() for n, v in at.items()}, mixing.detach().requires_grad_()
        loss = game.loss(player, {"mixing": m, "weights": w})
        on_m, *on_w = torch.autograd.grad(loss, [m, *w.values()])
        return on_m, dict(zip(names, on_w, strict=True))

    here = {n: p.detach() for n, p in model.named_parameters()}
    _, slope = slopes("weights", here)
    direct, v = slopes("mixing", {n: here[n] - rate * slope[n] for n in names})
    h = distance / torch.cat([leaf.flatten() for leaf in v.values()]).norm()
    up, _ = slopes("weights", {n: here[n] + h * v[n] for n in names})
    down, _ = slopes("weights", {n: here[n] - h * v[n] for n in names})
    torch.testing.assert_close(found, direct - rate * (up - down) / (2.0 * h), atol=1e-12, rtol=1e-10)


# As the optimum's, with its bias -------------------------------------------------------------------------------------


def test_at_the_optimum_it_is_off_by_the_steps_contraction():
    """d (y - lr grad f) / dx = lr H dy*/dx there, so that the Jacobian is (I - lr H) dy*/dx away."""
    game, lr, x = KNOWN.game(), 0.5, KNOWN.x0.clone().requires_grad_()
    response = LastStep(partial(torch.optim.SGD, lr=lr), steps=200, bias=0.75)
    y, _ = response(game, {"x": x}, response.init(game))
    jacobian = torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in y])
    exact = KNOWN.jacobian(KNOWN.x0)
    torch.testing.assert_close(jacobian, lr * KNOWN.hessian(KNOWN.x0) @ exact, atol=1e-8, rtol=1e-8)
    away = torch.linalg.matrix_norm(jacobian - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    assert away <= response.promise.stated_bias


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["SGD", "Adam"])
def test_its_residual_is_what_is_left_of_the_adjoint(optimizer, fitted):
    """|c - H v| / |c| for the v with which the hypergradient is -f_xy v, both by dense derivatives."""
    game, response = game_of(), LastStep(optimizer, steps=3, fitted=fitted)
    before = bl.Unrolled(optimizer, steps=2, tolerance=None)  # whose end is where the last step begins
    x = game.initial("x").requires_grad_()
    with torch.no_grad():
        at, _ = before(game, {"x": x}, before.init(game))
    y, state = response(game, {"x": x}, response.init(game))
    slope = torch.autograd.grad(lead(y), x)[0]
    state = response.after_backward(state, y)
    hessian = torch.func.hessian(quartic, argnums=1)(x.detach(), at)
    mixed = x.detach().exp() * at  # of each y with its own x
    c, v = 2.0 * (y.detach() - 1.0), -slope / mixed
    left = float((c - hessian @ v).norm() / c.norm())
    assert response.report(state).residual == pytest.approx(left, abs=1e-7)
    if fitted:
        for share in (0.99, 1.01):
            assert float((c - share * hessian @ v).norm() / c.norm()) > left


def test_fitted_it_finds_the_scale_that_an_optimiser_does_not_know():
    """A follower of one curvature in all directions: every direction is right, and only the scale is not."""

    def follow(x, y):
        return 1.5 * (y - x).square().sum()

    state_of = LastStep(ADAM, steps=50).init(game_of(follow))
    assert math.isnan(LastStep(ADAM).report(state_of).residual)
    plain, _, told = hypergradient(LastStep(partial(torch.optim.SGD, lr=0.01), steps=500), game_of(follow))
    fitted, _, report = hypergradient(
        LastStep(partial(torch.optim.SGD, lr=0.01), steps=500, fitted=True), game_of(follow)
    )
    exact = torch.full((5,), -2.0, dtype=D)  # y* = x = 0
    assert off(fitted, exact) <= 1e-5 and report.residual <= 1e-7
    assert off(plain, exact) == pytest.approx(0.97, abs=1e-4) and told.residual == pytest.approx(0.97, abs=1e-4)


@pytest.mark.slow
def test_it_holds_what_laws_ask_of_a_response():
    """Curvatures of the laws' games lie from .17 to 1.1: a step of size 1 leaves at most .83 of an error."""
    report = check_response(LastStep(partial(torch.optim.SGD, lr=1.0), steps=200, bias=0.83), examples=5)
    rows = {row.law: row.verdict for row in report.rows}
    held = {"exact", "exact, nested variables", "exact, float32", "stated bias", "nothing silent", "work"}
    held |= {"nothing mutated", "resume", "warm start", "vmap = loop", "chunks", "order of players"}
    assert {law for law in held if rows[law] != "holds"} == set(), str(report)


@pytest.mark.slow
def test_a_bias_stated_too_small_is_caught():
    laws = [law for law in LAWS if law.name == "stated bias"]
    stated = LastStep(partial(torch.optim.SGD, lr=1.0), steps=100, bias=0.5)
    report = check_response(stated, laws=laws, examples=20, raises=False)
    assert report.rows[0].verdict == "fails" and "it states a bias of 0.5;" in report.rows[0].note


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


def test_no_second_derivative_is_taken_and_two_gradients_are(monkeypatch):
    evaluated, asked = [], []
    plain = torch.autograd.grad

    def watched(*args, **kwargs):
        asked.append(kwargs.get("create_graph", False))
        return plain(*args, **kwargs)

    def follow(x, y):
        evaluated.append(1)
        return 0.5 * Once.apply(y - x).sum() + 0.5 * y.square().sum()

    game, response = game_of(follow), LastStep(partial(torch.optim.Adam, lr=0.01, eps=1e-2), steps=7)
    x, state = game.initial("x").requires_grad_(), response.init(game)
    before, evaluated[:] = response.report(state).gradients, []
    monkeypatch.setattr(torch.autograd, "grad", watched)
    y, state = response(game, {"x": x}, state)
    (slope,) = plain(y.sum(), x)
    state = response.after_backward(state, y)
    assert asked and not any(asked)
    assert len(evaluated) == 7 + 2 == response.report(state).gradients - before
    assert response.report(state).products == 0
    assert bool((slope != 0.0).all())


def test_under_vmap_each_task_sees_its_own_batch():
    def follow(x, y, batch):
        return quartic(x, y) + 0.5 * (y - batch).square().sum()

    batches = torch.linspace(-1.0, 1.0, 15, dtype=D).view(3, 5)
    game = bl.Game(x=bl.Player(lead, torch.zeros(5, dtype=D)), y=bl.Player(follow, START, [batches[0]]))
    response = LastStep(partial(torch.optim.Adam, lr=0.1), steps=4)
    state = response.init(game)

    def value(x, batch):
        return lead(response(game, {"x": x}, state, batch)[0])

    zero = torch.zeros(5, dtype=D)
    together = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(zero, batches)
    for row, batch in zip(together, batches, strict=True):
        x = zero.clone().requires_grad_()
        torch.testing.assert_close(row, torch.autograd.grad(value(x, batch), x)[0], atol=1e-12, rtol=1e-12)


def test_minibatches_dropout_and_buffers_are_those_of_the_last_step():
    """So that it is still the derivative of that very step: unrolled, the same draws give the same."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 4, dtype=D), torch.randn(64, 1, dtype=D)
    batches = [(inputs[i : i + 16], targets[i : i + 16]) for i in range(0, 64, 16)]

    def train(decay, weights, batch):
        features, goals = batch
        fitted = nn.functional.dropout(weights(features), 0.5)
        return (fitted - goals).square().mean() + decay.exp() * sum(w.square().sum() for w in weights.values())

    def valid(weights):
        return (weights(inputs) - targets).square().mean()

    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)).double()
    game = bl.Game(decay=bl.Player(valid, torch.tensor(-1.0, dtype=D)), weights=bl.Player(train, model, batches))
    found = []
    short = partial(torch.optim.SGD, lr=0.05)  # batches of 16 have curvatures of up to some 20
    for response in (LastStep(short, steps=3), bl.Unrolled(short, steps=3, backprop_steps=1)):
        torch.manual_seed(1)
        decay = torch.tensor(-1.0, dtype=D, requires_grad=True)
        state = response.init(game)
        for _ in range(2):
            weights, state = response(game, {"decay": decay}, state)
        found.append(torch.autograd.grad(game.loss("decay", {"decay": decay, "weights": weights}), decay)[0])
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:The run ended while")
def test_a_leader_is_solved_for_and_resumed_bit_for_bit(tmp_path):
    slow = partial(torch.optim.SGD, lr=0.02)
    solve = partial(bl.solve, game_of(), y=LastStep(ADAM, steps=5), optimizer=slow)
    whole = solve(steps=30)
    solve(steps=12, checkpoint=tmp_path / "run.pt")
    resumed = solve(steps=30, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["x"], resumed.variables["x"])
    assert whole.products == 0


@pytest.mark.slow
def test_fitted_a_leader_gains_most_of_what_there_is_to_gain():
    """One scale for all curvatures is right in none exactly; no sign is wrong."""
    adam, small = partial(torch.optim.Adam, lr=0.05), partial(torch.optim.SGD, lr=0.05)

    def value(x):
        with torch.no_grad():
            return float(lead(settled(game, {"x": x}, settled.init(game))[0]))

    game, settled = game_of(), bl.Implicit(small, steps=2000, tolerance=1e-8)
    found = bl.solve(game, y=LastStep(small, steps=20, fitted=True), optimizer=adam, steps=60)
    exact = bl.solve(game, y=settled, optimizer=adam, steps=60)
    began, ended, best = value(game.initial("x")), value(found.variables["x"]), value(exact.variables["x"])
    assert began - ended >= 0.9 * (began - best) > 0.0


def test_its_state_is_plain():
    _, state, report = hypergradient(LastStep(ADAM, steps=2), game_of())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["residual"] == report.residual


# What it says --------------------------------------------------------------------------------------------------------


def test_a_step_too_long_for_the_curvature_is_told_and_the_advice_works():
    game = game_of(lambda x, y: 2.0 * (y - x).square().sum())
    with pytest.warns(UnreliableResponseWarning, match="leaves 3 of the equation"):
        hypergradient(LastStep(partial(torch.optim.SGD, lr=1.0)), game)
    _, _, report = hypergradient(LastStep(partial(torch.optim.SGD, lr=1.0), fitted=True), game)
    assert report.residual <= 1e-7
    hypergradient(LastStep(partial(torch.optim.SGD, lr=0.1)), game)


@pytest.mark.parametrize(("distance", "told"), [(1e-15, "is too small for player 'y'"), (50.0, "is too large for")])
def test_a_distance_that_spoils_the_difference_is_told_and_the_advice_works(distance, told):
    def follow(x, y):
        return quartic(x, y) + y.exp().sum()

    with pytest.warns(UnreliableResponseWarning, match=told):
        hypergradient(LastStep(partial(torch.optim.SGD, lr=0.01), distance=distance), game_of(follow))
    hypergradient(LastStep(partial(torch.optim.SGD, lr=0.01)), game_of(follow))


def test_a_second_derivative_is_refused_in_words():
    game, response = game_of(), LastStep(SGD)
    state = response.init(game)

    def value(x):
        return lead(response(game, {"x": x}, state)[0])

    x = game.initial("x").requires_grad_()
    (slope,) = torch.autograd.grad(value(x), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="Use Implicit or Unrolled"):
        torch.autograd.grad(slope.sum(), x)
    with pytest.raises(SecondDerivativeError, match="Use Implicit or Unrolled"):
        torch.func.hessian(value)(game.initial("x"))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="LastStep: steps=0"):
        LastStep(SGD, steps=0)
    with pytest.raises(ValueError, match="distance=0"):
        LastStep(SGD, distance=0.0)
    with pytest.raises(ValueError, match="Leave one of them out"):
        LastStep(SGD, fitted=True, bias=0.5)
    with pytest.raises(ValueError, match="bias=-1"):
        LastStep(SGD, bias=-1.0)
    with pytest.raises(ValueError, match="accumulate=2"):
        LastStep(TorchOptimizer(SGD, accumulate=2))
    with pytest.raises(TypeError, match="LastStep cannot differentiate through LBFGS"):
        LastStep(torch.optim.LBFGS).init(game_of())
    with pytest.raises(TypeError, match="LastStep cannot tune 'x', a hyperparameter"):
        LastStep(lambda params, x: torch.optim.SGD(params, lr=x.exp())).init(game_of())
    boxed = bl.Player(quartic, torch.zeros(5, dtype=D), domain=bl.Box(0.0, 1.0))
    with pytest.raises(TypeError, match="player 'y' is constrained.*Use Implicit"):
        LastStep(SGD).init(bl.Game(x=bl.Player(lead, torch.zeros(5, dtype=D)), y=boxed))
    own = bl.Player(quartic, START, residual=lambda y, gradient: gradient)
    with pytest.raises(TypeError, match="LastStep minimises one loss.*Use Implicit with bilevel.ScipyRoot"):
        LastStep(SGD).init(bl.Game(x=bl.Player(lead, torch.zeros(5, dtype=D)), y=own))


def test_no_slope_takes_no_gradient():
    game, response = game_of(), LastStep(SGD)
    x, state = game.initial("x").requires_grad_(), response.init(game)
    y, _ = response(game, {"x": x}, state)
    (slope,) = torch.autograd.grad((0.0 * y).sum(), x)
    assert torch.equal(slope, torch.zeros_like(slope))
