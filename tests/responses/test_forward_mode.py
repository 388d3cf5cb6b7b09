"""Forward mode gives reverse mode's hypergradient, for every optimiser, and refuses what it cannot do."""

from functools import partial

import pytest
import torch
from torch import optim
from torch.nn.functional import softplus

import bilevel as bl
from bilevel.tree import flatten

from .test_segments import assert_close, hypergradient, network, network_game, wide_game
from .test_unrolled import GAME, LEADER, OPTIMISERS, D, H, leader_loss, lr_game, unrolled


@pytest.mark.parametrize("factory", OPTIMISERS.values(), ids=OPTIMISERS)
def test_every_optimiser_gives_what_reverse_mode_gives(factory):
    x = LEADER.clone().requires_grad_()
    response, forward = (bl.Unrolled(factory, steps=9, differentiation=d) for d in (bl.ReverseMode(), bl.ForwardMode()))
    one, other = response.init(GAME), forward.init(GAME)
    for _ in range(2):  # the second is a warm start with the optimiser's memory
        y, one = response(GAME, {"x": x}, one)
        z, other = forward(GAME, {"x": x}, other)
        assert all(torch.equal(y[k], z[k]) for k in y)
        assert str(one["optimizer"]) == str(other["optimizer"])
        wanted, found = (torch.autograd.grad(leader_loss(v), x)[0] for v in (y, z))
        # The same sums in another order; nine steps of a problem with condition numbers of about ten.
        assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-12


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.ASGD])
@pytest.mark.parametrize("warm", [False, True])
def test_a_learning_rate_that_is_a_player(kind, warm):
    game, slopes = lr_game(), []
    for how in (bl.ReverseMode(), bl.ForwardMode()):
        response = bl.Unrolled(lambda params, lr: kind(params, lr=lr.exp()), steps=7, differentiation=how)
        rate, state = torch.tensor(-3.0, dtype=D, requires_grad=True), response.init(game)
        for _ in range(1 + warm):
            y, state = response(game, {"lr": rate}, state)
        slopes.append(torch.autograd.grad(y.square().sum(), rate)[0].item())
    # torch keeps ASGD's rate in float32: seven steps of rounding, 1.2e-7 each.
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-6 if kind is optim.ASGD else 1e-12)


def test_dropout_batch_norm_minibatches_and_truncation():
    model = network()
    game = network_game(model, [(torch.randn(6, 5, dtype=D), torch.randn(6, 1, dtype=D)) for _ in range(5)])
    x = torch.full((3,), -3.0, dtype=D)
    found = []
    for how in (bl.ReverseMode(), bl.ForwardMode()):
        response = bl.Unrolled(partial(optim.Adam, lr=0.02), steps=9, backprop_steps=7, differentiation=how)
        state = response.init(game)
        torch.manual_seed(3)
        for _ in range(2):
            slope, y, state = hypergradient(game, response, x, state)
        found.append((slope, flatten(y).detach(), state, torch.rand(1)))
    (slope, y, state, drawn), (other, z, after, drawn_too) = found
    assert torch.equal(y, z) and torch.equal(drawn, drawn_too) and state["data"] == after["data"]
    assert_close(other, slope, rtol=1e-11)
    assert all(torch.equal(state["buffers"][k], after["buffers"][k]) for k in state["buffers"])


def test_a_gradient_that_is_no_gradient_of_its_loss_is_noticed():
    # A surrogate gradient, as a function of one's own may give it: no loss has it, and its Jacobian is not symmetric.
    class Weighed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * (1.0 + 0.1 * ctx.saved_tensors[0].roll(1))

    def follow(x, y):
        z = Weighed.apply(y)
        return 0.5 * z @ H @ z + (z * softplus(x).roll(1)).sum()

    game = bl.Game(x=bl.Player(lambda y: y.sin().sum(), LEADER), y=bl.Player(follow, LEADER + 1))
    slopes, states = [], []
    for how in (bl.ReverseMode(), bl.ForwardMode()):
        response = bl.Unrolled(partial(optim.SGD, lr=0.05, momentum=0.5), steps=8, differentiation=how)
        with pytest.warns(bl.errors.UnreliableResponseWarning, match="autograd function Weighed"):
            slope, _, state = hypergradient(game, response, LEADER)
        slopes.append(slope)
        states.append(state)
    assert_close(slopes[1], slopes[0], rtol=1e-12)
    # One more product a step for the transposed graph, and seven for the check that failed at once, four of which
    # ask whether it is rounding; else 24 + 10.
    assert states[1]["products"] == 24 + 8 + 7


