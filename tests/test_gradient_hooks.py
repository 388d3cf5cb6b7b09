"""Hooks on gradients inside losses: those that look change nothing, and those that bend a gradient are refused."""

import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.modules.module import register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint

import bilevel as bl
from bilevel.errors import BilevelError
from bilevel.responses import ForwardMode, LastStep, ReverseMode, Segments

D = torch.float64
SGD = partial(torch.optim.SGD, lr=0.1)
RESPONSES = {
    "unrolled": bl.Unrolled(SGD, steps=5),
    "offloaded": bl.Unrolled(SGD, steps=5, differentiation=ReverseMode(offload=True)),
    "forward": bl.Unrolled(SGD, steps=5, differentiation=ForwardMode()),
    "segments": bl.Unrolled(SGD, steps=5, differentiation=Segments()),
    "implicit": bl.Implicit(SGD, steps=20, tolerance=None, linear_solver=bl.linear.Dense()),
    "nudged": bl.Nudged(SGD, steps=20, tolerance=None),
    "last step": LastStep(SGD),
    "single loop": bl.SingleLoop(SGD),
}
INPUTS = torch.linspace(-1.0, 1.0, 12, dtype=D).reshape(4, 3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()


def made(module, between=lambda out: out):
    def follow(x, y):
        out = between(y(INPUTS))
        return (out - 1.0).square().mean() + x.exp() * sum(p.square().sum() for p in y.values())

    lead = lambda y: (y(INPUTS) - 0.5).square().mean()
    return bl.Game(x=bl.Player(lead, torch.tensor(-2.0, dtype=D)), y=bl.Player(follow, module))


def hypergradient(game, response):
    x, state = game.initial("x").requires_grad_(), response.init(game)
    y, _ = response(game, {"x": x}, state)
    return torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)[0]


def halved(module, inputs, outputs):
    return tuple(None if g is None else 0.5 * g for g in inputs)


def halved_before(module, outputs):
    return tuple(0.5 * g for g in outputs)


def written(module, inputs, outputs):
    inputs[0].data.mul_(0.5)


def looking(*given):
    """Returns nothing."""


def given_back(module, inputs, outputs):
    return inputs


BENDING = {
    "returns another": lambda net: net[1].register_full_backward_hook(halved),
    "before": lambda net: net[2].register_full_backward_pre_hook(halved_before),
    "writes": lambda net: net[1].register_full_backward_hook(written),
    "the older kind": lambda net: net[1].register_backward_hook(halved),
    "every module": lambda net: register_module_full_backward_hook(halved),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", BENDING)
def test_a_module_hook_that_bends_a_gradient_is_refused_by_name(kind, late):
    net = network()
    told = r"the hook (halved|halved_before|written) on (every module|'\d' in the module of 'y').*handle.remove\(\)"
    game = made(net) if late else None
    handle = BENDING[kind](net)
    try:
        with pytest.raises(BilevelError, match=told):
            hypergradient(game or made(net), RESPONSES["unrolled"])
    finally:
        handle.remove()
    found = hypergradient(made(net), RESPONSES["unrolled"])  # the way out
    torch.testing.assert_close(found, hypergradient(made(network()), RESPONSES["unrolled"]))


def test_a_hook_of_a_module_that_the_loss_captures():
    head = nn.Sequential(nn.Tanh()).requires_grad_(False)
    head[0].register_full_backward_hook(halved)
    with pytest.raises(BilevelError, match="Player 'y': the hook halved on a Tanh that the objective calls"):
        made(network(), head)


def on_a_tensor(hook):
    def between(out):
        out.register_hook(hook)
        return out

    return between


def sometimes():
    """Looks for a while, and then clips."""
    seen = []

    def clip(g):
        seen.append(g.norm())
        return g.clamp(-1e-3, 1e-3) if len(seen) > 8 else None

    return clip


@pytest.mark.parametrize("hook", [lambda g: 0.5 * g, lambda g: g.clamp(-1e3, 1e3), sometimes()])
def test_a_hook_on_a_tensor_that_bends_its_gradient_is_refused(hook):
    # A clip that does nothing yet may do something later; one that comes later is met when it comes.
    with pytest.raises(BilevelError, match=r"Player 'y': the hook .* on a tensor of shape \(4, 1\) returns another"):
        hypergradient(made(network(), on_a_tensor(hook)), RESPONSES["unrolled"])


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
def test_hooks_that_look_change_nothing_and_are_called(response):
    net, seen = network(), []
    net[1].register_full_backward_hook(lambda *given: seen.append(given))
    net[2].register_full_backward_pre_hook(looking)
    net[2].register_full_backward_hook(given_back)
    tables = [dict(part._backward_hooks) for part in net.modules()]
    found = hypergradient(made(net, on_a_tensor(lambda g: seen.append(g) or None)), response)
    torch.testing.assert_close(found, hypergradient(made(network()), response))
    assert seen and [dict(part._backward_hooks) for part in net.modules()] == tables


def test_hooks_inside_transforms_and_where_values_are_wanted_alone():
    game = made(network(), on_a_tensor(looking))
    with torch.no_grad():
        game.loss("y", {name: game.initial(name) for name in "xy"})
    bl.solve(game, y=RESPONSES["unrolled"], optimizer=SGD, steps=1)
    learned = bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2), scale=0.1, warmup=2, tolerance=None)
    assert torch.isfinite(hypergradient(game, learned))  # a tensor inside vmap has no gradient to look at
    net = network()
    net[1].register_full_backward_hook(looking)
    with pytest.raises(
        BilevelError, match=r"'1' in the module of 'y' has backward hooks, which torch.func does not run"
    ):
        hypergradient(made(net), learned)


