"""Inner optimisers as people have them: subclasses, hooks, instances, names, their own; each works or is refused."""

import functools
from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.func import functional_call
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

import bilevel as bl
from bilevel.inner import DifferentiableOptimizer, TorchOptimizer
from bilevel.tree import flatten

from .test_inner_options import (
    ADAM,
    BATCHES,
    GAME,
    MODES,
    SGD,
    START,
    D,
    X,
    assert_close,
    differences,
    follow,
    lead,
    plain,
)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def answer(optimizer, how=None, x=X, steps=5, game=GAME):
    response = bl.Unrolled(optimizer, steps=steps, differentiation=how or bl.ReverseMode())
    return response(game, {"x": x}, response.init(game))


# Step hooks -----------------------------------------------------------------------------------------------------------


def clipping(optimizer, *arguments):
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)


def with_pre_hook(params):
    optimizer = SGD(params)
    optimizer.register_step_pre_hook(clipping)
    return optimizer


def with_post_hook(params):
    optimizer = SGD(params)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def with_scheduler(params):
    optimizer = SGD(params)
    lr_scheduler.LinearLR(optimizer, 0.5)
    return optimizer


def with_own_step(params):
    optimizer = SGD(params)
    optimizer.step = lambda: None
    return optimizer


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (with_pre_hook, r"SGD has a step pre-hook, 'clipping'.*clip_norm="),
        (with_post_hook, r"SGD has a step post-hook, 'with_post_hook.*scheduler="),
        (with_scheduler, r"SGD has a scheduler that was made over it.*scheduler="),
        (with_own_step, r"SGD has a step\(\) of its own, 'with_own_step"),
    ],
)
def test_step_hooks_are_refused_by_name(factory, told):
    for response in (bl.Unrolled(factory), bl.Implicit(factory), bl.Implicit(TorchOptimizer(factory))):
        with pytest.raises(TypeError, match=told):
            response.init(GAME)


def test_hooks_on_all_optimisers_are_refused():
    handle = register_optimizer_step_pre_hook(clipping)
    try:
        with pytest.raises(TypeError, match="SGD has a step pre-hook, 'clipping'"):
            bl.Unrolled(SGD).init(GAME)
    finally:
        handle.remove()
    bl.Unrolled(SGD).init(GAME)


# Subclasses -----------------------------------------------------------------------------------------------------------


