"""Threads and processes in a loss, tensors without numbers, parameters of two players: right, or refused by name."""

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bilevel as bl
from bilevel.errors import BilevelError

D = torch.float64
SGD = partial(torch.optim.SGD, lr=0.1)
UNROLLED = bl.Unrolled(SGD, steps=5)
IMPLICIT = bl.Implicit(SGD, steps=100, tolerance=None)
INPUTS = torch.linspace(-1.0, 1.0, 12, dtype=D).reshape(4, 3)


def part(y, weight):
    return weight * (0.3 * (y * y.roll(1)).sin().sum() + 0.5 * (y - 1.0).square().sum())


def in_threads(y):
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(partial(part, y), (0.5, 0.5)))


def here(y):
    return part(y, 0.5) + part(y, 0.5)


def game_of(fit):
    def follow(x, y):
        return fit(y) + x.exp() * y.square().sum()

    lead = lambda y: (y - 0.3).square().sum()
    return bl.Game(
        x=bl.Player(lead, torch.tensor(-1.0, dtype=D)), y=bl.Player(follow, torch.tensor([0.2, 0.5], dtype=D))
    )


def value(response, game):
    state = response.init(game)

    def function(x):
        y, _ = response(game, {"x": x}, state)
        return game.loss("x", {"x": x, "y": y})

    return function


def hypergradient(game, response):
    x = game.initial("x").requires_grad_()
    return torch.autograd.grad(value(response, game)(x), x)[0]


@pytest.mark.parametrize("response", [UNROLLED, IMPLICIT], ids=["unrolled", "implicit"])
def test_threads_in_a_loss_are_right_by_autograd_and_refused_inside_transforms(response):
    torch.testing.assert_close(
        *(hypergradient(game_of(fit), response) for fit in (in_threads, here)), rtol=1e-9, atol=1e-12
    )
    # There the tensors of another thread would be constants: -.14 in place of -.22, in silence.
    with pytest.raises(BilevelError, match=r"Player 'y': its loss computes in threads of its own"):
        torch.func.grad(value(response, game_of(in_threads)))(torch.tensor(-1.0, dtype=D))
    with pytest.raises(BilevelError, match="threads of its own"):
        learned = bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2), scale=0.1, warmup=2, tolerance=None)
        hypergradient(game_of(in_threads), learned)
    # Not a thread: a graph that was there before, of a leaf that a loss captures.
    kept = torch.ones(2, dtype=D, requires_grad=True).sin()
    assert not game_of(lambda y: here(y) + kept.sum())._parts.runs["y"].threads


def test_threads_that_run_a_players_module_are_refused_and_leave_it_alone():
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    before = copy.deepcopy(net.state_dict())

    def follow(x, y):
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(y, INPUTS.chunk(2)))
        return sum(out.square().sum() for out in outputs) + x

    with pytest.raises(ValueError, match=r"module was called in another thread .* on the whole batch"):
        bl.Game(x=bl.Player(lambda x: x, torch.tensor(0.0, dtype=D)), y=bl.Player(follow, net))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_threads_with_what_needs_another_form_are_refused():
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).double().requires_grad_(False)

    def fit(y):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: nn.functional.layer_norm(y, (2,)).sin().sum() + norm(y).sum()).result()

    with pytest.raises(ValueError, match="Player 'y': its objective computes in threads of its own, and runs what"):
        game_of(fit)


def test_hooks_that_threads_set_are_refused():
    def hooked(y, weight):
        found = part(y, weight)
        if found.requires_grad:
            found.register_hook(lambda g: 2.0 * g)
        return found

    def fit(y):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(hooked, y, 1.0).result()

    before = torch.Tensor.register_hook
    with pytest.raises(ValueError, match="Player 'y': its objective computes in threads .* sets hooks"):
        game_of(fit)
    assert torch.Tensor.register_hook is before


