"""Operations that PyTorch cannot differentiate twice: the other form is run, or the player and the operation named."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel as bl
from bilevel.elementary import THIRD, Elementary
from bilevel.errors import BilevelError, BilevelWarning, SecondDerivativeError
from bilevel.responses import ForwardMode, Segments
from bilevel.second_order import nodes

D = torch.float64
SGD = partial(torch.optim.SGD, lr=0.1)
RESPONSES = [
    bl.Unrolled(SGD, steps=3),
    bl.Unrolled(SGD, steps=3, differentiation=ForwardMode()),
    bl.Unrolled(SGD, steps=3, differentiation=Segments()),
    bl.Implicit(SGD, steps=3, tolerance=None, linear_solver=bl.linear.Dense()),
]
IDS = ["reverse", "forward", "segments", "implicit"]


def penalised(fit):
    def follow(x, y):
        return fit(y) + x.exp() * sum(leaf.square().sum() for leaf in bl.tree.leaves(y))

    return follow


def game_of(fit, init):
    lead = lambda x, y: fit(y) + 0.1 * x.square()
    return bl.Game(x=bl.Player(lead, torch.tensor(-1.0, dtype=D)), y=bl.Player(penalised(fit), init))


def hypergradient(game, response, quiet=True):
    x = game.initial("x").requires_grad_()
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", BilevelWarning)
        state = response.init(game)
        y, _ = response(game, {"x": x}, state)
        (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
    return slope


def attention():
    module = nn.MultiheadAttention(4, 2, batch_first=True).to(D)
    inputs = torch.randn(2, 3, 4, dtype=D)
    return module, lambda y: y(inputs, inputs, inputs, need_weights=False)[0].square().mean()


def within_math(fit):
    def function(y):
        with sdpa_kernel(SDPBackend.MATH):
            return fit(y)

    return function


@pytest.mark.parametrize("response", RESPONSES, ids=IDS)
def test_fused_attention_has_the_plain_kernels_derivative(response):
    module, fit = attention()
    game, plain = game_of(fit, module), game_of(within_math(fit), module)
    torch.testing.assert_close(hypergradient(game, response), hypergradient(plain, response))


@pytest.mark.parametrize("response", RESPONSES[:1] + RESPONSES[3:], ids=["unrolled", "implicit"])
def test_what_is_replaced_is_said_once(response):
    module, fit = attention()
    game = game_of(fit, module)
    with pytest.warns(BilevelWarning, match="Player 'y': .* fused attention is computed by the plain kernel") as said:
        state = response.init(game)
        _, state = response(game, {"x": game.initial("x")}, state)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response.init(game_of(within_math(fit), module))


NORMED = {
    "parametrised": lambda dim: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=dim),
    "older": lambda dim: nn.utils.weight_norm(nn.Linear(3, 2), dim=dim),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("response", RESPONSES, ids=IDS)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("form", NORMED)
def test_normed_weights_have_the_second_derivative_of_their_formula(form, dim, response):
    # PyTorch's own takes the norms for constants, and raises nothing.
    module, inputs = NORMED[form](dim).to(D), torch.randn(5, 3, dtype=D)
    named = dict(module.named_parameters())
    v, g, bias = (next(leaf for name, leaf in named.items() if name.endswith(end)) for end in (*ENDS[form], "bias"))
    names = {id(leaf): name for name, leaf in named.items()}
    order = [names[id(leaf)] for leaf in (v, g, bias)]

    def formula(y):
        v, g, bias = (y[name] for name in order)
        norm = v.norm() if dim is None else v.norm(dim=1 - dim, keepdim=True)
        return (inputs @ (v * g / norm).T + bias).sin().square().mean()

    def fit(y):
        return y(inputs).sin().square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("error", BilevelWarning)  # nothing is slower, and nothing is said
        bl.Unrolled(SGD, steps=1).init(game_of(fit, module))
    plain = {name: leaf.detach().clone() for name, leaf in named.items()}
    found = hypergradient(game_of(fit, module), response)
    torch.testing.assert_close(found, hypergradient(game_of(formula, plain), response))


ENDS = {"parametrised": ("original1", "original0"), "older": ("weight_v", "weight_g")}

CHANNELS = torch.randn(6, 3, 4, dtype=D, generator=torch.Generator().manual_seed(3))
SCALE, SHIFT = torch.tensor([0.5, 1.0, 1.5], dtype=D), torch.tensor([0.1, 0.0, -0.2], dtype=D)


def moments(h, dims):
    return (h - h.mean(dims, keepdim=True)) * (h.var(dims, correction=0, keepdim=True) + 1e-5).rsqrt()


NORMS = {  # of [6, 3, 4], beside the same in elementary operations
    "layer": (lambda h: nn.functional.layer_norm(h, (3, 4)), lambda h: moments(h, (1, 2))),
    "rms": (
        lambda h: nn.functional.rms_norm(h, (4,), eps=1e-3),
        lambda h: h * (h.square().mean(-1, keepdim=True) + 1e-3).rsqrt(),
    ),
    "batch": (
        lambda h: nn.functional.batch_norm(h, None, None, SCALE, SHIFT, training=True),
        lambda h: moments(h, (0, 2)) * SCALE[:, None] + SHIFT[:, None],
    ),
    "instance": (
        lambda h: nn.functional.instance_norm(h, weight=SCALE, bias=SHIFT),
        lambda h: moments(h, (2,)) * SCALE[:, None] + SHIFT[:, None],
    ),
    "module": (nn.BatchNorm1d(3, affine=False).to(D).train(), lambda h: moments(h, (0, 2))),
}


def normalising(norm):
    def follow(x, y):
        return (norm(CHANNELS + y).tanh() - y).square().mean() + x.exp() * (y - 0.3).square().sum()

    x, y = torch.tensor(-1.0, dtype=D), torch.linspace(-1.0, 1.0, 12, dtype=D).reshape(3, 4)
    return bl.Game(x=bl.Player(lambda y: (y - 1).square().sum() + y.sin().prod(), x), y=bl.Player(follow, y))


def second(game, response, way):
    state, x = response.init(game), game.initial("x")

    def loss(x):
        y, _ = response(game, {"x": x}, state)
        return game.loss("x", {"x": x, "y": y})

    if way == "func":
        return hessian(loss)(x)
    (slope,) = torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)
    return torch.autograd.grad(slope, x)[0]


@pytest.mark.parametrize(
    "response", [RESPONSES[0], RESPONSES[2], RESPONSES[3]], ids=["reverse", "segments", "implicit"]
)
@pytest.mark.parametrize("way", ["func", "create_graph"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_normalising_followers_hypergradient_is_differentiated_rightly_or_not_at_all(norm, way, response):
    # PyTorch's third derivative takes the moments for constants, and raises nothing.
    fused, elementary = NORMS[norm]
    if way == "create_graph" and isinstance(response, bl.Unrolled) and norm != "rms":
        with pytest.raises(SecondDerivativeError, match=r"Player 'y': .*normalises.*torch\.func.*GroupNorm"):
            second(normalising(fused), response, way)
        return
    found, right = (second(normalising(f), response, way) for f in (fused, elementary))
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(
        hypergradient(normalising(fused), response), hypergradient(normalising(elementary), response)
    )


@pytest.mark.parametrize("above", [RESPONSES[0], RESPONSES[3]], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("below", [RESPONSES[0], RESPONSES[3]], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_response_to_a_normalising_follower_sees_its_third_derivative(norm, below, above):
    def ended(f):
        def lowest(x, y, z):
            return (f(CHANNELS + z).tanh() - y).square().mean() + x.exp() * (z - 0.3).square().sum()

        game = bl.Game(
            x=bl.Player(lambda y, z: (y - 1).square().sum() + z.sum(), torch.tensor(-1.0, dtype=D)),
            y=bl.Player(lambda x, y, z: (y - x).square().sum() + (z - y).square().sum(), torch.zeros(3, 4, dtype=D)),
            z=bl.Player(lowest, torch.linspace(-1.0, 1.0, 12, dtype=D).reshape(3, 4)),
        )
        return bl.solve(game, optimizer=SGD, steps=1, y=above, z=below).variables["x"]

    fused, elementary = NORMS[norm]
    torch.testing.assert_close(ended(fused), ended(elementary))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
def test_elementary_normalisation_moves_running_statistics_as_torch_does(kind, momentum, dtype):
    momentum = 0.3 if momentum is None and kind is nn.InstanceNorm1d else momentum  # which knows no cumulative mean
    layers = [kind(3, momentum=momentum, affine=True, track_running_stats=True).to(dtype) for _ in range(2)]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
    for training in (True, True, False):
        plain, replaced = (layer.train(training) for layer in layers)
        with Elementary(THIRD):
            found = replaced(CHANNELS.to(dtype))
        torch.testing.assert_close(found, plain(CHANNELS.to(dtype)), **tolerance)
        torch.testing.assert_close(dict(replaced.named_buffers()), dict(plain.named_buffers()), **tolerance)


COMPILED = {
    "module": lambda net, inputs: (torch.compile(net, backend="aot_eager"), lambda y: y(inputs).square().mean()),
    "in place": lambda net, inputs: (net.compile(backend="aot_eager") or net, lambda y: y(inputs).square().mean()),
    "function": lambda net, inputs: (
        torch.randn(3, dtype=D),
        torch.compile(lambda y: torch.tanh(inputs @ y).square().mean(), backend="aot_eager"),
    ),
}


@pytest.mark.parametrize("response", RESPONSES[:1] + RESPONSES[2:], ids=["reverse", "segments", "implicit"])
@pytest.mark.parametrize("form", COMPILED)
def test_what_is_compiled_has_the_originals_derivative(form, response):
    torch.compiler.reset()  # after some recompilations of one function PyTorch runs it uncompiled
    net, inputs = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).to(D), torch.randn(5, 3, dtype=D)
    init, fit = COMPILED[form](net, inputs)
    game = game_of(fit, init)

    def plain(y):
        with torch.compiler.set_stance("force_eager"):
            return fit(y)

    found, wanted = hypergradient(game, response), hypergradient(game_of(plain, init), response)
    torch.testing.assert_close(found, wanted)
    with pytest.warns(BilevelWarning, match="what torch.compile made runs uncompiled"):
        hypergradient(game, response, quiet=False)
    if form == "in place" or (form == "module" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)):
        return  # PyTorch may run it uncompiled at first
    # The leader's loss needs one derivative, and stays compiled.
    loss = game.loss("x", {n: bl.tree.map_leaves(lambda t: t.requires_grad_(), game.initial(n)) for n in game.names})
    assert any(node.name().startswith("CompiledFunction") for node in nodes([loss]))


def test_rules_of_play_differentiate_twice_too():
    inputs = torch.randn(5, 2, dtype=D)
    fit = torch.compile(lambda x, y: torch.tanh(inputs @ (x * y)).square().mean(), backend="aot_eager")

    def made(fit):
        return bl.Game(
            x=bl.Player(lambda x, y: fit(x, y) + x.square().sum(), torch.ones(2, dtype=D)),
            y=bl.Player(lambda x, y: y.square().sum() - fit(x, y), torch.ones(2, dtype=D)),
        )

    plain = lambda x, y: torch.tanh(inputs @ (x * y)).square().mean()
    rules = [bl.dynamics.LOLA(0.1), bl.dynamics.SymplecticAdjustment(), bl.dynamics.LookAhead(0.1)]
    for rule in rules:
        options = {"dynamics": rule, "optimizer": SGD, "steps": 2, "progress": False}
        found, wanted = (bl.solve(made(f), **options).variables for f in (fit, plain))
        for name in "xy":
            torch.testing.assert_close(found[name], wanted[name])


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class OnceCube(Cube):
    backward = staticmethod(once_differentiable(Cube.backward))


class DetachedCube(Cube):
    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():
            return 3 * ctx.saved_tensors[0] ** 2 * g


class OffGraph(Cube):
    """Its backward raises where a graph is kept, and returns numbers where none is."""

    @staticmethod
    def backward(ctx, g):
        return torch.mul(3 * ctx.saved_tensors[0] ** 2, g, out=torch.empty_like(g))


class Rounded(torch.autograd.Function):
    """A straight-through estimator: its gradient has a graph, and the derivative that its author means."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class Added(torch.autograd.Function):
    """The idiom that adds a loss to a result: its backward gives it a constant, whatever comes."""

    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, torch.ones((), dtype=g.dtype)