class MyAdam(optim.Adam):
    """Another default, and a method more."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr=lr)

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)

    def rate(self):
        return self.param_groups[0]["lr"]


class MySGD(optim.SGD):
    pass


class Stepping(optim.Adam):
    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


class Decorated(optim.SGD):
    step = functools.wraps(optim.SGD.step)(lambda self, closure=None: None)


class Preparing(optim.SGD):
    def _init_group(self, *arguments):
        return super()._init_group(*arguments)


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("own", "base"), [(MyAdam, ADAM), (partial(MySGD, lr=0.05, momentum=0.9), SGD)])
def test_a_subclass_that_leaves_the_step_alone_works_as_its_base(own, base, how):
    for _ in range(2):  # torch wraps the step of a class when it is first made
        x = X.clone().requires_grad_()
        (y, state), (z, wanted) = answer(own, how, x), answer(base, how, x)
        assert all(torch.equal(y[k], z[k]) for k in y) and str(state["optimizer"]) == str(wanted["optimizer"])
        slopes = [torch.autograd.grad(lead(v), x)[0] for v in (y, z)]
        assert torch.equal(*slopes)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (Stepping, "torch.optim.Adam that overrides step"),
        (Decorated, "torch.optim.SGD that overrides step"),
        (Preparing, "torch.optim.SGD that overrides _init_group"),
    ],
)
def test_a_subclass_that_overrides_the_step_is_refused_by_name(own, told):
    for _ in range(2):
        with pytest.raises(TypeError, match=f"through {own.__name__}: it is a {told}.*DifferentiableOptimizer"):
            bl.Unrolled(own).init(GAME)
    bl.Implicit(own, tolerance=None).init(GAME)


# An optimiser of one's own --------------------------------------------------------------------------------------------


class Trusting(DifferentiableOptimizer):
    """LARS: the step's length goes by the norms of a whole leaf, so that its derivative is no diagonal."""

    def __init__(self, params, lr=0.05, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def first_memory(self, y):
        return {"velocity": torch.zeros_like(y), "step": torch.zeros(()), "seen": [0]}

    def update(self, y, gradient, memory, options):
        trust = (1.0 + y.square().sum()) / (1.0 + gradient.square().sum())
        velocity = options["momentum"] * memory["velocity"] + trust * gradient
        # Of the name that torch's own count has, and unlike it a function of y.
        step = 0.5 * memory["step"] + gradient.sum().tanh()
        moved = y - options["lr"] * velocity * (1.0 + 0.1 * step.sin())
        return moved, {"velocity": velocity, "step": step, "seen": [memory["seen"][0] + 1]}


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_an_optimiser_of_ones_own(how):
    scheduler = partial(lr_scheduler.CosineAnnealingLR, T_max=9)
    options = {"clip_norm": 2.0, "scheduler": scheduler, "accumulate": 2}
    response = bl.Unrolled(TorchOptimizer(Trusting, **options), steps=5, differentiation=how)
    state = response.init(GAME)
    for call in range(2):
        x = X.clone().requires_grad_()
        y, state = response(GAME, {"x": x}, state)

        def value(moved, before=5 * call):
            return lead(plain(Trusting, [X] * before + [moved] * 5, **options))

        wanted = plain(Trusting, [X] * 5 * (call + 1), **options)
        assert max((y[k] - wanted[k]).abs().max().item() for k in y) <= 1e-12
        assert_close(torch.autograd.grad(lead(y), x)[0], differences(value, X))


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_its_options_are_hyperparameters(how):
    game = bl.Game(
        h=bl.Player(lead, torch.tensor([0.05, 0.8]), optimizer_hyper=True),
        y=bl.Player(lambda y, batch: follow(X, y, batch), START, BATCHES),
    )
    response = bl.Unrolled(lambda p, h: Trusting(p, h[0], h[1]), steps=5, differentiation=how)
    h = torch.tensor([0.05, 0.8], requires_grad=True)
    y, _ = response(game, {"h": h}, response.init(game))

    def value(z):
        return lead(plain(lambda p: Trusting(p, z[0].item(), z[1].item()), [X] * 5))

    assert_close(torch.autograd.grad(lead(y), h)[0], differences(value, h.detach(), h=2e-4))


def test_it_serves_implicit_and_leaders_too():
    _, state = answer(partial(Trusting, lr=0.02), steps=3)
    implicit = bl.Implicit(partial(Trusting, lr=0.02), steps=3, tolerance=None)
    y, after = implicit(GAME, {"x": X}, implicit.init(GAME))
    assert all(torch.equal(y[k].detach(), state["variables"][k]) for k in y)
    assert str(after["optimizer"]) == str(state["optimizer"])
    bl.solve(GAME, y=bl.Unrolled(SGD, steps=2), optimizer=Trusting, steps=2)


def test_its_step_is_not_overridden():
    class Both(Trusting):
        def step(self, closure=None):
            return None

    with pytest.raises(TypeError, match=r"Both overrides step\(\).*write update\(\) alone"):
        bl.Unrolled(Both).init(GAME)


# Instances, and groups by name ----------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def test_an_instance_is_refused_with_what_makes_its_like():
    model = network()
    single = optim.AdamW(model.parameters(), lr=0.2, betas=(0.8, 0.9))
    for kind in (bl.Unrolled, bl.Implicit, TorchOptimizer):
        with pytest.raises(
            TypeError, match=r"functools.partial\(torch.optim.AdamW, lr=0.2, betas=\(0.8, 0.9\)\)\."
        ) as told:
            kind(single)
        assert "expected a callable that makes one over the follower's tensors" in str(told.value)
    decayed = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
    plain_ones = [(n, p) for n, p in model.named_parameters() if n.endswith("bias")]
    several = optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": plain_ones}], lr=0.3)
    with pytest.raises(TypeError) as told:
        bl.Unrolled(several)
    code = str(told.value).split("follower's tensors: ")[1].rstrip(".")
    assert code.startswith("lambda named_parameters: torch.optim.SGD([{'params': [p for name, p in named_parameters if")
    # The way out works as it is told.
    built = eval(code)(list(model.named_parameters()))
    for group, wanted in zip(built.param_groups, several.param_groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], wanted["params"], strict=True))
        assert group["weight_decay"] == wanted["weight_decay"] and group["lr"] == wanted["lr"]


