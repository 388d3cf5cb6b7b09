"""Steps taken again in backward are the same steps: values, derivatives of any order, data, random numbers, memory."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.func import functional_call

import bilevel as bl
from bilevel.responses.unrolled.memory_plan import Sizes, lengths, offloading, peak, plan
from bilevel.tree import flatten, leaves

from .test_unrolled import GAME, LEADER, OPTIMISERS, D, leader_loss, lr_game, plain, unrolled

SEGMENTS = [bl.Segments(count=4), bl.Segments(count=1000), bl.Segments()]


def assert_close(found, wanted, rtol):
    """In the norm: a single entry can be what a sum's terms leave of each other, right to no digit of its own."""
    assert (found - wanted).norm().item() <= rtol * wanted.norm().item()


def hypergradient(game, response, x, state=None, batch=None, **others):
    x = x.clone().requires_grad_()
    y, after = response(game, {"x": x, **others}, response.init(game) if state is None else state, batch)
    (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y, **others}), x)
    return slope, y, after


@pytest.mark.parametrize("factory", OPTIMISERS.values(), ids=OPTIMISERS)
def test_every_optimiser_gives_what_storing_all_gives(factory):
    x = LEADER.clone().requires_grad_()
    y, after = unrolled(factory, x)
    (wanted,) = torch.autograd.grad(leader_loss(y), x)
    for segments in SEGMENTS:
        z, state = unrolled(factory, x, differentiation=segments)
        assert all(torch.equal(y[k], z[k]) for k in y)
        assert str(state["optimizer"]) == str(after["optimizer"])
        (found,) = torch.autograd.grad(leader_loss(z), x)
        # The same terms in another order of summation, some 25 steps of them.
        assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-13


def test_work_is_counted_with_the_steps_taken_again():
    x = LEADER.clone().requires_grad_()
    _, state = unrolled(OPTIMISERS["Adam"], x, differentiation=bl.Segments(count=5))
    # 25 steps, one of them tried first, all but the last segment again; segments shorten towards the end.
    assert 25 + 1 + 20 <= state["gradients"] < 25 + 1 + 25 and state["products"] == 25
    _, state = unrolled(OPTIMISERS["Adam"], x, differentiation=bl.Segments(count=1))
    assert state["gradients"] == state["products"] == 25
    with torch.no_grad():
        _, state = unrolled(OPTIMISERS["Adam"], x, differentiation=bl.Segments(count=5))
    assert state["gradients"] == 25 and state["products"] == 0


@pytest.mark.parametrize("factory", [OPTIMISERS["SGD momentum"], OPTIMISERS["Adam"]])
def test_second_derivatives(factory):
    def slopes(x, differentiation):
        y, _ = unrolled(factory, x, steps=9, differentiation=differentiation)
        return torch.autograd.grad(leader_loss(y), x, create_graph=True)[0]

    x = LEADER.clone().requires_grad_()
    wanted, found = (
        torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0] for s in slopes(x, how)])
        for how in (bl.ReverseMode(), bl.Segments(count=3))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_a_captured_learning_rate_receives_its_gradient():
    def slope(differentiation):
        log_rate = torch.tensor(0.05, dtype=D).log().requires_grad_()
        factory = partial(optim.SGD, lr=log_rate.exp(), momentum=0.9)
        y, _ = unrolled(factory, LEADER, differentiation=differentiation)
        return torch.autograd.grad(leader_loss(y), log_rate)[0].item()

    assert slope(bl.Segments(count=4)) == pytest.approx(slope(bl.ReverseMode()), rel=1e-13)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_a_learning_rate_that_is_a_player(kind):
    game, x = lr_game(), torch.tensor(-3.0, dtype=D)

    def slope(differentiation):
        response = bl.Unrolled(lambda params, lr: kind(params, lr=lr.exp()), steps=12, differentiation=differentiation)
        rate = x.clone().requires_grad_()
        y, _ = response(game, {"lr": rate}, response.init(game))
        return torch.autograd.grad(y.square().sum(), rate)[0].item()

    assert slope(bl.Segments(count=4)) == pytest.approx(slope(bl.ReverseMode()), rel=1e-13)


