"""Autograd functions of the user's: a second derivative that is not one is refused, and everything else is taken."""

import warnings
from functools import partial

import pytest
import torch
from torch.autograd import Function

import bilevel as bl
from bilevel.custom_functions import examined, recorded
from bilevel.errors import BilevelError, BilevelWarning, NotSymmetricError, SecondDerivativeError
from bilevel.responses import ForwardMode, LastStep, Segments

D = torch.float64
SGD = partial(torch.optim.SGD, lr=0.1)
UNROLLED = bl.Unrolled(SGD, steps=5)
TWICE = {
    "unrolled": UNROLLED,
    "forward": bl.Unrolled(SGD, steps=5, differentiation=ForwardMode()),
    "segments": bl.Unrolled(SGD, steps=5, differentiation=Segments()),
    "implicit": bl.Implicit(SGD, steps=300, tolerance=1e-8, linear_solver=bl.linear.Dense()),
    "single loop": bl.SingleLoop(SGD),
}
NUDGED = bl.Nudged(SGD, steps=300, tolerance=1e-8)


def made(forward, backward, name="Own"):
    return type(name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def saving(value, slope, saved):
    """A function whose backward is `slope` of what it has saved."""

    def forward(ctx, x):
        kept = saved(x)
        ctx.save_for_backward(*(kept if isinstance(kept, tuple) else (kept,)))
        return value(x)

    return made(forward, lambda ctx, g: slope(*ctx.saved_tensors) * g)


def kept_on_ctx(ctx, x):
    ctx.slope = x.exp()
    return ctx.slope.clone()


class Power(Function):
    """In the newer form, whose setup_context computes without a graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, power=3):
        return x**power

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.power = inputs
        ctx.save_for_backward(x ** (ctx.power - 1))

    @staticmethod
    def backward(ctx, g):
        return ctx.power * ctx.saved_tensors[0] * g, None


class Unit(Function):
    """x / |(1, x)|, whose norm is saved: a part of its second derivative is there."""

    @staticmethod
    def forward(ctx, x):
        norm = (1.0 + x @ x).sqrt()
        ctx.save_for_backward(x, norm)
        return x / norm

    @staticmethod
    def backward(ctx, g):
        x, norm = ctx.saved_tensors
        return (g - (g * x).sum() * x / norm**2) / norm


class Half(Function):
    """Right where x is negative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.exp())
        return torch.where(x > 0.0, x.exp() - 1.0, x + 0.5 * x**2)

    @staticmethod
    def backward(ctx, g):
        x, exp = ctx.saved_tensors
        return g * torch.where(x > 0.0, exp, 1.0 + x)


class Single(Function):
    """For 32 bits alone."""

    @staticmethod
    def forward(ctx, x):
        assert x.dtype == torch.float32
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g


def within_single(ctx, x):
    exp = x.float().exp()
    ctx.save_for_backward(exp)
    return exp.to(x)


def dropped(ctx, x):
    mask = (torch.rand_like(x) > 0.3).to(x)
    ctx.save_for_backward(mask * x.cos())
    return mask * x.sin()


def first_saved(ctx, g):
    return ctx.saved_tensors[0].to(g) * g


# What each function is, in plain operations.
WRONG = {
    "a slope that forward computed": (saving(lambda x: x**3, lambda s: s, lambda x: 3 * x**2), lambda x: x**3),
    "a part of it": (saving(lambda x: x**3, lambda x, s: 3 * x * s, lambda x: (x, x.clone())), lambda x: x**3),
    "on ctx": (made(kept_on_ctx, lambda ctx, g: ctx.slope * g), torch.exp),
    "softplus by a saved sigmoid": (
        saving(lambda x: -torch.log(1 - x.sigmoid()), lambda s: s, torch.sigmoid),
        torch.nn.functional.softplus,
    ),
    "in setup_context": (Power, lambda x: x**3),
    "a norm": (Unit, lambda x: x / (1.0 + x @ x).sqrt()),
    "in one branch": (Half, lambda x: torch.where(x > 0.0, x.exp() - 1.0, x + 0.5 * x**2)),
    "computed in 32 bits": (made(within_single, first_saved), torch.exp),
}


