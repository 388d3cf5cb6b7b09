"""Clipping, schedules, accumulated gradients and tuned options: the loop of plain torch, and its exact derivative."""

import io
from functools import partial

import pytest
import torch
from torch import optim
from torch.optim import lr_scheduler

import bilevel as bl
from bilevel.inner import TorchOptimizer

D = torch.float64
SGD = partial(optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(optim.Adam, lr=0.05)
COARSE = partial(optim.Adam, lr=0.05, eps=0.5)  # else a gradient's size would not matter
X = torch.tensor([0.7, -0.4, 1.1], dtype=D)
STEPS, CALLS = 5, 2


@pytest.fixture(autouse=True)
def _double():
    # torch keeps some of ASGD's and NAdam's numbers in the default dtype, whose rounding finite differences would see.
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


MODES = {"reverse": bl.ReverseMode(), "segments": bl.Segments(count=3), "forward": bl.ForwardMode()}

_numbers = torch.Generator().manual_seed(5)
BATCHES = [
    (torch.randn(6, 3, generator=_numbers, dtype=D), torch.randn(6, generator=_numbers, dtype=D)) for _ in range(4)
]
START = {"a": torch.randn(3, generator=_numbers, dtype=D), "b": torch.randn((), generator=_numbers, dtype=D)}


def follow(x, y, batch):
    inputs, outputs = batch
    found = torch.tanh(inputs @ y["a"]) + y["b"]
    return 3.0 * (found - outputs).square().mean() + x[2].exp() * y["b"].square() + (x * y["a"]).sin().sum()


def lead(y):
    return y["a"].square().sum() + (3.0 * y["b"]).sin()


GAME = bl.Game(x=bl.Player(lead, X), y=bl.Player(follow, START, BATCHES))


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.2, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.8)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