def chunked(reduction):
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options").LinearCrossEntropyOptions
    inputs, labels = torch.linspace(-1.0, 1.0, 18, dtype=D).reshape(6, 3), torch.tensor([0, 2, 1, 3, 0, 1])

    def fit(options, y):
        return nn.functional.linear_cross_entropy(inputs, y, labels, reduction=reduction, options=options).mean()

    return partial(fit, options(batch_chunk_size=2)), partial(fit, None)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("response", RESPONSES, ids=IDS)
def test_cross_entropy_in_chunks_is_differentiated_whole(response, reduction):
    # PyTorch's gradient of it has no graph: by 18 % wrong after five unrolled steps, by 75 % at an optimum, in silence.
    games = [game_of(fit, torch.zeros(4, 3, dtype=D)) for fit in chunked(reduction)]
    with pytest.warns(BilevelWarning, match=r"Player 'y': .*linear_cross_entropy has all its logits at once"):
        response.init(games[0])
    found, right = (hypergradient(game, response) for game in games)
    torch.testing.assert_close(found, right)


def test_a_sum_in_logarithms_is_differentiated_rightly_or_not_at_all():
    """torch.logcumsumexp's third derivative is wrong or NaN: log_softmax's of each beginning is not."""

    def by_hand(y):
        return torch.stack([y[: i + 1].logsumexp(0) for i in range(len(y))])

    def sums(form):
        def fit(y):
            return (form(y).sin() - 0.2).square().sum() + 0.5 * y.square().sum()

        start = torch.linspace(-1.0, 1.0, 4, dtype=D)
        return bl.Game(
            x=bl.Player(lambda y: (y - 1).square().sum() + y.sin().prod(), torch.tensor(-1.0, dtype=D)),
            y=bl.Player(penalised(fit), start),
        )

    fused, elementary = sums(lambda y: torch.logcumsumexp(y, 0)), sums(by_hand)
    for response in (RESPONSES[0], RESPONSES[3]):
        torch.testing.assert_close(second(fused, response, "func"), second(elementary, response, "func"))
    torch.testing.assert_close(second(fused, RESPONSES[3], "create_graph"), second(elementary, RESPONSES[3], "func"))
    with pytest.raises(SecondDerivativeError, match=r"Player 'y': .*logcumsumexp.*torch\.func"):
        second(fused, RESPONSES[0], "create_graph")


