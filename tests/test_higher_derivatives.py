"""PyTorch's second and third derivatives, held against differences of the derivative below: which are wrong in silence.

Where so many are taken, `bilevel.elementary` has other forms of what is wrong; or else docs/faq.md tells of it.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from bilevel.elementary import CHUNKED, THIRD, WEIGHT_NORM, Elementary
from bilevel.tree import leaves

F, L, S, D = functional, torch.linalg, torch.special, torch.float64


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def directional(function, point, directions):
    """The derivative of the given order along the directions, and that by differences of the one below with its error.

    Central differences at h and 2 h: Richardson's combination errs by h^4, and by rounding over h; the gap between the
    two, which is h^2, bounds the first.
    """
    weights = None

    def value(x):
        nonlocal weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = [t for t in leaves(function(x)) if t.dtype == D]
        weights = [drawn(*t.shape, seed=9 + i) for i, t in enumerate(found)] if weights is None else weights
        return sum((w * t).sum() for w, t in zip(weights, found, strict=True))

    def along(order, x, last):
        total = value(x)
        for k in range(order):
            if not total.requires_grad:
                return torch.zeros((), dtype=D)
            more = k < order - 1 or not last
            (slope,) = torch.autograd.grad(total, x, create_graph=more, materialize_grads=True)
            total = (slope * directions[k]).sum()
        return total

    order = len(directions)
    found = along(order, point.clone().requires_grad_(), True).item()
    step, ends = 5e-5, []
    for h in (2 * step, step):
        there, back = (along(order - 1, (point + s * directions[-1]).requires_grad_(), True).item() for s in (h, -h))
        ends.append((there - back) / (2 * h))
    return found, (4 * ends[1] - ends[0]) / 3, abs(ends[1] - ends[0])


def is_right(function, point, order):
    """Whether it is, to 1e-5 of its size: the differences' own error is 1e-16 / 5e-5 of the derivative below."""
    found, wanted, gap = directional(function, point, [drawn(*point.shape, seed=3 + i) for i in range(order)])
    return abs(found - wanted) <= 1e-5 * max(abs(found), abs(wanted)) + 1e-7 + 3 * gap


def symmetric(a):
    return 0.5 * (a + a.mT) + 4.0 * torch.eye(4, dtype=D)