def game_of(fit, dtype=D):
    def follow(x, y):
        return fit(y) + 0.5 * x.exp() * (y - 0.5).square().sum()

    start = torch.tensor([0.4, 0.7, -0.3], dtype=dtype)
    lead = lambda x, y: (y - 0.3).square().sum() + 0.1 * x.square()
    return bl.Game(x=bl.Player(lead, torch.tensor(-1.0, dtype=dtype)), y=bl.Player(follow, start))


def smooth(function):
    return lambda y: 0.1 * function(0.8 * y).sin().sum() + 0.5 * y.square().sum()


def hypergradient(game, response):
    x, state = game.initial("x").requires_grad_(), response.init(game)
    y, _ = response(game, {"x": x}, state)
    return torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)[0]


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("response", [TWICE["unrolled"], TWICE["implicit"]], ids=["unrolled", "implicit"])
def test_a_second_derivative_without_what_forward_computed_is_refused(kind, response):
    function, _ = WRONG[kind]
    with pytest.raises(SecondDerivativeError, match=r"Player 'y': the second derivative of .* is wrong: autograd says"):
        hypergradient(game_of(smooth(function.apply)), response)


@pytest.mark.parametrize("response", TWICE.values(), ids=TWICE)
def test_by_every_response_that_takes_it(response):
    with pytest.raises(SecondDerivativeError, match="autograd function Power is wrong"):
        response.init(game_of(smooth(Power.apply)))