OPTIONS = {
    "clip_norm": {"clip_norm": 0.9},
    "clip_value": {"clip_value": 0.4},
    "both": {"clip_value": 0.6, "clip_norm": 0.7},
    "cosine": {"scheduler": partial(lr_scheduler.CosineAnnealingLR, T_max=12, eta_min=0.01)},
    "from zero and back": {"scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: step % 4 / 4)},
    "multistep": {"scheduler": partial(lr_scheduler.MultiStepLR, milestones=[2, 7], gamma=0.3)},
    "one cycle": {"scheduler": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)},
    "lambda": {"scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0 / (1.0 + step))},
    "sequential": {"scheduler": sequential},
    "rates": {"rates": [0.1, 0.02, 0.05, 0.01, 0.03] * CALLS},
    "accumulate": {"accumulate": 3},
    "all": {
        "clip_norm": 0.9,
        "accumulate": 2,
        "scheduler": partial(lr_scheduler.CosineAnnealingLR, T_max=7),
    },
}


def plain(factory, xs, *, clip_norm=None, clip_value=None, scheduler=None, rates=None, accumulate=1):
    """The loop as people write it, in plain torch: one of `xs` a step."""
    y = {name: value.clone().requires_grad_() for name, value in START.items()}
    own = list(y.values())
    optimizer = factory(own)
    schedule = None if scheduler is None else scheduler(optimizer)
    drawn = 0
    for step, x in enumerate(xs):
        optimizer.zero_grad()
        for _ in range(accumulate):
            (follow(x, y, BATCHES[drawn % len(BATCHES)]) / accumulate).backward()
            drawn += 1
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(own, clip_value)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(own, clip_norm)
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {name: value.detach() for name, value in y.items()}


def differences(function, at, h=1e-3):
    """Of fourth order: truncation h^4 ~ 1e-12, rounding eps / h ~ 2e-13, both times derivatives of order 1 to 1e3."""
    found = []
    for unit in torch.eye(at.numel(), dtype=D):
        f = {k: function(at + k * h * unit.reshape(at.shape)).item() for k in (-2, -1, 1, 2)}
        found.append((f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / (12 * h))
    return torch.tensor(found, dtype=D).reshape(at.shape)


def assert_close(slope, wanted):
    assert ((slope - wanted).norm() / wanted.norm()).item() <= 1e-6


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize("factory", [SGD, ADAM], ids=["SGD", "Adam"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loop_of_plain_torch_and_its_derivative_over_warm_starts_and_resume(options, factory, how):
    response = bl.Unrolled(TorchOptimizer(factory, **options), steps=STEPS, differentiation=how)
    state = response.init(GAME)
    for call in range(CALLS):
        x = X.clone().requires_grad_()
        y, after = response(GAME, {"x": x}, state)
        again, resumed = response(GAME, {"x": x}, saved_and_loaded(state))
        assert all(torch.equal(y[k], again[k]) for k in y) and str(after) == str(resumed)

        def value(moved, before=call * STEPS):
            return lead(plain(factory, [X] * before + [moved] * STEPS, **options))

        wanted = plain(factory, [X] * (call + 1) * STEPS, **options)
        assert max((y[k] - wanted[k]).abs().max().item() for k in y) <= 1e-12
        assert_close(torch.autograd.grad(lead(y), x)[0], differences(value, X))
        state = after
    if isinstance(how, bl.ReverseMode):
        assert state["gradients"] == state["products"] == CALLS * STEPS * options.get("accumulate", 1)


@pytest.mark.parametrize("how", list(MODES.values())[:2], ids=list(MODES)[:2])
def test_second_derivatives_through_clipping(how):
    def slopes(x):
        optimizer = TorchOptimizer(ADAM, clip_norm=0.9, accumulate=2)
        response = bl.Unrolled(optimizer, steps=4, differentiation=how)
        y, _ = response(GAME, {"x": x}, response.init(GAME))
        return torch.autograd.grad(lead(y), x, create_graph=True)[0]

    x = X.clone().requires_grad_()
    found = torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0] for s in slopes(x)])
    wanted = torch.stack([differences(lambda z, i=i: slopes(z.requires_grad_())[i].detach(), X) for i in range(3)])
    assert_close(found, wanted)


def test_truncated_steps_keep_their_place_in_the_schedule():
    options = OPTIONS["all"]
    x = X.clone().requires_grad_()
    for how in MODES.values():
        response = bl.Unrolled(TorchOptimizer(SGD, **options), steps=7, backprop_steps=4, differentiation=how)
        y, _ = response(GAME, {"x": x}, response.init(GAME))
        (slope,) = torch.autograd.grad(lead(y), x)
        assert_close(slope, differences(lambda z: lead(plain(SGD, [X] * 3 + [z] * 4, **options)), X))


# Options as hyperparameters -------------------------------------------------------------------------------------------

TUNED = {
    "lr": (lambda p, h: optim.SGD(p, lr=h, momentum=0.9), 0.05),
    "lr of Adam": (lambda p, h: optim.Adam(p, lr=h), 0.05),
    "lr of RMSprop": (lambda p, h: optim.RMSprop(p, lr=h), 0.05),
    "lr of RMSprop with momentum": (lambda p, h: optim.RMSprop(p, lr=h, momentum=0.5, centered=True), 0.02),
    "lr of Adagrad": (lambda p, h: optim.Adagrad(p, lr=h), 0.1),
    "lr of NAdam": (lambda p, h: optim.NAdam(p, lr=h), 0.05),
    "lr of RAdam": (lambda p, h: optim.RAdam(p, lr=h), 0.05),
    "lr of Adamax": (lambda p, h: optim.Adamax(p, lr=h), 0.05),
    "lr of Adadelta": (lambda p, h: optim.Adadelta(p, lr=h), 1.0),
    "lr of ASGD": (lambda p, h: optim.ASGD(p, lr=h, t0=2, lambd=0.1), 0.05),
    "alpha of RMSprop": (lambda p, h: optim.RMSprop(p, lr=0.05, alpha=h), 0.9),
    "momentum": (lambda p, h: optim.SGD(p, lr=0.05, momentum=h), 0.8),
    "momentum with nesterov": (lambda p, h: optim.SGD(p, lr=0.05, momentum=h, nesterov=True), 0.8),
    "momentum with dampening": (lambda p, h: optim.SGD(p, lr=0.05, momentum=h, dampening=0.3), 0.8),
    "dampening": (lambda p, h: optim.SGD(p, lr=0.05, momentum=0.8, dampening=h), 0.3),
    "momentum of RMSprop": (lambda p, h: optim.RMSprop(p, lr=0.02, momentum=h), 0.5),
    "weight decay": (lambda p, h: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=h), 0.2),
    "weight decay of Adam": (lambda p, h: optim.Adam(p, lr=0.05, weight_decay=h), 0.2),
    "weight decay of AdamW": (lambda p, h: optim.AdamW(p, lr=0.05, weight_decay=h), 0.2),
    "weight decay of RMSprop": (lambda p, h: optim.RMSprop(p, lr=0.05, weight_decay=h), 0.2),
    "betas": (lambda p, h: optim.Adam(p, lr=0.05, betas=(h[0], h[1])), [0.8, 0.95]),
    "betas of NAdam": (lambda p, h: optim.NAdam(p, lr=0.05, betas=(h[0], h[1])), [0.8, 0.95]),
    "betas of RAdam": (lambda p, h: optim.RAdam(p, lr=0.05, betas=(h[0], h[1])), [0.8, 0.95]),
    "betas of Adamax": (lambda p, h: optim.Adamax(p, lr=0.05, betas=(h[0], h[1])), [0.8, 0.95]),
    "rho of Adadelta": (lambda p, h: optim.Adadelta(p, lr=1.0, rho=h), 0.9),
    "decay of Adagrad": (lambda p, h: optim.Adagrad(p, lr=0.1, lr_decay=h), 0.1),
    "eps of Adam": (lambda p, h: optim.Adam(p, lr=0.05, eps=h), 0.1),
    "lambd of ASGD": (lambda p, h: optim.ASGD(p, lr=0.05, t0=2, lambd=h), 0.1),
    "weight decay of ASGD": (lambda p, h: optim.ASGD(p, lr=0.05, weight_decay=h), 0.1),
    "lr that is shared": (
        lambda p, h: optim.AdamW([{"params": p[:1], "lr": h}, {"params": p[1:], "lr": 2 * h, "weight_decay": h}]),
        0.05,
    ),
    "groups": (
        lambda p, h: optim.SGD([{"params": p[:1], "lr": h[0]}, {"params": p[1:]}], lr=h[1], momentum=0.9),
        [0.05, 0.02],
    ),
    "lr under a schedule": (
        TorchOptimizer(
            lambda p, h: optim.SGD(p, lr=h, momentum=0.9),
            scheduler=partial(lr_scheduler.CosineAnnealingLR, T_max=9, eta_min=0.01),
        ),
        0.05,
    ),
    "momentum under a schedule": (
        TorchOptimizer(
            lambda p, h: optim.SGD(p, lr=0.05, momentum=h),
            scheduler=partial(lr_scheduler.StepLR, step_size=3, gamma=0.5),
        ),
        0.8,
    ),
    "clip norm": (TorchOptimizer(SGD, clip_norm=lambda h: h), 0.9),
    "clip norm of Adam": (TorchOptimizer(COARSE, clip_norm=lambda h: h), 0.9),
    "clip value": (TorchOptimizer(SGD, clip_value=lambda h: h, accumulate=2), 0.4),
    "schedule": (TorchOptimizer(SGD, rates=lambda h: h), [0.1, 0.02, 0.05, 0.01, 0.03, 0.02]),
    "schedule of Adam": (TorchOptimizer(ADAM, rates=lambda h: h), [0.1, 0.02, 0.05, 0.01, 0.03, 0.02]),
}