B, LABELS = drawn(4, 3, seed=5), torch.tensor([0, 2, 1, 3])
TWO = torch.tensor(2.0, dtype=D)
POINTWISE = {
    **{
        name: getattr(torch, name)
        for name in (
            "sigmoid",
            "tanh",
            "asinh",
            "atan",
            "erf",
            "expm1",
            "sin",
            "cos",
            "sinh",
            "cosh",
            "square",
            "exp2",
            "sinc",
            "i0",
            "abs",
        )
    },
    **{
        name: getattr(S, name)
        for name in (
            "erfcx",
            "log_ndtr",
            "ndtr",
            "i0e",
            "i1",
            "i1e",
            "log1p",
            "exp2",
            "expit",
            "round",
        )
    },
    **{
        name: getattr(F, name)
        for name in (
            "softplus",
            "gelu",
            "silu",
            "mish",
            "elu",
            "celu",
            "selu",
            "hardswish",
            "hardtanh",
            "logsigmoid",
            "softsign",
            "tanhshrink",
        )
    },
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "lgamma": lambda x: torch.lgamma(x + 3.0),
    "digamma": lambda x: torch.digamma(x + 3.0),
    "polygamma": lambda x: torch.polygamma(1, x + 3.0),
    "erfinv": lambda x: torch.erfinv(x / 8.0),
    "logit": lambda x: torch.logit(0.5 + x / 8.0),
    "xlogy": lambda x: torch.xlogy(x, x.flip(0).square() + 0.1),
    "xlog1py": lambda x: S.xlog1py(x, x.flip(0).square()),
    "entr": lambda x: S.entr(x.square() + 0.1),
    "rsqrt": lambda x: (x.square() + 0.1).rsqrt(),
    "pow": lambda x: torch.pow(x.square() + 0.1, x),
    "atan2": lambda x: torch.atan2(x, x.flip(0) + 0.1),
    "hypot": lambda x: torch.hypot(x, x.flip(0) + 0.1),
    "gammainc": lambda x: S.gammainc(TWO, x.square() + 0.5),
}
MATRICES = {
    "cholesky": lambda a: L.cholesky(symmetric(a)),
    "cholesky_solve": lambda a: torch.cholesky_solve(B, L.cholesky(symmetric(a))),
    "eigvalsh": lambda a: L.eigvalsh(symmetric(a)),
    "eigh": lambda a: L.eigh(symmetric(a))[1].abs(),
    "svdvals": L.svdvals,
    "nuclear norm": lambda a: L.matrix_norm(a, "nuc"),
    "spectral norm": lambda a: L.matrix_norm(a, 2),
    "qr": lambda a: L.qr(a[:, :3])[0],
    "lu": lambda a: L.lu(a)[2],
    "lu_solve": lambda a: L.lu_solve(*L.lu_factor(a), B),
    "pinv": lambda a: L.pinv(a[:, :3]),
    "inv": L.inv,
    "det": L.det,
    "slogdet": lambda a: L.slogdet(a)[1],
    "matrix_exp": L.matrix_exp,
    "matrix_power": lambda a: L.matrix_power(a, -2),
    "solve": lambda a: L.solve(a, B),
    "solve_triangular": lambda a: L.solve_triangular(torch.tril(a), B, upper=False),
    "lstsq": lambda a: L.lstsq(a, B)[0],
    "householder": lambda a: L.householder_product(a[:, :3], B[0]),
    "eigvals": lambda a: L.eigvals(a).abs(),
    "norm, 1.5": lambda a: L.vector_norm(a, 1.5),
    "norm, by rows": lambda a: L.vector_norm(a, 2, dim=0),
    "renorm": lambda a: torch.renorm(a, 2, 0, 1.0),
    "cumprod": lambda a: torch.cumprod(a, 0),
    "prod with a zero": lambda a: torch.prod(a * torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=D), 0),
    "logsumexp": lambda a: torch.logsumexp(a, 0),
    "logaddexp": lambda a: torch.logaddexp(a, a.T),
    "softmax": lambda a: torch.softmax(a, 0),
    "var": lambda a: torch.var(a, 0),
    "std": lambda a: torch.std(a, 0),
    "corrcoef": torch.corrcoef,
    "cosine_similarity": lambda a: F.cosine_similarity(a, B[:, :1]),
    "normalize": F.normalize,
    "fft": lambda a: torch.fft.fft2(a).abs(),
    "stft": lambda a: torch.stft(a.reshape(-1), 8, return_complex=True, window=torch.ones(8, dtype=D)).abs(),
    "cross_entropy": lambda a: F.cross_entropy(a, LABELS, label_smoothing=0.1),
    "kl_div": lambda a: F.kl_div(a.log_softmax(1), a.T.softmax(1), reduction="batchmean"),
    "huber": lambda a: F.huber_loss(a, drawn(4, 4, seed=7)),
    "bce": lambda a: F.binary_cross_entropy_with_logits(a, a.T.sigmoid()),
    "poisson": lambda a: F.poisson_nll_loss(a, a.T.square(), full=False),
    "gaussian": lambda a: F.gaussian_nll_loss(a, torch.zeros(4, 4, dtype=D), a.T.square() + 0.5),
    "triplet": lambda a: F.triplet_margin_loss(a, a.roll(1, 0), a.roll(2, 0), margin=3.0),
    "multi_margin": lambda a: F.multi_margin_loss(a, LABELS, p=2),
    "dropout": lambda a: F.dropout(a.sin(), 0.4),
    "rrelu": lambda a: F.rrelu(a, training=True),
    "glu": F.glu,
    "prelu": lambda a: F.prelu(a[None], a[:, 0]),
    "attention, math": lambda a: F.scaled_dot_product_attention(a[None], a.T[None], a[None].sin()),
    "rms_norm": lambda a: F.rms_norm(a, (4,)),
    "group_norm": lambda a: F.group_norm(a, 2, a[0], a[1]),
    "local_response_norm": lambda a: F.local_response_norm(a[None], 2),
    "embedding": lambda a: F.embedding(LABELS, a).sin(),
    "embedding_bag": lambda a: F.embedding_bag(LABELS[None], a.sin(), mode="mean"),
    "conv1d": lambda a: F.conv1d(a[None], a[:, :2][:, None].sin().expand(4, 4, 2)),
    "conv2d": lambda a: F.conv2d(a[None, None], a[None, None, :2, :2].sin(), stride=2, padding=1),
    "conv_transpose2d": lambda a: F.conv_transpose2d(a[None, None], a[None, None, :2, :2].sin(), stride=2),
    "unfold": lambda a: F.unfold(a[None, None].sin(), 2),
    "avg_pool2d": lambda a: F.avg_pool2d(a[None, None].sin(), 2),
    "max_pool2d": lambda a: F.max_pool2d(a[None, None].sin(), 2),
    "adaptive_avg_pool2d": lambda a: F.adaptive_avg_pool2d(a[None, None].sin(), 3),
    "fractional_max_pool2d": lambda a: F.fractional_max_pool2d(a[None, None].sin(), 2, output_size=2),
    "lp_pool1d": lambda a: F.lp_pool1d(a.square()[None], 3.0, 2),
    "pixel_shuffle": lambda a: F.pixel_shuffle(a.reshape(1, 4, 2, 2).sin(), 2),
    **{
        f"pad, {mode}": lambda a, mode=mode: F.pad(a[None, None].sin(), (1, 1, 1, 1), mode=mode)
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    **{
        f"interpolate, {mode}": lambda a, mode=mode: F.interpolate(a[None, None].sin(), scale_factor=1.5, mode=mode)
        for mode in ("nearest", "bilinear", "bicubic", "area")
    },
    "scatter_reduce": lambda a: a.sin().scatter_reduce(0, LABELS.expand(4, 4) % 2, a.cos(), "mean"),
    "index_add": lambda a: a.sin().index_add(0, LABELS[:2], a[:2].cos()),
}