FORKS = """
import multiprocessing, sys, torch
sys.path[:0] = sys.argv[1:]
import test_where_losses_run as own

def double(number):
    return 2.0 * number

def fit(y):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return own.here(y) * pool.apply(double, (0.5,))

response = own.bl.Unrolled(own.SGD, steps=1)
torch.testing.assert_close(*(own.hypergradient(own.game_of(f), response) for f in (fit, own.here)))

def sent(y):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return own.here(y) + pool.apply(double, (y.sin(),)).sum()

try:
    own.game_of(sent)
except ValueError as error:  # PyTorch sends no graph
    assert "Player 'y': its objective raised" in str(error), error
else:
    raise AssertionError("accepted")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="starts a process by fork")
def test_a_process_in_a_loss(tmp_path):
    # In a program of its own: to fork one that has threads, as pytest's workers do, may lock for ever.
    (tmp_path / "program.py").write_text(FORKS)
    here, root = Path(__file__).parent, Path(__file__).parents[1]
    command = [sys.executable, "-W", "ignore", str(tmp_path / "program.py"), str(here), str(root)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]


# Tensors without numbers ----------------------------------------------------------------------------------------------


def lead(x, y):
    return (x * y).sum()


def test_a_meta_tensor_is_named_where_it_comes():
    ones = torch.ones(2)
    meta = ones.to("meta")
    told = "on the meta device, which has a shape and no numbers"
    follow = lambda x, y: (y - x).square().sum()
    with pytest.raises(ValueError, match=rf"Player 'x': init is {told}.*device='cpu'"):
        bl.Game(x=bl.Player(lead, meta), y=bl.Player(follow, meta))
    with pytest.raises(ValueError, match=rf"Player 'y': init\['weight'\] is {told}"):
        bl.Game(y=bl.Player(lambda y: y(ones).sum(), nn.Linear(2, 1, device="meta")))
    with pytest.raises(ValueError, match=f"Player 'y': its loss is {told}"):
        bl.Game(x=bl.Player(lead, ones), y=bl.Player(lambda x, y: (y - x).to("meta").sum(), ones))
    with pytest.raises(ValueError, match="Player 'x': its loss is on the meta device"), torch.device("meta"):
        bl.Game(x=bl.Player(lambda x: x.sum() + torch.ones(()), ones))
    named = "Player 'y': a tensor in its loss is on the meta device, and has no numbers"
    with pytest.raises(BilevelError, match=named):
        bl.Game(x=bl.Player(lead, ones), y=bl.Player(lambda x, y: (y - x - meta).square().sum(), ones))
    norm = nn.BatchNorm1d(2, affine=False, device="meta")
    with pytest.raises(BilevelError, match=named):
        bl.Game(x=bl.Player(lead, ones), y=bl.Player(lambda x, y: norm(torch.stack([y, y - x])).sum(), ones))
    with pytest.raises(ValueError, match="is a fake tensor, which has a shape and no numbers"), FakeTensorMode():
        bl.Game(x=bl.Player(lead, torch.ones(2)), y=bl.Player(follow, torch.ones(2)))


def test_a_meta_tensor_that_comes_later_is_named():
    batch = lambda x, y, batch: (y - x - batch).square().sum()
    ones = torch.ones(2)
    game = bl.Game(x=bl.Player(lead, ones), y=bl.Player(batch, ones, data=[ones, ones.to("meta")]))
    with pytest.raises(BilevelError, match="Player 'y': a tensor in its loss is on the meta device"):
        hypergradient(game, UNROLLED)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    follow = lambda x, y: (y(ones) - x).square().sum()
    game = bl.Game(x=bl.Player(lambda x, y: x.sum() * y(ones).sum(), ones), y=bl.Player(follow, net))
    net[0].to("meta")  # the player's own: the game has a copy
    hypergradient(game, UNROLLED)
    net.to("meta")
    with pytest.raises(BilevelError, match="frozen parameters"):
        hypergradient(game, UNROLLED)


# Shared by two players ------------------------------------------------------------------------------------------------


def test_a_parameter_of_two_modules_is_refused_and_both_ways_out_are_right():
    torch.manual_seed(0)
    body, ones = nn.Linear(2, 2).double(), torch.ones(2, dtype=D)
    whole = nn.Sequential(body, nn.Linear(2, 1)).double()

    def game(second, call):
        follow = lambda x, y: (call(x, y) - 1.0).square().sum() + 0.1 * sum(p.square().sum() for p in y.values())
        return bl.Game(
            x=bl.Player(lambda x, y: call(x, y).square().sum() + x(ones).square().sum(), body),
            y=bl.Player(follow, second),
        )

    def slope(game):
        x = {name: leaf.requires_grad_() for name, leaf in game.initial("x").items()}
        y, _ = UNROLLED(game, {"x": x}, UNROLLED.init(game))
        return torch.autograd.grad(game.loss("x", {"x": x, "y": y}), list(x.values()))

    with pytest.raises(ValueError, match=r"Players 'x' and 'y': 'weight' of the one module and '0.weight' .* x\(...\)"):
        game(whole, lambda x, y: y(ones))
    # One's own: the other calls it. By hand, the head alone as a plain pytree.
    found = slope(game(whole[1], lambda x, y: y(x(ones))))
    head = {name: leaf.detach().clone() for name, leaf in whole[1].named_parameters()}
    wanted = slope(game(head, lambda x, y: nn.functional.linear(x(ones), y["weight"], y["bias"])))
    torch.testing.assert_close(found, wanted)
    # Two copies: nothing of the leader's own is the follower's.
    apart = game(copy.deepcopy(whole), lambda x, y: y(ones) + 0.0 * x(ones).sum())
    assert set(apart.initial("y")) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    # One module for two players, as in MAML, is two players who start alike; frozen in one of them it is shared safely.
    game(body, lambda x, y: y(x(ones)))
    frozen = nn.Sequential(copy.deepcopy(body).requires_grad_(False), nn.Linear(2, 1).double())
    game(frozen, lambda x, y: y(x(ones)))