def by_name(named_parameters):
    pairs = dict(named_parameters)
    return optim.SGD(
        [
            {"params": [p for n, p in pairs.items() if n.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for n, p in pairs.items() if n.endswith("bias")], "lr": 0.3},
        ],
        lr=0.2,
        momentum=0.5,
    )


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_groups_by_name(how):
    inputs, outputs = torch.randn(8, 3), torch.randn(8, 1)

    def fit(x, y):
        return (functional_call(model, y, (inputs,)) - x * outputs).square().mean()

    model = network()
    game = bl.Game(x=bl.Player(lambda y: flatten(y).square().sum(), torch.tensor([1.0])), y=bl.Player(fit, model))
    y, _ = answer(by_name, how, torch.tensor([1.0], requires_grad=True), game=game)
    trained = network()
    optimizer = by_name(trained.named_parameters())
    for _ in range(5):
        optimizer.zero_grad()
        (trained(inputs) - outputs).square().mean().backward()
        optimizer.step()
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(y[name], parameter, rtol=1e-12, atol=1e-13)
    implicit = bl.Implicit(by_name, steps=5, tolerance=None)
    z, _ = implicit(game, {"x": torch.tensor([1.0])}, implicit.init(game))
    torch.testing.assert_close(flatten(z), flatten(y), rtol=1e-12, atol=1e-13)


def test_names_of_nested_variables_and_of_a_bare_tensor():
    seen = []

    def factory(named):
        seen.append([name for name, _ in named])
        return optim.SGD([p for _, p in named], lr=0.1)

    start = {"layer": [torch.zeros(2), {"bias": torch.zeros(1)}]}
    game = bl.Game(
        x=bl.Player(lambda y: flatten(y).square().sum(), torch.ones(1)),
        y=bl.Player(lambda x, y: (flatten(y) - x).square().sum(), start),
    )
    answer(factory, x=torch.ones(1), game=game)
    assert set(map(tuple, seen)) == {("layer.0", "layer.1.bias")}
    bare = bl.Game(
        x=bl.Player(lambda y: y.square().sum(), torch.ones(1)),
        y=bl.Player(lambda x, y: (y - x).square().sum(), torch.zeros(2)),
    )
    seen.clear()
    answer(factory, x=torch.ones(1), game=bare)
    assert set(map(tuple, seen)) == {("y",)}
    with pytest.raises(TypeError, match="wants named parameters; only a follower's optimiser is given names"):
        bl.solve(bare, y=bl.Unrolled(SGD, steps=2), optimizer=factory, steps=1)


def test_groups_over_a_models_own_parameters_are_refused():
    model = network()
    with pytest.raises(ValueError, match="tensors that it was not given, such as a model's own parameters"):
        bl.Unrolled(lambda params: optim.SGD(model.parameters(), lr=0.1)).init(GAME)


# Names of players -----------------------------------------------------------------------------------------------------


def own_function(params, lr=0.1):
    return optim.SGD(params, lr=lr)


def with_words(params, **options):
    return optim.SGD(params, lr=0.1, **options)