START = torch.tensor(1.0, dtype=D)


@pytest.mark.parametrize("response", RESPONSES, ids=IDS)
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (OnceCube, "autograd function OnceCube is marked @once_differentiable"),
        (OffGraph, "the backward of the autograd function OffGraph returns numbers without a graph"),
        (DetachedCube, "the backward of the autograd function DetachedCube returns numbers without a graph"),
    ],
)
def test_an_autograd_function_without_second_derivative_is_named(function, told, response):
    game = game_of(lambda y: (function.apply(y) - 1.0).square(), START)
    with pytest.raises(SecondDerivativeError, match=f"Player 'y': {told}"):
        response.init(game)


@pytest.mark.parametrize("response", RESPONSES, ids=IDS)
def test_the_ways_out_of_an_autograd_function_work(response):
    written = game_of(lambda y: (Cube.apply(y) - 1.0).square(), START)
    plain = game_of(lambda y: (y**3 - 1.0).square(), START)
    torch.testing.assert_close(hypergradient(written, response), hypergradient(plain, response))


def test_functions_that_mean_what_they_return_are_taken():
    rounded = game_of(lambda y: (Rounded.apply(y) - 0.3 * y).square(), START)
    added = game_of(lambda y: Added.apply((y - 0.3).square(), y.square()), START)
    wanted = game_of(lambda y: (y - 0.3).square() + y.square(), START)
    response = RESPONSES[0]
    assert torch.isfinite(hypergradient(rounded, response))
    lead = lambda x, y: (y - 0.3).square() + 0.1 * x.square()
    found, right = (
        hypergradient(bl.Game(x=bl.Player(lead, START), y=bl.Player(penalised(fit), START)), response)
        for fit in (
            lambda y: Added.apply((y - 0.3).square(), y.square()),
            lambda y: (y - 0.3).square() + y.square(),
        )
    )
    assert added.names == wanted.names
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("response", RESPONSES, ids=IDS)
def test_an_operation_of_torchs_without_second_derivative_is_named(response):
    points, start = torch.rand(3, 2, dtype=D), torch.rand(4, 2, dtype=D)
    game = game_of(lambda y: torch.cdist(y, points).square().sum(), start)
    with pytest.raises(SecondDerivativeError, match="Player 'y': PyTorch has no second derivative of cdist"):
        response.init(game)
    # Both ways out: elementary operations, and first derivatives alone.
    written = game_of(lambda y: (y[:, None] - points).square().sum(), start)
    assert torch.isfinite(hypergradient(written, response))
    learned = bl.Hypernetwork(SGD, steps=1, tolerance=None)
    learned(game, {"x": game.initial("x")}, learned.init(game))