def layer(module, *arguments):
    """A layer as a function of all its parameters, and of its inputs, from one tensor."""
    module = module.to(D)
    sizes = [p.numel() for p in module.parameters()]

    def function(a):
        names = [name for name, _ in module.named_parameters()]
        flat = torch.cat([a.reshape(-1) * (1.0 + 0.1 * i) for i in range(sum(sizes) // a.numel() + 1)]).sin()
        parts = flat[: sum(sizes)].split(sizes)
        shapes = [p.shape for p in module.parameters()]
        given = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(module, given, (a[None], *[given_to(a) for given_to in arguments]))

    return function


LAYERS = {
    "RNN": layer(nn.RNN(4, 3, num_layers=2, batch_first=True)),
    "GRU": layer(nn.GRU(4, 3, bidirectional=True, batch_first=True)),
    "LSTM": layer(nn.LSTM(4, 3, proj_size=2, batch_first=True)),
    "attention": layer(nn.MultiheadAttention(4, 2, batch_first=True), lambda a: a[None], lambda a: a[None].cos()),
    "bilinear": layer(nn.Bilinear(4, 4, 2), lambda a: a[None].cos()),
}
PLACES = ((0.3, -0.7, 0.9), (2.7, -3.5))
RIGHT = {
    **{f"{name}, at {at}": (f, torch.tensor(at, dtype=D)) for name, f in POINTWISE.items() for at in PLACES},
    **{name: (f, drawn(4, 4, seed=1)) for name, f in (MATRICES | LAYERS).items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_second_and_third_derivatives_are_right_or_raise(name):
    function, point = RIGHT[name]
    for order in (2, 3):
        try:
            assert is_right(function, point, order), f"derivative {order} of {name} is wrong in silence"
        except (RuntimeError, NotImplementedError) as error:
            assert "not implemented" in str(error) or "double backward" in str(error), error


def chunked(a, reduction="mean"):
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions(batch_chunk_size=2)
    return F.linear_cross_entropy(B @ a[:3], a, LABELS, reduction=reduction, options=options)


NEW = pytest.mark.skipif(not CHUNKED, reason="this PyTorch has no linear_cross_entropy")
MENDED = {  # an operation, and the order from which on its derivatives are wrong
    "weight_norm": (lambda a: torch._weight_norm(a, a[:, :1].cos(), 0), 2, WEIGHT_NORM),
    "layer_norm": (lambda a: F.layer_norm(a, (4,)), 3, THIRD),
    "batch_norm": (lambda a: F.batch_norm(a, None, None, training=True), 3, THIRD),
    "instance_norm": (lambda a: F.instance_norm(a[None]), 3, THIRD),
    "logcumsumexp": (lambda a: torch.logcumsumexp(a, 1), 3, THIRD),
    "logcumsumexp, a method": (lambda a: a.logcumsumexp(dim=0), 3, THIRD),
    "linear_cross_entropy": (chunked, 2, CHUNKED),
    "linear_cross_entropy, none": (lambda a: chunked(a, "none"), 2, CHUNKED),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEW if name.startswith("linear") else ()) for name in MENDED]
)
def test_what_is_wrong_has_another_form_with_the_same_numbers(name):
    function, wrong_from, forms = MENDED[name]
    point = drawn(4, 4, seed=1)
    with Elementary(forms):
        replaced = function(point)
        assert all(is_right(function, point, order) for order in (1, 2, 3))
    torch.testing.assert_close(replaced, function(point))
    assert is_right(function, point, wrong_from - 1)


@pytest.mark.parametrize("entries", [0, 1, 2, 5, 8])
def test_a_sum_by_doubling_is_logcumsumexp(entries):
    given = 30.0 * drawn(3, entries, seed=2)
    with Elementary(THIRD):
        found = torch.logcumsumexp(given, -1)
    torch.testing.assert_close(found, torch.logcumsumexp(given, -1))