def tuned_plain(optimizer, h, steps):
    """The same in plain torch at plain numbers."""
    numbers = h.item() if h.ndim == 0 else h.tolist()
    settings = optimizer if isinstance(optimizer, TorchOptimizer) else TorchOptimizer(optimizer)
    options = {"scheduler": settings.scheduler, "accumulate": settings.accumulate}
    options |= {
        name: getattr(settings, name) and getattr(settings, name)(numbers)
        for name in ("clip_norm", "clip_value", "rates")
    }
    takes = settings.factory not in (SGD, ADAM, COARSE)
    factory = (lambda p: settings.factory(p, h=numbers)) if takes else settings.factory
    return plain(factory, [X] * steps, **options)


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("optimizer", "start"), TUNED.values(), ids=TUNED)
def test_options_as_hyperparameters(optimizer, start, how):
    h = torch.tensor(start, dtype=D)
    game = bl.Game(
        h=bl.Player(lead, h, optimizer_hyper=True),
        y=bl.Player(lambda y, batch: follow(X, y, batch), START, BATCHES),
    )
    response = bl.Unrolled(optimizer, steps=6, differentiation=how)
    leader = h.clone().requires_grad_()
    y, after = response(game, {"h": leader}, response.init(game))
    wanted = tuned_plain(optimizer, h, 6)
    assert max((y[k] - wanted[k]).abs().max().item() for k in y) <= 1e-12
    (slope,) = torch.autograd.grad(lead(y), leader)
    assert_close(slope, differences(lambda z: lead(tuned_plain(optimizer, z, 6)), h, h=1e-4))
    # The gradient that is told of is the follower's own, as it was before torch's step.
    assert after["stationarity"] == pytest.approx(
        bl.Unrolled(optimizer, steps=6)(game, {"h": h}, response.init(game))[1]["stationarity"], rel=1e-10
    )


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
@pytest.mark.parametrize("option", ["weight_decay", "momentum"])
def test_an_option_that_starts_at_zero_has_its_derivative(option, how):
    # torch skips a decay of 0 and a momentum of 0, and would skip its derivative.
    def factory(p, h):
        return optim.SGD(p, **{"lr": 0.05, option: h})

    h = torch.tensor(0.0, dtype=D)
    game = bl.Game(
        h=bl.Player(lead, h, optimizer_hyper=True),
        y=bl.Player(lambda y, batch: follow(X, y, batch), START, BATCHES),
    )
    response = bl.Unrolled(factory, steps=6, differentiation=how)
    leader = h.clone().requires_grad_()
    y, _ = response(game, {"h": leader}, response.init(game))
    (slope,) = torch.autograd.grad(lead(y), leader)

    def value(z):
        return lead(tuned_plain(factory, z, 6))

    # From one side, since torch refuses what is below: (-11 f0 + 18 f1 - 9 f2 + 2 f3) / 6h, of third order.
    step = 1e-4
    f = [value(torch.tensor(k * step, dtype=D)).item() for k in range(4)]
    assert slope.item() == pytest.approx((-11 * f[0] + 18 * f[1] - 9 * f[2] + 2 * f[3]) / (6 * step), rel=1e-6)


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_a_rate_that_moves_between_calls_keeps_its_schedule(how):
    scheduler = partial(lr_scheduler.ExponentialLR, gamma=0.8)  # which goes on from the present rate
    optimizer = TorchOptimizer(lambda p, h: optim.SGD(p, lr=h), scheduler=scheduler)
    game = bl.Game(
        h=bl.Player(lead, torch.tensor(0.1, dtype=D), optimizer_hyper=True),
        y=bl.Player(lambda y, batch: follow(X, y, batch), START, BATCHES),
    )
    response = bl.Unrolled(optimizer, steps=3, differentiation=how)
    _, state = response(game, {"h": torch.tensor(0.1, dtype=D)}, response.init(game))
    late = torch.tensor(0.05, dtype=D, requires_grad=True)
    y, _ = response(game, {"h": late}, state)

    def value(z):
        rates = [0.1 * 0.8**k for k in range(3)] + [z.item() * 0.8**k for k in range(3, 6)]
        return lead(plain(partial(optim.SGD, lr=0.1), [X] * 6, rates=rates))

    assert lead(y).item() == pytest.approx(value(late).item(), rel=1e-12)
    assert_close(torch.autograd.grad(lead(y), late)[0], differences(value, late.detach(), h=2e-4))