def critic_loss(real):
    def loss(x, y):
        mixed = (real + 0.5 * x).detach().requires_grad_()
        (slope,) = torch.autograd.grad(y(mixed).sum(), mixed, create_graph=True)
        decay = sum(leaf.square().sum() for leaf in y.values())
        return y(real + x).mean() - y(real).mean() + (slope.norm(dim=1) - 1.0).square().mean() + decay

    return loss


def test_a_gradient_penalty_by_autograd_inside_a_loss():
    torch.manual_seed(1)
    critic, real = nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 1)).to(D), torch.randn(6, 2, dtype=D)

    def by_func(x, y):
        one = lambda point: y(point).sum()
        slope = grad(one)((real + 0.5 * x).detach())
        decay = sum(leaf.square().sum() for leaf in y.values())
        return y(real + x).mean() - y(real).mean() + (slope.norm(dim=1) - 1.0).square().mean() + decay

    lead = lambda x, y: -y(real + x).mean()
    start = torch.full((2,), 0.1, dtype=D)
    game, other = (
        bl.Game(x=bl.Player(lead, start), y=bl.Player(loss, critic)) for loss in (critic_loss(real), by_func)
    )
    for response in RESPONSES:
        watched = isinstance(getattr(response, "differentiation", None), Segments | ForwardMode)
        wanted = hypergradient(other, RESPONSES[0] if watched else response)
        torch.testing.assert_close(hypergradient(game, response), wanted)
        if watched:
            with pytest.raises(BilevelError, match=r"Player 'y': its loss uses torch.func.*torch.autograd.grad"):
                hypergradient(other, response)
    steps = bl.Unrolled(SGD, steps=2, warm_start=False)
    state = steps.init(game)

    def value(game, x):
        return game.loss("x", {"x": x, "y": steps(game, {"x": x}, state)[0]})

    with pytest.raises(BilevelError, match=r"Player 'y': its loss takes a gradient by torch.autograd.grad.*func.grad"):
        grad(partial(value, game))(start)
    x = start.clone().requires_grad_()
    torch.testing.assert_close(grad(partial(value, other))(start), torch.autograd.grad(value(game, x), x)[0])