def test_a_tensor_that_enters_later_is_refused():
    late, calls = torch.tensor(0.5, dtype=D, requires_grad=True), []

    def follow(x, y):
        calls.append(0)
        loss = (y - x).square().sum()
        return loss + (late * y.sum() if len(calls) % 9 == 0 else 0.0)

    game = bl.Game(x=bl.Player(lambda y: y.square().sum(), LEADER), y=bl.Player(follow, LEADER))
    response = bl.Unrolled(partial(optim.SGD, lr=0.1), steps=12, differentiation=bl.Segments(count=3))
    with pytest.raises(bl.BilevelError, match=r"use a tensor of shape \(\) that requires grad|taken again in backward"):
        hypergradient(game, response, LEADER)


def network(dropout=0.3):
    torch.manual_seed(1)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)]
    return nn.Sequential(*layers).double()


class Noisy(torch.utils.data.Dataset):
    """Draws from torch's global random numbers, as augmentation does."""

    def __init__(self):
        self.inputs, self.outputs = torch.randn(24, 5, dtype=D), torch.randn(24, 1, dtype=D)

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.inputs[index] + 0.1 * torch.randn(5, dtype=D), self.outputs[index]


def network_game(model, data):
    def follow(x, y, batch):
        inputs, outputs = batch
        squares = (functional_call(model, y, (inputs,)) - outputs).square().mean()
        return squares + sum((x[i].exp() * w.square()).sum() for i, w in enumerate(leaves(y)[:3]))

    def lead(y):
        return flatten(y).square().sum()

    return bl.Game(x=bl.Player(lead, torch.full((3,), -3.0, dtype=D)), y=bl.Player(follow, model, data))


@pytest.mark.parametrize("workers", ["list", "loader"])
def test_dropout_batch_norm_and_minibatches_are_the_same_again(workers):
    model = network()
    data = [(torch.randn(6, 5, dtype=D), torch.randn(6, 1, dtype=D)) for _ in range(5)]
    if workers == "loader":
        data = torch.utils.data.DataLoader(Noisy(), batch_size=6, shuffle=True)
    game = network_game(model, data)
    x = torch.full((3,), -3.0, dtype=D)
    found = {}
    for name, how in (("all", bl.ReverseMode()), ("some", bl.Segments(count=4))):
        response = bl.Unrolled(partial(optim.Adam, lr=0.02), steps=13, backprop_steps=11, differentiation=how)
        state = response.init(game)
        torch.manual_seed(3)
        for _ in range(2):  # the second is a warm start, in the middle of the data
            slope, y, state = hypergradient(game, response, x, state)
        found[name] = slope, flatten(y).detach(), state, torch.rand(1)
    (slope, y, state, drawn), (other, z, after, drawn_too) = found["all"], found["some"]
    assert torch.equal(y, z) and torch.equal(drawn, drawn_too)
    assert_close(other, slope, rtol=1e-12)
    assert state["data"] == after["data"]
    assert all(torch.equal(state["buffers"][k], after["buffers"][k]) for k in state["buffers"])


def test_what_changes_before_backward_is_refused():
    model = network()
    game = network_game(model, [(torch.randn(6, 5, dtype=D), torch.randn(6, 1, dtype=D))])
    response = bl.Unrolled(partial(optim.SGD, lr=0.05), steps=12, differentiation=bl.Segments(count=3))
    x = torch.full((3,), -3.0, dtype=D, requires_grad=True)
    y, _ = response(game, {"x": x}, response.init(game))
    model.eval()
    with pytest.raises(bl.BilevelError, match=r"taken again in backward, end .* a module's train\(\) or eval\(\)"):
        torch.autograd.grad(flatten(y).square().sum(), x)


