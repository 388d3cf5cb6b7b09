"""Each declaration against the same loss written by hand; all of them in one game against finite differences."""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import bilevel as bl
from bilevel import hyper
from bilevel.game.modules import CallableVariables
from bilevel.tree import leaves, map_leaves, named_leaves

D = torch.float64


def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout2d(0.0), nn.Flatten(), nn.Linear(2 * 4 * 3, 3), nn.Dropout(0.2)
    return nn.Sequential(*layers).double()


def batch(seed=0, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 6, 5, generator=generator, dtype=D), torch.randint(3, (rows,), generator=generator)


def plain(weights, batch):
    images, labels = batch
    return cross_entropy(weights(images), labels)


def called(network):
    return CallableVariables(dict(network.named_parameters()), network, training=True)


def value(tree):
    """What a declaration starts as, as tensors."""
    return map_leaves(lambda leaf: leaf.tensor() if isinstance(leaf, bl.constraints.Coordinate) else leaf, tree)


BY_HAND = {
    "decay": (hyper.WeightDecay(), lambda w, b, s: plain(w, b) + bl.penalty(w, s)),
    "decay by layer": (hyper.WeightDecay(per="layer"), lambda w, b, s: plain(w, b) + bl.penalty(w, s)),
    "decay by parameter": (
        hyper.WeightDecay(per="parameter", of=["*.weight"]),
        lambda w, b, s: plain(w, b) + sum(0.5 * s[n] * w[n].square().sum() for n in ("0.weight", "4.weight")),
    ),
    "decay of some": (
        hyper.WeightDecay(of=["4.*"]),
        lambda w, b, s: plain(w, b) + 0.5 * s * sum(w[n].square().sum() for n in ("4.weight", "4.bias")),
    ),
    "decay by weight": (
        hyper.WeightDecay(per="weight"),
        lambda w, b, s: plain(w, b) + sum((0.5 * s[n] * w[n].square()).sum() for n in w),
    ),
    "l1": (hyper.L1Penalty(), lambda w, b, s: plain(w, b) + s * sum(v.abs().sum() for v in w.values())),
    "dropout": (hyper.Dropout(), lambda w, b, s: plain(hyper.with_dropout(w, s), b)),
    "one dropout": (hyper.Dropout(per="all"), lambda w, b, s: plain(hyper.with_dropout(w, s), b)),
    "dropout of some": (hyper.Dropout(of=["5"]), lambda w, b, s: plain(hyper.with_dropout(w, {"5": s["5"]}), b)),
    "gaussian": (hyper.Dropout(gaussian=True), lambda w, b, s: plain(hyper.with_dropout(w, s, gaussian=True), b)),
    "smoothing": (hyper.LabelSmoothing(), lambda w, b, s: hyper.cross_entropy(w(b[0]), b[1], smoothing=s)),
    "focusing": (hyper.Focusing(), lambda w, b, s: hyper.cross_entropy(w(b[0]), b[1], focusing=s)),
    "temperature": (hyper.Temperature(), lambda w, b, s: hyper.cross_entropy(w(b[0]), b[1], temperature=s)),
    "class weights": (hyper.ClassWeights(3), lambda w, b, s: hyper.cross_entropy(w(b[0]), b[1], class_weights=s)),
    "cutout": (hyper.Cutout(), lambda w, b, s: plain(w, (hyper.cutout(b[0], s), b[1]))),
    "noise": (hyper.Noise(), lambda w, b, s: plain(w, (hyper.noise(b[0], s), b[1]))),
    "shift": (hyper.Shift(), lambda w, b, s: plain(w, (hyper.affine(b[0], shift=s), b[1]))),
    "rotation": (hyper.Rotation(), lambda w, b, s: plain(w, (hyper.affine(b[0], rotation=s), b[1]))),
    "zoom": (hyper.Zoom(), lambda w, b, s: plain(w, (hyper.affine(b[0], zoom=s), b[1]))),
    "brightness": (hyper.Brightness(), lambda w, b, s: plain(w, (hyper.brightness(b[0], s), b[1]))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_it_is_the_loss_written_by_hand_with_the_same_hypergradient(name):
    declared, by_hand = BY_HAND[name]
    network = model()
    start = map_leaves(lambda t: t.requires_grad_(), value(declared.init(network)))
    slopes = []
    for loss in (declared.changed(plain, start), lambda w, b: by_hand(w, b, start)):
        torch.manual_seed(1)
        found = loss(called(network), batch())
        (bend,) = torch.autograd.grad(found, network[4].weight, create_graph=True)
        slopes.append([found, bend, *torch.autograd.grad(bend.square().sum() + found, leaves(start))])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-12)
    # A channel's rate of .05 may drop nothing in one batch; every other strength moves the loss.
    assert all(float(slope.abs().sum()) > 0.0 for slope in slopes[0][2:])


def test_mixup_mixes_labels_that_are_indices_in_the_criterion():
    network, s = model(), torch.tensor(0.8, dtype=D, requires_grad=True)
    found = []
    for loss in (hyper.Mixup().changed(plain, s), None):
        torch.manual_seed(1)
        weights, (images, labels) = called(network), batch()
        if loss is None:
            mixed = hyper.mixup(images, s)
            found.append(mixed.loss(cross_entropy, weights(mixed.inputs), labels))
        else:
            found.append(loss(weights, (images, labels)))
    torch.testing.assert_close(found[0], found[1])


def test_mixup_mixes_labels_that_are_numbers_in_the_batch():
    network, s = nn.Linear(4, 1).double(), torch.tensor(0.8, dtype=D)
    inputs, targets = torch.randn(6, 4, dtype=D), torch.randn(6, 1, dtype=D)
    torch.manual_seed(1)
    found = hyper.Mixup().changed(lambda w, b: mse_loss(w(b[0]), b[1]), s)(called(network), [inputs, targets])
    torch.manual_seed(1)
    mixed = hyper.mixup(inputs, s)
    both = (1 - mixed.share) * targets + mixed.share * targets[mixed.order]
    torch.testing.assert_close(found, mse_loss(network(mixed.inputs), both))


def test_inputs_are_found_in_batches_of_any_form():
    s = torch.tensor(0.5, dtype=D)
    images, labels = batch()
    seen = []
    loss = lambda w, b: seen.append(b) or torch.tensor(0.0)
    pair = namedtuple("pair", "images labels")
    torch.manual_seed(0)
    expected = hyper.noise(images, s)
    for kept, place in (
        ((images, labels), 0),
        ([images, labels], 0),
        (pair(images, labels), 0),
        ({"images": images, "labels": labels}, "images"),
    ):
        torch.manual_seed(0)
        hyper.Noise(inputs=place).changed(loss, s)(None, kept)
        assert type(seen[-1]) is type(kept) and torch.equal(seen[-1][place], expected)
        assert kept[place] is images
    with pytest.raises(ValueError, match=r"Noise looks for a tensor at 0 of .* batch, which is a dict of \['images'\]"):
        hyper.Noise().changed(loss, s)(None, {"images": images})
    with pytest.raises(ValueError, match=r"Cutout looks for a tensor at 0 .*, which is None"):
        hyper.Cutout().changed(loss, s)(None, None)


def test_where_declarations_start():
    network = model()
    rates = value(hyper.Dropout().init(network))
    # A layer's own rate, or .05 where that is 0 and would have no derivative.
    assert {name: round(float(rate), 6) for name, rate in rates.items()} == {"2": 0.05, "5": 0.2}
    assert float(value(hyper.Dropout(per="all").init(network))) == pytest.approx(0.125)
    given = hyper.Dropout(within=bl.Unit(0.0, 0.5, start=0.3)).init(network)
    assert {float(rate) for rate in value(given).values()} == {0.3}
    assert list(hyper.WeightDecay(per="layer").init(network)) == ["0", "4"]
    shapes = {name: tuple(leaf.shape) for name, leaf in value(hyper.WeightDecay(per="weight").init(network)).items()}
    assert shapes == {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert all(leaf.dtype == D for leaf in leaves(value(hyper.WeightDecay(per="weight").init(network))))
    network[0].requires_grad_(False)
    assert list(hyper.WeightDecay(per="parameter").init(network)) == ["4.weight", "4.bias"]


ALL = (
    hyper.WeightDecay(per="layer"),
    hyper.Dropout(),
    hyper.LabelSmoothing(),
    hyper.Focusing(),
    hyper.Temperature(),
    hyper.ClassWeights(3),
    hyper.Mixup(),
    hyper.Cutout(),
    hyper.Noise(),
    hyper.Shift(),
    hyper.Rotation(),
    hyper.Zoom(),
    hyper.Brightness(),
)


def directional(tuning, response, seed=5):
    """The hypergradient along a random direction, and the same by central differences of the whole response."""
    game, data = tuning.game(), batch(1)
    state = response.init(game)
    start = game.initial("hyper")
    torch.manual_seed(2)
    direction = map_leaves(lambda t: t * torch.randn_like(t), start)  # in units of each strength

    def loss(point):
        torch.manual_seed(seed)
        weights, _ = response(game, {"hyper": point}, state)
        return game.loss("hyper", {"weights": weights}, data)

    point = map_leaves(lambda t: t.clone().requires_grad_(), start)
    slopes = torch.autograd.grad(loss(point), leaves(point))
    slope = sum((a * b).sum() for a, b in zip(slopes, leaves(direction)))

    def at(step):
        with torch.no_grad():
            return loss(map_leaves(lambda t, d: t + step * d, start, direction)).item()

    found = bl.testing.finite_differences.slope_at_zero(at, at(0.0), step=1e-3, noise=1e-14, goal=1e-9)
    return slope.item(), found


def test_all_of_them_at_once_against_finite_differences():
    tuning = hyper.Tuning(model(), plain, plain, [batch()], [batch(1)], hyper=ALL)
    slope, found = directional(tuning, bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3))
    # Images are sampled with kinks, and some lie within the step: what differences can tell is their own error.
    assert abs(slope - found.value) <= max(10 * found.error, 1e-6 * abs(found.value)) and abs(slope) > 1e-3


@pytest.mark.parametrize("response", [
    bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3, differentiation=bl.Segments(2)),
    bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3, differentiation=bl.ForwardMode()),
], ids=["segments", "forward"])  # fmt: skip
def test_every_way_to_differentiate_steps_gives_the_same(response):
    tuning = hyper.Tuning(model(), plain, plain, [batch()], [batch(1)], hyper=ALL)
    found = []
    for each in (bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3), response):
        game = tuning.game()
        point = map_leaves(lambda t: t.requires_grad_(), game.initial("hyper"))
        torch.manual_seed(5)
        weights, _ = each(game, {"hyper": point}, each.init(game))
        found.append(torch.autograd.grad(game.loss("hyper", {"weights": weights}, batch(1)), leaves(point)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_a_declaration_of_ones_own():
    @dataclass(frozen=True)
    class Scale(hyper.Declaration):
        name = "scale"

        def init(self, model):
            return bl.Positive(torch.tensor(2.0, dtype=D))

        def changed(self, loss, strength):
            return lambda weights, batch: strength * loss(weights, batch)

    tuning = hyper.Tuning(model(), plain, plain, [batch()], [batch(1)], hyper=[Scale()])
    slope, found = directional(tuning, bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3))
    assert slope == pytest.approx(found.value, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hyper.WeightDecay(per="tensor"), ValueError, "per='tensor'; expected one of \\['all', 'layer'"),
        (lambda: hyper.WeightDecay(of="fc"), TypeError, "of='fc'; expected a list of names"),
        (lambda: hyper.WeightDecay(within=0.1), TypeError, "within is a float; expected a range"),
        (lambda: hyper.WeightDecay(of=["fc*"]).init(model()), ValueError, r"'fc\*' matches none of \['0\.weight'"),
        (lambda: hyper.Dropout(per="channel"), ValueError, "expected 'all' or 'layer'"),
        (
            lambda: hyper.Dropout(of=["drop"]).init(model()),
            ValueError,
            r"dropout layers: 'drop' matches none of \['2', '5'\]",
        ),
        (lambda: hyper.Dropout().init(nn.Sequential(nn.Linear(2, 2))), ValueError, r"no dropout layers .*'0: Linear'"),
        (
            lambda: hyper.Dropout(within=bl.Unit(0.0, 0.1)).init(model()),
            ValueError,
            "rate of layer '5' has no place in its range",
        ),
        (lambda: hyper.ClassWeights(1), ValueError, "classes=1; expected a number of at least 2"),
        (lambda: hyper.LabelSmoothing(within=0.1), TypeError, "LabelSmoothing: within is a float"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_paths_name_every_number():
    game = hyper.Tuning(model(), plain, plain, [batch()], [batch(1)], hyper=ALL[:3]).game()
    assert [path for path, _ in named_leaves(game.initial("hyper"))] == [
        "['weight_decay']['0']", "['weight_decay']['4']", "['dropout']['2']", "['dropout']['5']", "['label_smoothing']",
    ]  # fmt: skip