# What is refused when the game is made --------------------------------------------------------------------------


def test_a_sparse_embedding_is_refused_and_a_dense_one_serves():
    places = torch.tensor([0, 1, 1, 3])
    lead = lambda x, y: y(places).square().mean() + 0.0 * x
    follow = lambda x, y: (y(places) - x).square().mean() + 0.1 * y["weight"].square().sum()
    start = torch.tensor(0.5)
    with pytest.raises(TypeError, match="Player 'x': the gradient of its loss .* 'y'\\['weight'\\] is sparse"):
        bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, nn.Embedding(5, 2, sparse=True)))
    bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, nn.Embedding(5, 2, sparse=False)))


def test_complex_numbers_are_refused_and_both_ways_out_work():
    start = torch.tensor([1.0 + 2.0j, -1.0j])
    with pytest.raises(TypeError, match="complex .*torch.view_as_real.*torch.view_as_complex"):
        bl.Game(y=bl.Player(lambda y: y.abs().square().sum(), start))
    game = bl.Game(y=bl.Player(lambda y: torch.view_as_complex(y).abs().square().sum(), torch.view_as_real(start)))
    assert game.loss("y", {"y": game.initial("y")}) == 6.0
    with pytest.raises(TypeError, match="its objective returned a complex number .*Take .real"):
        bl.Game(y=bl.Player(lambda y: (y + 1j).square(), torch.tensor(1.0)))
    for real in (lambda z: z.real, lambda z: z.abs().square()):
        bl.Game(y=bl.Player(lambda y, real=real: real((y + 1j).square()), torch.tensor(1.0)))