def test_captured_options_receive_their_gradients():
    limit = torch.tensor(0.9, dtype=D, requires_grad=True)
    slopes = []
    for how in (bl.ReverseMode(), bl.Segments(count=3)):
        response = bl.Unrolled(TorchOptimizer(SGD, clip_norm=limit), steps=6, differentiation=how)
        y, _ = response(GAME, {"x": X}, response.init(GAME))
        slopes.append(torch.autograd.grad(lead(y), limit)[0])
    assert_close(slopes[0], differences(lambda z: lead(plain(SGD, [X] * 6, clip_norm=z.item())), limit.detach()))
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-12, atol=0)


def test_a_whole_schedule_is_tuned_by_solve():
    rates = torch.full((8,), -4.0, dtype=D)
    game = bl.Game(
        rates=bl.Player(lambda y: follow(X, y, BATCHES[0]), rates, optimizer_hyper=True),
        y=bl.Player(lambda y, batch: follow(X, y, batch), START, BATCHES),
    )
    optimizer = TorchOptimizer(partial(optim.SGD, lr=0.1), rates=lambda rates: rates.exp())
    response = bl.Unrolled(optimizer, steps=8, warm_start=False)
    solution = bl.solve(game, y=response, optimizer=partial(optim.Adam, lr=0.2), steps=30)
    assert solution.values["rates"] < 0.9 * solution.history[0]["rates"]