def test_joint_followers():
    game = bl.Game(
        x=bl.Player(lambda a, b: (a + b).square().sum(), LEADER),
        a=bl.Player(lambda x, a, b: (a - x).square().sum() + (a * b).sum(), LEADER),
        b=bl.Player(lambda x, a, b: (b + x).square().sum() - 0.5 * (a * b).sum(), LEADER),
    ).joined(y=("a", "b"))
    slopes = []
    for how in (bl.ReverseMode(), bl.ForwardMode()):
        response = bl.Unrolled(partial(optim.Adam, lr=0.1), steps=9, differentiation=how)
        slopes.append(hypergradient(game, response, LEADER)[0])
    assert_close(slopes[1], slopes[0], rtol=1e-12)


def test_an_entry_without_any_gradient():
    def follow(x, y):
        dead = (y[2] * torch.relu(y[3]) - x).square().sum()
        return (y[:2] - x * y[:2].roll(1)).square().sum() + dead

    start = torch.tensor([0.3, -0.2, 0.5, -1.0], dtype=D)
    x = torch.tensor([0.7], dtype=D)
    game = bl.Game(x=bl.Player(lambda y: y.square().sum(), x), y=bl.Player(follow, start))
    slopes = []
    for how in (bl.ReverseMode(), bl.ForwardMode(), bl.Segments(count=3)):
        response = bl.Unrolled(partial(optim.Adam, lr=0.1), steps=8, differentiation=how)
        slopes.append(hypergradient(game, response, x)[0])
    assert slopes[0].isfinite().all()
    for slope in slopes[1:]:
        assert_close(slope, slopes[0], rtol=1e-12)


def test_solve_goes_the_same_way():
    found = []
    for how in (bl.ReverseMode(), bl.ForwardMode()):
        response = bl.Unrolled(OPTIMISERS["Adam"], steps=5, differentiation=how)
        solution = bl.solve(GAME, y=response, optimizer=partial(optim.SGD, lr=0.1), steps=3)
        found.append(solution.variables["x"])
    assert_close(found[1], found[0], rtol=1e-10)


def test_work_and_memory_do_not_grow_with_what_is_not_needed():
    x = LEADER.clone().requires_grad_()
    _, state = unrolled(OPTIMISERS["Adam"], x, differentiation=bl.ForwardMode())
    # Three entries, 25 steps; two checks of five products. One gradient to try the first step.
    assert state["gradients"] == 26 and state["products"] == 3 * 25 + 5 + 5
    _, state = unrolled(OPTIMISERS["Adam"], LEADER, differentiation=bl.ForwardMode())
    assert state["products"] == 0


def test_memory_does_not_grow_with_the_steps():
    from bilevel.comparison.memory import peak_bytes

    game, x, cpu = wide_game(), torch.full((3,), -3.0, dtype=D), torch.device("cpu")

    def used(steps):
        how = bl.ForwardMode()
        response = bl.Unrolled(partial(optim.SGD, lr=0.01, momentum=0.9), steps=steps, differentiation=how)
        state = response.init(game)
        return peak_bytes(lambda: hypergradient(game, response, x, state), cpu)

    assert used(60) == used(20)


def test_what_it_cannot_do_is_refused():
    how = bl.ForwardMode(most=2)
    with pytest.raises(bl.BilevelError, match=r"3 entries of the leaders require grad, and most=2.*Segments\(\)"):
        unrolled(OPTIMISERS["Adam"], LEADER.clone().requires_grad_(), differentiation=how)
    rate = torch.tensor(0.05, dtype=D, requires_grad=True)
    with pytest.raises(bl.errors.CapturedTensorError, match="nobody's variable"):
        unrolled(partial(optim.SGD, lr=rate), LEADER, differentiation=bl.ForwardMode())
    x = LEADER.clone().requires_grad_()
    y, _ = unrolled(OPTIMISERS["Adam"], x, differentiation=bl.ForwardMode())
    (slope,) = torch.autograd.grad(leader_loss(y), x, create_graph=True)
    with pytest.raises(bl.BilevelError, match="first derivatives alone"):
        torch.autograd.grad(slope.sum(), x)
    with pytest.raises(ValueError, match="most=0; expected at least 1"):
        bl.ForwardMode(most=0)