def test_automatic_casts_are_the_same_again():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    batch = torch.randn(6, 5), torch.randn(6, 1)

    def follow(x, y, batch):
        return (functional_call(model, y, (batch[0],)).float() - batch[1]).square().mean() + x * flatten(
            y
        ).square().sum()

    game = bl.Game(
        x=bl.Player(lambda y: flatten(y).square().sum(), torch.tensor(0.1)), y=bl.Player(follow, model, [batch])
    )
    slopes = []
    for how in (bl.ReverseMode(), bl.Segments(count=3)):
        response = bl.Unrolled(partial(optim.SGD, lr=0.1), steps=9, differentiation=how)
        x = torch.tensor(0.1, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = response(game, {"x": x}, response.init(game))
        slopes.append(torch.autograd.grad(flatten(y).square().sum(), x)[0])
    assert_close(slopes[1], slopes[0], rtol=1e-5)


def test_a_warning_is_issued_once_a_step():
    def follow(x, y):
        warnings.warn("It is odd.", UserWarning, stacklevel=1)
        return (y - x).square().sum()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        game = bl.Game(x=bl.Player(lambda y: y.square().sum(), LEADER), y=bl.Player(follow, LEADER))
        response = bl.Unrolled(partial(optim.SGD, lr=0.1), steps=12, differentiation=bl.Segments(count=3))
        state = response.init(game)
        caught.clear()
        hypergradient(game, response, LEADER, state)
    assert len(caught) == 12


def test_transforms_and_their_nesting():
    def value(x, differentiation):
        y, _ = unrolled(OPTIMISERS["Adam"], x, steps=9, differentiation=differentiation)
        return leader_loss(y)

    points = torch.stack([LEADER, LEADER + 0.1])
    for function in (torch.func.grad, torch.func.hessian, torch.func.jacrev):
        found, wanted = (
            torch.func.vmap(function(partial(value, differentiation=how)))(points)
            for how in (bl.Segments(count=3), bl.ReverseMode())
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    with pytest.raises(bl.BilevelError, match=r"inside a torch\.func transform every step is stored"):
        torch.func.grad(partial(value, differentiation=bl.Segments(memory=10_000)))(LEADER)


def test_a_nested_follower_takes_its_steps_again_too():
    game = bl.Game(
        x=bl.Player(lambda y, z: (y - 1).square().sum() + z.square().sum(), torch.tensor([0.3], dtype=D)),
        y=bl.Player(lambda x, y, z: (y - x).square().sum() + (y * z).sum(), torch.tensor([0.1], dtype=D)),
        z=bl.Player(lambda y, z: (z - y.sin()).square().sum(), torch.tensor([0.2], dtype=D)),
    )
    found = []
    for how in (bl.ReverseMode(), bl.Segments(count=3)):
        response = bl.Unrolled(partial(optim.SGD, lr=0.2, momentum=0.3), steps=7, differentiation=how)
        solution = bl.solve(game, y=response, z=response, optimizer=partial(optim.SGD, lr=0.1), steps=2)
        found.append(solution.variables["x"])
    assert_close(found[1], found[0], rtol=1e-12)


def test_joint_followers():
    game = bl.Game(
        x=bl.Player(lambda a, b: (a + b).square().sum(), LEADER),
        a=bl.Player(lambda x, a, b: (a - x).square().sum() + (a * b).sum(), LEADER),
        b=bl.Player(lambda x, a, b: (b + x).square().sum() - 0.5 * (a * b).sum(), LEADER),
    ).joined(y=("a", "b"))
    slopes = []
    for how in (bl.ReverseMode(), bl.Segments(count=3)):
        response = bl.Unrolled(partial(optim.SGD, lr=0.1), steps=9, differentiation=how)
        slopes.append(hypergradient(game, response, LEADER)[0])
    assert_close(slopes[1], slopes[0], rtol=1e-12)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("count", [1, 2, 5, 44, 100])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 3.0])
def test_segments_cover_the_steps(steps, count, ratio):
    found = lengths(steps, min(count, steps), ratio)
    assert sum(found) == steps and len(found) == min(count, steps) and min(found) >= 1
    assert all(a >= b - 1 for a, b in zip(found, found[1:]))  # shorter towards the end, up to rounding