@functools.wraps(optim.SGD)
def around_a_class(*arguments, **options):
    return optim.SGD(*arguments, **{"lr": 0.1} | options)


def noisy(function):
    @functools.wraps(function)
    def inside(*arguments, **options):
        return function(*arguments, **options)

    return inside


class Maker:
    def __call__(self, params, lr=0.1):
        return optim.SGD(params, lr=lr)


class HerSGD(optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)


@pytest.mark.parametrize(
    ("factory", "passed"),
    [
        (own_function, True),
        (lambda params, *, lr=0.1: optim.SGD(params, lr=lr), True),
        (lambda params, lr: optim.SGD(params, lr=lr), True),
        (noisy(own_function), True),
        (Maker(), True),
        (partial(own_function), True),
        (partial(own_function, lr=0.1), False),
        (partial(noisy(own_function), lr=0.1), False),
        (optim.SGD, False),
        (HerSGD, False),
        (partial(optim.SGD, lr=0.1), False),
        (partial(partial(optim.SGD, lr=0.1), momentum=0.5), False),
        (with_words, False),
        (around_a_class, False),
        (partial(around_a_class, lr=0.1), False),
    ],
)
def test_a_players_variables_reach_a_parameter_of_the_users_own_function_alone(factory, passed):
    # `lr` is a penalty here, in the follower's loss as well, so that the game is the same for all.
    game = bl.Game(
        lr=bl.Player(lambda y: y.square().sum(), torch.tensor(0.01)),
        y=bl.Player(lambda lr, y: (y - 2.0).square().sum() + lr * y.square().sum(), torch.zeros(2)),
    )
    response = bl.Unrolled(factory, steps=1)
    y, _ = response(game, {"lr": torch.tensor(0.01)}, response.init(game))
    rate = 0.01 if passed else (1e-3 if factory is optim.SGD else 0.1)
    torch.testing.assert_close(y, torch.full((2,), 4.0 * rate))
    if passed:
        with pytest.raises(TypeError, match="Implicit cannot tune 'lr'"):
            bl.Implicit(factory).init(game)
    else:
        bl.Implicit(factory).init(game)


# Numbers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_of_nan_in_a_middle_step_says_at_which(how, accumulate):
    # The third step starts at 2.4, where the loss is NaN without any gradient; the fourth would be finite again.
    def fit(x, y):
        hole = torch.where((y.detach() - 2.4).abs() < 1e-9, torch.nan, 0.0).sum()
        return -(x * y).sum() + hole

    game = bl.Game(x=bl.Player(lambda y: y.square().sum(), torch.full((2,), 1.2)), y=bl.Player(fit, torch.zeros(2)))
    settings = TorchOptimizer(partial(optim.SGD, lr=1.0), accumulate=accumulate)
    with pytest.raises(
        bl.errors.NonFiniteError, match="'y': its loss became nan at inner step 3 of 5.*left its domain"
    ):
        answer(settings, how, torch.full((2,), 1.2, requires_grad=True), game=game)
    response = bl.Implicit(settings, steps=5, tolerance=None)
    with pytest.raises(
        bl.errors.NonFiniteError, match="'y': its loss became nan at inner step 3 of 5.*left its domain"
    ):
        response(game, {"x": torch.full((2,), 1.2)}, response.init(game))


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_a_gradient_of_nan_in_a_middle_step_says_at_which(how):
    # |y - 2.4| by a square root: finite at 2.4, where the third step starts, and its gradient is not.
    def fit(x, y):
        return -(x * y).sum() + 0.0 * (y - 2.4).square().sqrt().sum()

    game = bl.Game(x=bl.Player(lambda y: y.square().sum(), torch.full((2,), 1.2)), y=bl.Player(fit, torch.zeros(2)))
    with pytest.raises(bl.errors.NonFiniteError, match="its gradient became NaN or infinite at inner step 3 of 5"):
        answer(partial(optim.SGD, lr=1.0), how, torch.full((2,), 1.2, requires_grad=True), game=game)