# Other responses and many games ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_implicit_takes_the_same_steps(options):
    response = bl.Implicit(TorchOptimizer(SGD, **options), steps=STEPS, tolerance=None)
    state = response.init(GAME)
    for call in range(CALLS):
        y, state = response(GAME, {"x": X}, saved_and_loaded(state))
        wanted = plain(SGD, [X] * (call + 1) * STEPS, **options)
        assert max((y[k] - wanted[k]).abs().max().item() for k in y) <= 1e-12


def test_many_games_are_clipped_one_by_one():
    starts = torch.stack([X, 2.0 * X, -X])
    game = bl.Game(
        x=bl.Player(lambda y: y.sin().sum(), X), y=bl.Player(lambda x, y: ((y - x) ** 4).sum() + y @ x, X + 1.0)
    )
    games = bl.Games(game, count=3, init={"x": starts})
    settings = TorchOptimizer(SGD, clip_norm=2.0, scheduler=OPTIONS["cosine"]["scheduler"])
    for response in (bl.Unrolled(settings, steps=5), bl.Implicit(settings, steps=30, tolerance=None)):
        x = starts.clone().requires_grad_()
        y, _ = response(games, {"x": x}, response.init(games))
        (slope,) = torch.autograd.grad(y.sin().sum(), x)
        for index in range(3):
            alone = games.game(index)
            own = starts[index].clone().requires_grad_()
            z, _ = response(alone, {"x": own}, response.init(alone))
            (wanted,) = torch.autograd.grad(z.sin().sum(), own)
            torch.testing.assert_close(y[index], z, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(slope[index], wanted, rtol=1e-5, atol=1e-9)


def test_transforms_give_the_same():
    def value(x):
        response = bl.Unrolled(TorchOptimizer(SGD, clip_norm=0.9, accumulate=2), steps=4)
        y, _ = response(GAME, {"x": x}, response.init(GAME))
        return lead(y)

    x = X.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(value)(X), torch.autograd.grad(value(x), x)[0], rtol=1e-12, atol=0)


# What is refused ------------------------------------------------------------------------------------------------------


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: TorchOptimizer(SGD, clip_norm=0.0), ValueError, "clip_norm=0.0; expected a number above 0"),
        (lambda: TorchOptimizer(SGD, clip_value=-1.0), ValueError, "clip_value=-1.0; expected a number above 0"),
        (lambda: TorchOptimizer(SGD, accumulate=0), ValueError, "accumulate=0; expected a whole number"),
        (lambda: TorchOptimizer(SGD, scheduler=sequential, rates=[0.1]), ValueError, "both set the learning rate"),
        (lambda: TorchOptimizer(SGD, scheduler=[0.1]), TypeError, r"Plain learning rates are rates=\[0.1, 0.05\]"),
        (lambda: TorchOptimizer(0.1), TypeError, "TorchOptimizer: factory is 0.1; expected a callable"),
        (lambda: bl.Unrolled(bl.Scipy("BFGS")), TypeError, r"Unrolled: optimizer is Scipy\(.*expected a callable"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, error, told):
    with pytest.raises(error, match=told):
        make()


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        (TorchOptimizer(SGD, scheduler=plateau), TypeError, "ReduceLROnPlateau, which wants a measured value"),
        (TorchOptimizer(SGD, rates=[0.1, 0.2]), ValueError, "rates has 2 learning rates, and step 3 has none"),
        (TorchOptimizer(SGD, rates=lambda nobody: nobody), TypeError, "parameter 'nobody', which names no player"),
        (TorchOptimizer(SGD, clip_norm=lambda x: x), TypeError, r"clip_norm= returned shape \(3,\)"),
    ],
)
def test_options_that_do_not_fit_the_game_are_refused(settings, error, told):
    with pytest.raises(error, match=told):
        bl.Unrolled(settings, steps=5).init(GAME)