def test_the_fewest_segments_that_fit_are_taken_and_the_least_that_any_need_is_told():
    sizes = Sizes(graph=40, state=8, batch=0)
    least = peak(plan(1000, sizes, None, None), sizes)
    every = [peak(lengths(1000, m, 0.2), sizes) for m in range(1, 301)]
    assert least <= 1.02 * min(every)
    for memory in (2 * least, 5 * least):
        chosen = plan(1000, sizes, None, memory)
        assert peak(chosen, sizes) <= memory < every[len(chosen) - 2]
    assert plan(1000, sizes, None, 10**6) == [1000]
    with pytest.raises(bl.BilevelError, match=rf"1000 steps need {least:,} bytes at the least.*ForwardMode\(\)"):
        plan(1000, sizes, None, least - 1)


def wide_game(width=60):
    model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 1)).double()
    batch = torch.randn(16, 20, dtype=D), torch.randn(16, 1, dtype=D)
    return network_game(model, [batch])


@pytest.mark.slow
def test_the_peak_is_what_was_planned_and_a_tenth_of_storing_all():
    from bilevel.comparison.memory import peak_bytes

    game, x, cpu = wide_game(), torch.full((3,), -3.0, dtype=D), torch.device("cpu")

    def used(differentiation, steps=300):
        response = bl.Unrolled(partial(optim.SGD, lr=0.01, momentum=0.9), steps=steps, differentiation=differentiation)
        state = response.init(game)
        return peak_bytes(lambda: hypergradient(game, response, x, state), cpu)

    everything, least = used(bl.ReverseMode()), used(bl.Segments())
    assert least <= 0.1 * everything
    for memory in (2 * least, 3 * least):
        assert 0.4 * memory <= used(bl.Segments(memory=memory)) <= memory
    with pytest.raises(bl.BilevelError, match="300 steps need"):
        used(bl.Segments(memory=least // 2))


def test_offloaded_tensors_come_back_the_same():
    # On a game on the CPU it changes nothing; here the hooks themselves are held to their promise.
    x, kept = LEADER.clone().requires_grad_(), []
    with offloading([x]):
        y = (x * LEADER.exp()).sin().square().sum()
    kept.append(torch.autograd.grad(y, x, create_graph=True)[0])
    y = (x * LEADER.exp()).sin().square().sum()
    kept.append(torch.autograd.grad(y, x, create_graph=True)[0])
    assert torch.equal(*kept)
    assert torch.equal(*(torch.autograd.grad(k.sum(), x)[0] for k in kept))
    slopes = [
        hypergradient(GAME, bl.Unrolled(OPTIMISERS["Adam"], steps=9, differentiation=how), LEADER)[0]
        for how in (bl.Segments(count=3, offload=True), bl.Segments(count=3), bl.ReverseMode(offload=True))
    ]
    assert torch.equal(slopes[0], slopes[1])
    assert_close(slopes[2], slopes[0], rtol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [bl.Segments(count=4, offload=True), bl.Segments(), bl.ReverseMode(offload=True)])
def test_offload_on_a_gpu(how):
    x = LEADER.cuda()
    game = bl.Game(
        x=bl.Player(lambda y: y.sin().sum(), x), y=bl.Player(lambda x, y: ((y - x) ** 4).sum() + (y * x).sum(), x + 1)
    )
    slopes = [
        hypergradient(game, bl.Unrolled(OPTIMISERS["Adam"], steps=30, differentiation=d), x)[0]
        for d in (bl.ReverseMode(), how)
    ]
    assert slopes[1].is_cuda
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: bl.Segments(count=0), "count=0; expected at least 1"),
        (lambda: bl.Segments(memory=0), "memory=0; expected a number of bytes"),
        (lambda: bl.Segments(count=2, memory=5), "expected one of them"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()
    with pytest.raises(TypeError, match="expected ReverseMode"):
        bl.Unrolled(OPTIMISERS["SGD"], differentiation="segments")


def test_state_in_state_out():
    response = bl.Unrolled(OPTIMISERS["Adam"], steps=8, differentiation=bl.Segments(count=3))
    state = response.init(GAME)
    kept = copy.deepcopy(state)
    _, one = response(GAME, {"x": LEADER.clone().requires_grad_()}, state)
    assert str(state) == str(kept)
    y, _ = response(GAME, {"x": LEADER}, one)
    torch_y = plain(OPTIMISERS["Adam"], LEADER, steps=16)
    assert max((y[k] - torch_y[k]).abs().max().item() for k in y) <= 1e-12