def test_inference_mode_is_refused_and_no_grad_serves():
    fit = lambda y: (y - 1.0).square()
    with torch.inference_mode(), pytest.raises(ValueError, match="inside torch.inference_mode"):
        game_of(fit, START)
    game = game_of(fit, START)
    for response in RESPONSES:
        state = response.init(game)
        with torch.inference_mode(), pytest.raises(BilevelError, match=r"Use torch.no_grad\(\)"):
            response(game, {"x": game.initial("x")}, state)
        with torch.no_grad():
            response(game, {"x": game.initial("x")}, state)


def test_a_module_as_objective():
    class Loss(nn.Module):
        def forward(self, x, y):
            return (y - x).square().sum()

    start = torch.ones(2, dtype=D)
    lead = lambda x, y: y.square().sum() + 0.0 * x.sum()
    games = [
        bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, start))
        for follow in (Loss(), lambda x, y: (y - x).square().sum())
    ]
    found, wanted = (hypergradient(game, RESPONSES[0]) for game in games)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="its objective has a parameter 'input', which names no player"):
        bl.Game(y=bl.Player(nn.MSELoss(), start))


# Derivatives by every door of PyTorch's -------------------------------------------------------------------------

M = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.5, -0.2], [0.1, -0.2, 1.8]], dtype=D)
N = torch.tensor([[0.5, -1.0, 0.3], [0.2, 0.4, -0.6], [0.7, 0.1, 0.9]], dtype=D)


def smooth_game():
    def follow(x, y):
        return 0.5 * y @ M @ y + y @ N @ x + 0.1 * (y**4).sum() * x.square().sum()

    lead = lambda x, y: (y**3).sum() + x.square().sum()
    return bl.Game(
        x=bl.Player(lead, torch.tensor([0.3, -0.5, 0.4], dtype=D)), y=bl.Player(follow, torch.zeros(3, dtype=D))
    )


EXACT = bl.Implicit(bl.inner.Scipy("L-BFGS-B"), tolerance=1e-7, linear_solver=bl.linear.Dense(rtol=1e-10))
BY_STEPS = bl.Unrolled(SGD, steps=4, warm_start=False)


