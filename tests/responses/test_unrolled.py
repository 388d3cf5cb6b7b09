"""Unmodified torch.optim optimisers, their own trajectory, and its exact derivative."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import optim

import bilevel as bl

D = torch.float64
H = torch.tensor([[1.5, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.7]], dtype=D)
START = torch.tensor([0.5, -1.2, 0.8], dtype=D)
LEADER = torch.tensor([0.7, -0.4, 1.1], dtype=D)
STEPS = 25


def follower_loss(x, y):
    return 0.5 * y["a"] @ H[:2, :2] @ y["a"] + (y["b"] - 1).square().sum() * x[2].exp() + (y["a"] * x[:2]).sin().sum()


def leader_loss(y):
    return y["a"].square().sum() + (3 * y["b"]).sin().sum()


def init():
    return {"a": START[:2].clone(), "b": START[2:].clone()}


GAME = bl.Game(x=bl.Player(leader_loss, LEADER), y=bl.Player(follower_loss, init()))

OPTIMISERS = {
    "SGD": partial(optim.SGD, lr=0.05),
    "SGD momentum": partial(optim.SGD, lr=0.05, momentum=0.9),
    "SGD nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "SGD dampening": partial(optim.SGD, lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.1),
    "SGD decay": partial(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD maximize": partial(optim.SGD, lr=0.01, momentum=0.5, dampening=0.2, maximize=True),
    "Adam": partial(optim.Adam, lr=0.05),
    "Adam amsgrad": partial(optim.Adam, lr=0.05, amsgrad=True, weight_decay=0.1),
    "Adam maximize": partial(optim.Adam, lr=0.02, maximize=True),
    "AdamW": partial(optim.AdamW, lr=0.05, weight_decay=0.1),
    "RMSprop": partial(optim.RMSprop, lr=0.02),
    "RMSprop all": partial(optim.RMSprop, lr=0.02, centered=True, momentum=0.5, weight_decay=0.1),
    "Adagrad": partial(optim.Adagrad, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
    "NAdam": partial(optim.NAdam, lr=0.05),
    "RAdam": partial(optim.RAdam, lr=0.05),
    "Adamax": partial(optim.Adamax, lr=0.05),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "ASGD": partial(optim.ASGD, lr=0.05, t0=5),
    "groups": lambda p: optim.SGD(
        [{"params": p[1:], "lr": 0.02}, {"params": p[:1], "weight_decay": 0.2}], lr=0.05, momentum=0.9
    ),
}


def plain(factory, x, steps=STEPS):
    """The same steps by torch alone."""
    y = {name: value.requires_grad_() for name, value in init().items()}
    optimizer = factory(list(y.values()))
    for _ in range(steps):
        optimizer.zero_grad()
        follower_loss(x, y).backward()
        optimizer.step()
    return {name: value.detach() for name, value in y.items()}


def unrolled(factory, x, **options):
    response = bl.Unrolled(factory, **{"steps": STEPS, **options})
    return response(GAME, {"x": x}, response.init(GAME))


@pytest.mark.parametrize("factory", OPTIMISERS.values(), ids=OPTIMISERS)
def test_trajectory_and_hypergradient_are_those_of_plain_torch(factory):
    x = LEADER.clone().requires_grad_()
    y, _ = unrolled(factory, x)
    torch_y = plain(factory, LEADER)
    assert max((y[k] - torch_y[k]).abs().max().item() for k in y) <= 1e-12
    (slope,) = torch.autograd.grad(leader_loss(y), x)
    # Fourth-order differences: truncation h^4 ~ 1e-12, rounding eps / h ~ 2e-13, both times derivatives of order 1-1e3.
    h, differences = 1e-3, []
    for unit in torch.eye(3, dtype=D):
        f = {k: leader_loss(plain(factory, LEADER + k * h * unit)).item() for k in (-2, -1, 1, 2)}
        differences.append((f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / (12 * h))
    differences = torch.tensor(differences, dtype=D)
    assert ((slope - differences).norm() / differences.norm()).item() <= 1e-6


def test_a_captured_learning_rate_receives_its_gradient():
    lr = torch.tensor(0.05, dtype=D, requires_grad=True)
    y, _ = unrolled(partial(optim.SGD, lr=lr, momentum=0.9), LEADER)
    (slope,) = torch.autograd.grad(leader_loss(y), lr)
    h = 1e-5
    up, down = (leader_loss(plain(partial(optim.SGD, lr=0.05 + s, momentum=0.9), LEADER)) for s in (h, -h))
    assert slope.item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-6)


def lr_game():
    return bl.Game(
        lr=bl.Player(lambda y: y.square().sum(), torch.tensor(-4.0, dtype=D), optimizer_hyper=True),
        y=bl.Player(lambda y: 0.5 * y @ H @ y, START),
    )


def test_a_learning_rate_is_tuned_as_a_player():
    response = bl.Unrolled(lambda params, lr: optim.SGD(params, lr=lr.exp()), steps=5, warm_start=False)
    solution = bl.solve(lr_game(), y=response, optimizer=partial(optim.Adam, lr=0.1), steps=40)
    assert solution.values["lr"] < 0.1 * solution.history[0]["lr"]


@pytest.mark.parametrize("kind", [bl.Implicit, bl.Hypernetwork])
def test_only_unrolled_tunes_the_inner_optimiser(kind):
    with pytest.raises(TypeError, match=r"cannot tune 'lr'.*only Unrolled differentiates"):
        kind(partial(optim.SGD, lr=0.1)).init(lr_game())
    lr = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(TypeError, match=r"whose lr is a tensor that requires grad.*only Unrolled"):
        kind(partial(optim.SGD, lr=lr)).init(GAME)


class Homemade(optim.SGD):
    def step(self, closure=None):
        super().step(closure)


@pytest.mark.parametrize(
    "factory", [optim.LBFGS, optim.Adafactor, partial(optim.Rprop, lr=0.1), Homemade, optim.SparseAdam]
)
def test_what_cannot_be_unrolled_says_what_can(factory):
    with pytest.raises(TypeError, match=r"cannot differentiate through .*Use one of SGD, Adam, AdamW"):
        bl.Unrolled(factory).init(GAME)


def test_truncation_differentiates_the_last_steps_alone():
    factory = OPTIMISERS["SGD"]  # without memory, so that the last steps can be run by themselves
    x = LEADER.clone().requires_grad_()
    y, _ = unrolled(factory, x, steps=12, backprop_steps=4)
    _, after = unrolled(factory, LEADER, steps=8)
    last = bl.Unrolled(factory, steps=4)
    z, _ = last(GAME, {"x": x}, after)
    (cut,), (short,) = (torch.autograd.grad(leader_loss(v), x) for v in (y, z))
    assert (cut - short).norm() <= 1e-14 * short.norm()


@pytest.mark.parametrize("factory", [OPTIMISERS["Adam"], OPTIMISERS["SGD dampening"]])
def test_state_in_state_out(factory):
    response = bl.Unrolled(factory, steps=5)
    state = response.init(GAME)
    kept = copy.deepcopy(state)
    _, one = response(GAME, {"x": LEADER}, state)
    assert str(state) == str(kept)
    buffer = io.BytesIO()
    torch.save(one, buffer)
    buffer.seek(0)
    y, two = response(GAME, {"x": LEADER}, torch.load(buffer, weights_only=True))
    torch_y = plain(factory, LEADER, steps=10)
    assert max((y[k] - torch_y[k]).abs().max().item() for k in y) <= 1e-12
    assert two["gradients"] == 10


def test_the_error_falls_at_the_rate_of_the_spectrum():
    # Ridge regression: y* = (X'X + e^x I)^-1 X't, and the error of dy_K/dx is K (1 - lr mu)^K to leading order.
    inputs = torch.randn(10, 4, dtype=D)
    target = inputs @ torch.ones(4, dtype=D)
    gram = inputs.T @ inputs / 10

    def ridge(x, y):
        return 0.5 * ((inputs @ y - target) ** 2).mean() + 0.5 * x.exp() * y @ y

    game = bl.Game(
        x=bl.Player(lambda y: ((y - 0.5) ** 2).sum(), scalar := torch.tensor(-1.0, dtype=D)),
        y=bl.Player(ridge, torch.zeros(4, dtype=D)),
    )
    system = gram + scalar.exp() * torch.eye(4, dtype=D)
    best = torch.linalg.solve(system, inputs.T @ target / 10)
    exact = -(2 * (best - 0.5)) @ torch.linalg.solve(system, scalar.exp() * best)
    eigenvalues = torch.linalg.eigvalsh(system)
    lr = 1 / eigenvalues.max().item()
    rho = 1 - lr * eigenvalues.min().item()
    errors = []
    counts = [30, 45, 60]
    for steps in counts:
        x = scalar.clone().requires_grad_()
        response = bl.Unrolled(partial(optim.SGD, lr=lr), steps=steps)
        y, _ = response(game, {"x": x}, response.init(game))
        (slope,) = torch.autograd.grad(((y - 0.5) ** 2).sum(), x)
        errors.append(abs((slope - exact).item()))
    for (k, e), (l, f) in zip(zip(counts, errors), list(zip(counts, errors))[1:]):
        # The slowest mode's error is (c k + d) rho^k: for large k two of them are as (l/k) rho^(l-k), to a factor of 2.
        assert 0.5 * (l / k) * rho ** (l - k) <= f / e <= 2 * (l / k) * rho ** (l - k)


def test_leaving_the_domain_of_the_loss_raises():
    known = bl.testing.LogBarrier(coupling=((1.0,),), at=(0.0,), target=(0.0,))
    game, response = known.game(), bl.Unrolled(partial(optim.SGD, lr=40.0), steps=2)
    with pytest.raises(bl.errors.NonFiniteError, match="left its domain"):
        response(game, {"x": known.x0}, response.init(game))


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.Adam, lr=0.1, amsgrad=True),
        partial(torch.optim.AdamW, lr=0.1),
        partial(torch.optim.RMSprop, lr=0.1),
        partial(torch.optim.RMSprop, lr=0.1, centered=True),
        partial(torch.optim.Adagrad, lr=0.1),
        partial(torch.optim.NAdam, lr=0.1),
        partial(torch.optim.RAdam, lr=0.1),
        partial(torch.optim.Adamax, lr=0.1),
        partial(torch.optim.Adadelta, lr=1.0),
    ],
    ids=lambda o: f"{o.func.__name__}{''.join(k for k in o.keywords if k != 'lr')}",
)
def test_an_entry_without_any_gradient_leaves_the_hypergradient_whole(optimizer):
    """Behind a dead ReLU a weight's gradient is exactly 0, where Adam's square root has no derivative in torch."""
    start = torch.tensor([0.3, -0.2, 0.5, -1.0], dtype=D)

    def follow(x, y):
        dead = (y[2] * torch.relu(y[3]) - x).square()
        return (y[:2] - x * y[:2].roll(1) - x).square().sum() + dead

    game = bl.Game(x=bl.Player(lambda y: y.square().sum(), torch.tensor(0.7, dtype=D)), y=bl.Player(follow, start))
    response = bl.Unrolled(optimizer, steps=8)

    def value(x):
        y, _ = response(game, {"x": x}, response.init(game))
        return game.loss("x", {"x": x, "y": y})

    x = torch.tensor(0.7, dtype=D, requires_grad=True)
    (found,) = torch.autograd.grad(value(x), x)
    step = 1e-5
    with torch.no_grad():
        wanted = (value(x + step) - value(x - step)) / (2.0 * step)
    # Central differences of a smooth function of size one: step ** 2 and 1e-16 / step.
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-8)