@pytest.mark.parametrize("kind", [k for k in WRONG if k != "computed in 32 bits"])
def test_who_takes_first_derivatives_is_right_with_all_of_them(kind):
    function, plain = WRONG[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error", BilevelWarning)
        for response in (NUDGED, LastStep(SGD)):
            found, wanted = (hypergradient(game_of(smooth(f)), response) for f in (function.apply, plain))
            # The same arithmetic but for rounding, over some 300 steps and divided by a nudge of about 1e-4.
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        # The implicit derivative, by plain operations: a nudge's own error is its square.
        exact = hypergradient(game_of(smooth(plain)), TWICE["implicit"])
    torch.testing.assert_close(hypergradient(game_of(smooth(function.apply)), NUDGED), exact, rtol=1e-4, atol=1e-6)


def test_in_32_bits_and_what_runs_in_nothing_else():
    with pytest.raises(SecondDerivativeError, match="autograd function Single is wrong"):
        UNROLLED.init(game_of(smooth(Single.apply), torch.float32))
    with pytest.raises(SecondDerivativeError, match="autograd function Power is wrong"):
        UNROLLED.init(game_of(smooth(Power.apply), torch.float32))


# What is meant as it is -----------------------------------------------------------------------------------------------


class Steps(Function):
    """Its gradient moves in steps of a tenth: a second derivative of 0, as it says."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x**2

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] * 10.0).floor() / 10.0


class RandomByNumPy(Function):
    """Draws what nobody holds: nothing can be told of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        noise = torch.from_numpy(__import__("numpy").random.rand(*g.shape)).to(g)
        return g * ctx.saved_tensors[0].cos() * (1.0 + 1e-3 * noise)


class InPlace(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2.0)

    @staticmethod
    def backward(ctx, g):
        return 2.0 * g


def grid(ctx, x):
    kept = (x * 1e4).round() / 1e4
    ctx.save_for_backward(kept)
    return kept**2


MEANT = {
    "an honest one": saving(lambda x: x**3, lambda x: 3 * x**2, lambda x: x).apply,
    "an output": None,
    "relu": saving(lambda x: x.clamp(min=0.0), lambda x: (x > 0.0).to(x), lambda x: x).apply,
    "relu by a mask": saving(lambda x: x.clamp(min=0.0), lambda m: m, lambda x: x > 0.0).apply,
    "relu at its kink": lambda x: saving(torch.relu, lambda m: m, lambda x: x > 0.0).apply(x - x.detach()),
    "rounding": made(lambda ctx, x: x.round(), lambda ctx, g: g).apply,
    "a grid": made(lambda ctx, x: (x * 128.0).round() / 128.0, lambda ctx, g: g).apply,
    "a fine grid": made(grid, lambda ctx, g: 2.0 * ctx.saved_tensors[0] * g).apply,
    "a clip whose gradient passes": made(lambda ctx, x: x.clamp(-0.3, 0.3), lambda ctx, g: g).apply,
    "a sign": saving(torch.sign, lambda x: (x.abs() < 1.0).to(x), lambda x: x).apply,
    "Huber's": saving(
        lambda x: torch.where(x.abs() < 0.5, 0.5 * x**2, 0.5 * x.abs() - 0.125),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x,
    ).apply,
    "a gradient in steps": Steps.apply,
    "a gradient with noise": RandomByNumPy.apply,
    "one that writes into its input": lambda x: InPlace.apply(x * 1.0),
}


class Exp(Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g


MEANT["an output"] = Exp.apply


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("kind", MEANT)
def test_what_is_meant_as_it_is_passes_in_silence(kind, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", BilevelWarning)
        game = game_of(lambda y: 0.3 * MEANT[kind](0.8 * y).square().sum(), dtype)
        for response in (UNROLLED, NUDGED):
            response.init(game)
        assert torch.isfinite(hypergradient(game, UNROLLED))


def test_where_all_entries_are_in_the_flat_or_the_right_branch():
    square = saving(lambda x: x.clamp(min=0.0).square(), lambda s: s, lambda x: 2.0 * x.clamp(min=0.0))
    for function in (square, Half):
        game = game_of(lambda y, function=function: function.apply(-y.square()).sum() + y.square().sum())
        with pytest.raises(SecondDerivativeError, match="is wrong"):
            UNROLLED.init(game)


def test_many_entries_with_kinks_among_them():
    torch.manual_seed(0)
    relu, wrong = MEANT["relu by a mask"], WRONG["softplus by a saved sigmoid"][0].apply

    def follow(x, y, wrong=None):
        inner = relu(y)
        return (inner if wrong is None else wrong(inner)).square().mean() + x.exp() * y.square().mean()

    players = {"x": bl.Player(lambda y: y.sum(), torch.tensor(-1.0, dtype=D))}
    start = torch.randn(4000, dtype=D)
    UNROLLED.init(bl.Game(**players, y=bl.Player(follow, start)))
    with pytest.raises(SecondDerivativeError, match="is wrong"):
        UNROLLED.init(bl.Game(**players, y=bl.Player(partial(follow, wrong=wrong), start)))


def test_the_class_is_left_alone_and_nothing_is_evaluated_without_one():
    before, calls = vars(Power)["forward"], []
    game_of(smooth(Power.apply))
    assert vars(Power)["forward"] is before

    class Child(Exp):
        """Has its forward from elsewhere."""

    with recorded([Child]) as seen:
        Child.apply(torch.ones(2, dtype=D, requires_grad=True))
    assert len(seen) == 1 and "forward" not in vars(Child) and not examined(seen).second
    bl.Game(y=bl.Player(lambda y: calls.append(1) or y.square(), torch.tensor(1.0)))
    assert len(calls) == 1


# Who else takes a second derivative -----------------------------------------------------------------------------------


def test_rules_of_play_and_certificates_refuse_it():
    loss = lambda x, y: smooth(Power.apply)(y) + x * y.sum()
    own = bl.Player(lambda x, y: x.square() - x * y.sum(), torch.tensor(1.0, dtype=D))
    game = bl.Game(x=own, y=bl.Player(loss, torch.tensor([0.5, 0.2], dtype=D)))
    for rule in (bl.dynamics.Consensus(0.1), bl.dynamics.LOLA(0.1)):
        with pytest.raises(SecondDerivativeError, match="Player 'y': the second derivative"):
            bl.solve(game, dynamics=rule, optimizer=SGD, steps=1)
    bl.solve(game, optimizer=SGD, steps=1)  # a first derivative alone
    with pytest.raises(SecondDerivativeError, match="Player 'y': the second derivative"):
        bl.certify_nash(game, {name: game.initial(name) for name in "xy"})
    with pytest.raises(SecondDerivativeError, match="Player 'y': the second derivative"):
        bl.certify(game_of(smooth(Power.apply)), {"x": torch.tensor(0.0, dtype=D), "y": torch.zeros(3, dtype=D)})


def test_constraints_and_residuals():
    lead, start = lambda y: (y - 0.3).square().sum(), torch.tensor([0.4, 0.2], dtype=D)
    leader = bl.Player(lead, torch.tensor(1.0, dtype=D))
    within = lambda x, y: Power.apply(y).sum() - x
    game = bl.Game(x=leader, y=bl.Player(lambda y: (y - 2).square().sum(), start, inequality=within))
    with pytest.raises(SecondDerivativeError, match="Player 'y': the second derivative of the autograd function Power"):
        bl.Implicit(bl.Scipy("SLSQP")).init(game)
    loss = lambda x, y: 0.1 * Power.apply(y - 0.5 * x).sum() + y.square().sum()
    response = bl.Implicit(bl.ScipyRoot(), linear_solver=bl.GMRES())
    by_gradient = bl.Player(loss, start, residual=lambda gradient: 2.0 * gradient)
    with pytest.raises(SecondDerivativeError, match="autograd function Power"):
        bl.Game(x=leader, y=by_gradient)
    # Its own residual takes no second derivative of the loss, and is differentiated rightly.
    by_hand = bl.Player(loss, start, residual=lambda x, y: 0.3 * (y - 0.5 * x) ** 2 + 2.0 * y)
    plain = bl.Player(lambda x, y: 0.1 * (y - 0.5 * x).pow(3).sum() + y.square().sum(), start)
    slopes = []
    for player, way in ((by_hand, response), (plain, TWICE["implicit"])):
        made = bl.Game(x=leader, y=player)
        slopes.append(hypergradient(made, way))
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_a_function_of_torch_library():
    @torch.library.custom_op("bilevel_tests::cubed", mutates_args=())
    def cubed(x: torch.Tensor) -> torch.Tensor:
        return x**3

    keeping = {"wrong": lambda x: 3 * x**2, "right": lambda x: x}

    def registered(kind):
        cubed.register_autograd(
            lambda ctx, g: (ctx.saved_tensors[0] if kind == "wrong" else 3 * ctx.saved_tensors[0] ** 2) * g,
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(keeping[kind](inputs[0])),
        )

    registered("wrong")
    with pytest.raises(SecondDerivativeError, match="bilevel_tests_cubed.*is wrong"):
        UNROLLED.init(game_of(smooth(cubed)))
    registered("right")
    found, wanted = (hypergradient(game_of(smooth(f)), UNROLLED) for f in (cubed, lambda x: x**3))
    torch.testing.assert_close(found, wanted)


def test_many_games_and_joint_players_refuse_it():
    game = game_of(smooth(Power.apply))
    with pytest.raises(SecondDerivativeError, match="autograd function Power"):
        UNROLLED.init(bl.Games(game, 2))
    zero = torch.tensor(0.3, dtype=D)
    firm = lambda x, a, b: Power.apply(a) + a.square() + a * (b - x)
    other = lambda x, a, b: b.square() + b * (a - x)
    three = bl.Game(x=bl.Player(lambda a, b: a + b, zero), a=bl.Player(firm, zero), b=bl.Player(other, zero))
    with pytest.raises(SecondDerivativeError, match="Player 'a': the second derivative"):
        bl.Implicit(SGD, linear_solver=bl.GMRES()).init(three.joined(both=("a", "b")))


def test_a_function_not_made_for_torch_func_is_named():
    response = bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2), scale=0.1, warmup=2, tolerance=None)
    game = game_of(lambda y: smooth(Exp.apply)(y))
    with pytest.raises(BilevelError, match=r"Player 'y': an autograd function .*generate_vmap_rule = True"):
        hypergradient(game, response)
    hypergradient(game_of(smooth(Power.apply)), response)  # its way out


# A first derivative that is not one -----------------------------------------------------------------------------------

Reversed = made(lambda ctx, x: x.view_as(x), lambda ctx, g: -g, "Reversed")
Rolled = saving(lambda x: x**3, lambda x: 3 * x.roll(1) ** 2, lambda x: x)


def adversarial(reverse):
    """Features f against a domain's critic c: c' f in the critic's loss, minus it in the features'."""

    def both(x, y):
        features, critic = y[:2], y[2:]
        task = (features - x).square().sum()
        return task + (reverse(features).sin() * critic).sum() + 2.0 * critic.square().sum()

    lead = lambda x, y: (y[:2] - 0.3).square().sum() + 0.1 * x
    return bl.Game(x=bl.Player(lead, torch.tensor(0.7, dtype=D)), y=bl.Player(both, torch.full((4,), 0.2, dtype=D)))


def equilibrium(x):
    """Where 2 (f - x) = cos(f) c and sin(f) + 4 c = 0, by Newton's method; differentiable by one more step."""
    f = x.detach().clone()
    residual = lambda f, x: 2.0 * (f - x) + f.cos() * f.sin() / 4.0
    slope = lambda f: 2.0 + (2.0 * f).cos() / 4.0
    for _ in range(20):
        f = f - residual(f, x.detach()) / slope(f)
    return f - residual(f, x) / slope(f)


def test_behind_a_gradient_reversal_it_warns_and_two_players_are_right():
    game, x = adversarial(Reversed.apply), torch.tensor(0.7, dtype=D, requires_grad=True)
    told = r"Reversed is not the derivative of its forward.*derivative of the player's gradient is then .* two players"
    for response in (UNROLLED, bl.Implicit(SGD, steps=400, linear_solver=bl.GMRES())):
        with pytest.warns(BilevelWarning, match=told):
            response.init(game)
    two = bl.Game(
        x=bl.Player(lambda x, f: (f - 0.3).square().sum() + 0.1 * x, x.detach()),
        f=bl.Player(lambda x, f, c: (f - x).square().sum() - (f.sin() * c).sum(), torch.full((2,), 0.2, dtype=D)),
        c=bl.Player(lambda f, c: (f.sin() * c).sum() + 2.0 * c.square().sum(), torch.full((2,), 0.2, dtype=D)),
    ).joined(y=("f", "c"))
    found = hypergradient(two, bl.Implicit(bl.ScipyRoot(), tolerance=1e-10, linear_solver=bl.linear.Dense()))
    exact = 2.0 * (equilibrium(x) - 0.3).square() + 0.1 * x
    torch.testing.assert_close(found, torch.autograd.grad(exact, x)[0], rtol=1e-7, atol=1e-9)


def test_who_goes_by_the_leaders_gradients_says_so():
    def one_sided(y, x):
        return (Reversed.apply(y) * x).sum() + y.square().sum()

    lead = lambda y: (y - 0.3).square().sum()
    follower = bl.Player(lambda x, y: one_sided(y, x), torch.full((2,), 0.2, dtype=D))
    game = bl.Game(x=bl.Player(lead, torch.tensor(0.7, dtype=D)), y=follower)
    for response in (NUDGED, LastStep(SGD)):
        with pytest.warns(BilevelWarning, match="for those of one function, and they are not"):
            response.init(game)
    # y = x / 2, as its own gradient 2 y - x says; nudges would say -1 / 2, for the leaders' gradient is that of -x.
    with warnings.catch_warnings():
        warnings.simplefilter("error", BilevelWarning)  # linear behind the reversal: the second derivative is right
        found = hypergradient(game, TWICE["implicit"])
    torch.testing.assert_close(found, torch.tensor(2 * 2 * (0.35 - 0.3) * 0.5, dtype=D), rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_refuse_a_jacobian_that_is_not_symmetric():
    game = game_of(lambda y: 0.05 * Rolled.apply(y).sum())
    with pytest.raises(NotSymmetricError, match=r"Implicit: the Jacobian .* is not symmetric: .*GMRES\(\)"):
        bl.Implicit(SGD).init(game)
    # The field 0.15 roll(y)^2 + e^x (y - 1/2), differentiated at its zero by Dense.
    response = bl.Implicit(SGD, steps=1000, tolerance=1e-10, linear_solver=bl.GMRES())
    x = game.initial("x")
    y, _ = response(game, {"x": x}, response.init(game))
    jacobian = x.exp() * torch.eye(3, dtype=D) + 0.3 * torch.diag(y.roll(1)) @ torch.eye(3, dtype=D).roll(1, 0)
    moved = -torch.linalg.solve(jacobian, x.exp() * (y - 0.5))
    torch.testing.assert_close(hypergradient(game, response), 2 * (y - 0.3) @ moved + 0.2 * x, rtol=1e-7, atol=1e-9)