@pytest.mark.parametrize("response", [EXACT, BY_STEPS], ids=["implicit", "unrolled"])
def test_every_way_to_a_jacobian_and_a_hessian_agrees(response):
    game = smooth_game()
    state, x = response.init(game), game.initial("x")
    answer = lambda x: response(game, {"x": x}, state)[0]
    value = lambda x: (answer(x) ** 3).sum() + x.square().sum()
    leaf = x.clone().requires_grad_()
    y = answer(leaf)
    wanted = torch.stack([torch.autograd.grad(y, leaf, row, retain_graph=True)[0] for row in torch.eye(3, dtype=D)])
    (batched,) = torch.autograd.grad(y, leaf, torch.eye(3, dtype=D), is_grads_batched=True)
    vectorised = torch.autograd.functional.jacobian(answer, x, vectorize=True)
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    # The inner solve stops within 1e-7 of the start's gradient; the ways differ by rounding alone, as all start there.
    for found in (batched, vectorised, jacrev(answer)(x), jacfwd(answer)(x)):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(jvp(answer, (x,), (direction,))[1], wanted @ direction)
    second = torch.autograd.functional.hessian(value, x)
    for found in (hessian(value)(x), jacrev(jacrev(value))(x), jacfwd(jacfwd(value))(x), jacrev(jacfwd(value))(x)):
        torch.testing.assert_close(found, second)


@pytest.mark.parametrize("symmetric", [True, False])
def test_forward_mode_through_a_root(symmetric):
    matrix = M if symmetric else M + torch.tensor([[0.0, 0.4, 0.0], [-0.4, 0.0, 0.3], [0.0, -0.3, 0.0]], dtype=D)
    x = torch.tensor([0.5, -1.0, 0.8], dtype=D, requires_grad=True)

    def answer(x):
        y = torch.linalg.solve(matrix, x.detach().sin())
        return bl.root(lambda y, x: matrix @ y - x.sin(), y, x, symmetric=symmetric)

    assert torch.autograd.gradcheck(answer, x, check_forward_ad=True, check_batched_grad=True)
    wanted = torch.linalg.inv(matrix) @ torch.diag(x.detach().cos())
    torch.testing.assert_close(jacfwd(answer)(x.detach()), wanted)


@pytest.mark.parametrize("response", [EXACT, BY_STEPS, bl.Unrolled(partial(torch.optim.Adam, lr=0.1), steps=3)])
def test_tasks_by_vmap_with_a_shared_leader(response):
    inputs, targets = torch.randn(4, 6, 3, dtype=D), torch.randn(4, 6, dtype=D)
    kinds = torch.arange(4)

    def lead(theta, delta, batch):
        return (batch[0] @ (theta + delta) - batch[1]).square().mean() + 0.1 * batch[2] * theta.sum()

    def follow(theta, delta, batch):
        return (
            (batch[0] @ (theta + delta) - batch[1]).square().mean() + delta.square().sum() + (delta[0] * (batch[2] % 3))
        )

    data = [(inputs[0], targets[0], kinds[0])]
    game = bl.Game(
        theta=bl.Player(lead, torch.tensor([0.3, -0.5, 0.4], dtype=D), data=data),
        delta=bl.Player(follow, torch.zeros(3, dtype=D), data=data),
    )
    state, theta = response.init(game), game.initial("theta")

    def task(theta, *batch):
        delta, _ = response(game, {"theta": theta}, state, batch)
        return lead(theta, delta, batch)

    batches = (inputs, targets, kinds)
    wanted = grad(lambda t: torch.stack([task(t, *batch) for batch in zip(*batches, strict=True)]).mean())(theta)
    shared = vmap(task, in_dims=(None, 0, 0, 0))
    leaf = theta.clone().requires_grad_()
    torch.testing.assert_close(grad(lambda t: shared(t, *batches).mean())(theta), wanted)
    torch.testing.assert_close(grad(lambda t: vmap(task)(t.expand(4, 3), *batches).mean())(theta), wanted)
    torch.testing.assert_close(torch.autograd.grad(shared(leaf, *batches).mean(), leaf)[0], wanted)


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm1d(2), torch.nn.InstanceNorm1d(2, track_running_stats=True)])
def test_elementary_layers_refuse_a_single_value_as_pytorchs_do(layer):
    alone = torch.ones(1, 2, 1) if isinstance(layer, torch.nn.InstanceNorm1d) else torch.ones(1, 2)
    with pytest.raises(ValueError, match="Expected more than 1"):
        layer(alone)
    with Elementary(THIRD), pytest.raises(ValueError, match="Expected more than 1"):
        layer(alone)