def test_looking_for_hooks_costs_nothing_beside_an_evaluation():
    game = made(nn.Sequential(nn.Linear(3, 2), *(nn.Tanh() for _ in range(50)), nn.Linear(2, 1)).double())
    parts, began = game._parts.submodules["y"], time.perf_counter()
    for _ in range(1000):
        any(part._backward_hooks or part._backward_pre_hooks for part in parts)
    # Some 5 microseconds, and 100 on a busy machine; the evaluation of 52 layers takes half a millisecond.
    assert len(parts) == 53 and time.perf_counter() - began < 1.0


# Hooks on saved tensors -----------------------------------------------------------------------------------------------


def plain(y):
    return 0.3 * (y * y.roll(1)).sin().sum() + 0.5 * (y - 1.0).square().sum()


def under(manager, *given):
    def fit(y):
        with manager(*given):
            return plain(y)

    return fit


def simple(fit):
    def follow(x, y):
        return fit(y) + x.exp() * y.square().sum()

    lead = lambda y: (y - 0.3).square().sum()
    return bl.Game(
        x=bl.Player(lead, torch.tensor(-1.0, dtype=D)), y=bl.Player(follow, torch.tensor([0.2, 0.5], dtype=D))
    )


SAVING = {
    "on the CPU": under(save_on_cpu),
    "as they are": under(saved_tensors_hooks, lambda t: (t.clone(),), lambda packed: packed[0]),
    "recomputed": lambda y: checkpoint(plain, y, use_reentrant=False),
}


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
@pytest.mark.parametrize("kind", SAVING)
def test_saved_elsewhere_or_recomputed_is_right(kind, response):
    found, wanted = (hypergradient(simple(fit), response) for fit in (SAVING[kind], plain))
    torch.testing.assert_close(found, wanted)


def test_what_is_saved_as_other_numbers_is_refused():
    def half(t):
        return t.half()

    with pytest.raises(ValueError, match=r"Player 'y': .*hooks that give back others \(.*half and .*, by up to"):
        simple(under(saved_tensors_hooks, half, lambda packed: packed.double()))


def test_reentrant_checkpoints_and_hooks_inside_transforms_are_named():
    with pytest.raises(ValueError, match=r"Player 'y': it runs torch.utils.checkpoint\(use_reentrant=True\).*False"):
        simple(lambda y: checkpoint(plain, y, use_reentrant=True))
    learned = bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2), scale=0.1, warmup=2, tolerance=None)
    for fit in SAVING.values():
        game = simple(fit)
        with pytest.raises(BilevelError, match=r"Player 'y': its loss saves tensors by hooks"):
            hypergradient(game, learned)
        state = RESPONSES["unrolled"].init(game)

        def value(x, game=game, state=state):
            y, _ = RESPONSES["unrolled"](game, {"x": x}, state)
            return game.loss("x", {"x": x, "y": y})

        with pytest.raises(BilevelError, match=r"Player 'y': its loss saves tensors by hooks"):
            torch.func.grad(value)(game.initial("x"))