def test_transforms_give_what_reverse_mode_gives():
    def value(x, differentiation):
        y, _ = unrolled(OPTIMISERS["Adam"], x, steps=9, differentiation=differentiation)
        return leader_loss(y)

    points = torch.stack([LEADER, LEADER + 0.1])
    found, wanted = (
        torch.func.vmap(torch.func.grad(partial(value, differentiation=how)))(points)
        for how in (bl.ForwardMode(), bl.ReverseMode())
    )
    assert_close(found, wanted, rtol=1e-12)


def test_rounding_near_a_loss_of_zero_is_no_asymmetry():
    # What is left of a cross entropy's Hessian is the rounding of probabilities next to 0 and 1.
    torch.manual_seed(2)
    inputs, labels = torch.eye(4).repeat(8, 1) * 3, torch.arange(4).repeat(8)

    def follow(x, y):
        each = torch.nn.functional.cross_entropy(torch.tanh(inputs @ y["in"]) @ y["out"], labels, reduction="none")
        return (x.exp()[labels] * each).mean()

    start = {"in": torch.randn(4, 16), "out": torch.randn(16, 4)}
    game = bl.Game(x=bl.Player(lambda y: y["out"].square().mean(), torch.zeros(4)), y=bl.Player(follow, start))
    slopes = []
    for how in (bl.ReverseMode(), bl.ForwardMode()):
        response = bl.Unrolled(partial(optim.SGD, lr=3.0, momentum=0.9), steps=300, differentiation=how)
        slopes.append(hypergradient(game, response, torch.zeros(4))[0])
    # Three hundred steps in float32, whose Hessians reach 10: 300 eps times that.
    torch.testing.assert_close(slopes[1], slopes[0], rtol=4e-4, atol=1e-6)


def test_a_softmax_that_is_saturated_from_the_start_is_no_asymmetry():
    # Its Hessian is the rounding of probabilities next to 0 and 1 in all steps; in the last one of the 264th it is more
    # than what the first step saw.
    def follow(x, y):
        return torch.nn.functional.cross_entropy((y * x)[None], torch.tensor([0]))

    for seed in (*range(10), *range(260, 270)):
        numbers = torch.Generator().manual_seed(seed)
        start = torch.randn(3, generator=numbers) * 10.0
        start[0] = start[0].abs() + 10.0
        x = 1.0 + 0.1 * torch.randn(3, generator=numbers)
        game = bl.Game(x=bl.Player(lambda x, y: y.square().sum() + x.square().sum(), x), y=bl.Player(follow, start))
        slopes = []
        for how in (bl.ReverseMode(), bl.ForwardMode()):
            response = bl.Unrolled(partial(optim.SGD, lr=5.0), steps=6, differentiation=how)
            slopes.append(hypergradient(game, response, x)[0])
        # Six steps of rate 5, each with eps of rounding in second derivatives of size |y| = 30; a slope of 2 |y|.
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=6 * 5 * 30 * 60 * 1.2e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_scheduled_rate_that_is_a_tensor(momentum):
    def factory(params):
        return optim.SGD(params, lr=torch.tensor(0.05, dtype=D), momentum=momentum)

    halved = bl.inner.TorchOptimizer(factory, scheduler=partial(optim.lr_scheduler.StepLR, step_size=2, gamma=0.5))
    game, slopes = wide_game(), []
    for how in (bl.ReverseMode(), bl.ForwardMode(), bl.Segments(count=2)):
        response = bl.Unrolled(halved, steps=7, differentiation=how)
        slopes.append(hypergradient(game, response, torch.full((3,), -3.0, dtype=D))[0])
    for slope in slopes[1:]:
        assert_close(slope, slopes[0], rtol=1e-12)