def test_a_list_of_rates_does_not_start_again_in_silence():
    response = bl.Unrolled(TorchOptimizer(SGD, rates=[0.1] * 5), steps=5)
    _, state = response(GAME, {"x": X}, response.init(GAME))
    with pytest.raises(ValueError, match="5 steps were taken in earlier calls, and 5 come in this one"):
        response(GAME, {"x": X}, state)
    each = bl.Unrolled(TorchOptimizer(SGD, rates=[0.1] * 5), steps=5, warm_start=False)
    each(GAME, {"x": X}, state)


def test_only_unrolled_tunes_options():
    game = bl.Game(
        h=bl.Player(lead, torch.tensor(0.9, dtype=D), optimizer_hyper=True),
        y=bl.Player(lambda y, batch: follow(X, y, batch), START, BATCHES),
    )
    with pytest.raises(TypeError, match=r"Implicit cannot tune 'h'.*only Unrolled differentiates"):
        bl.Implicit(TorchOptimizer(SGD, clip_norm=lambda h: h)).init(game)
    limit = torch.tensor(0.9, requires_grad=True)
    with pytest.raises(TypeError, match=r"whose clip_norm is a tensor that requires grad.*only Unrolled"):
        bl.Implicit(TorchOptimizer(SGD, clip_norm=limit)).init(GAME)


def test_lbfgs_is_not_clipped():
    response = bl.Implicit(TorchOptimizer(optim.LBFGS, clip_norm=1.0))
    with pytest.raises(TypeError, match="LBFGS searches along the loss's own gradient on one batch, which clip_norm="):
        response(GAME, {"x": X}, response.init(GAME))


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (lambda p, h: optim.SGD(p, lr=h.item()), "'h' would get no derivative"),
        (
            TorchOptimizer(
                lambda p, h: optim.SGD(p, lr=0.1, momentum=h),
                scheduler=partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=50),
            ),
            "OneCycleLR sets momentum itself",
        ),
        (
            TorchOptimizer(
                lambda p, h: optim.SGD(p, lr=h),
                scheduler=partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=50, cycle_momentum=False),
            ),
            "OneCycleLR sets the learning rate itself",
        ),
    ],
)
def test_a_player_who_would_get_no_derivative_is_refused(factory, told):
    game = bl.Game(
        h=bl.Player(lead, torch.tensor(0.1, dtype=D), optimizer_hyper=True),
        y=bl.Player(lambda y, batch: follow(X, y, batch), START, BATCHES),
    )
    with pytest.raises(TypeError, match=told):
        bl.Unrolled(factory, steps=5).init(game)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_loss_that_is_told_is_the_mean_over_a_steps_batches(mode):
    response = bl.Unrolled(TorchOptimizer(SGD, accumulate=3), steps=2, differentiation=mode)
    x = X.clone().requires_grad_()
    _, state = response(GAME, {"x": x}, response.init(GAME))
    before, _ = bl.Unrolled(TorchOptimizer(SGD, accumulate=3), steps=1)(GAME, {"x": x}, response.init(GAME))
    # The second step's batches are the fourth, the first and the second.
    wanted = sum(follow(x, before, BATCHES[i]) for i in (3, 0, 1)) / 3
    torch.testing.assert_close(state["loss"], wanted.detach())
