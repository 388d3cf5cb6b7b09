"""Dropout layers of a module are reached by name; the module is left as it is."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.game.modules import CallableVariables
from bilevel.hyper import dropout, dropout_layers, with_dropout

D = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(0.9))
        self.again = self.body[2]
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


def net():
    torch.manual_seed(0)
    return Net().double()


def called(model, training=True):
    return CallableVariables(dict(model.named_parameters()), model, training)


def test_the_layers_are_found_by_name():
    class Own(nn.Dropout):
        def forward(self, x):
            return x

    assert list(dropout_layers(net())) == ["body.2", "drop"]
    kinds = nn.Sequential(nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), Own())
    assert list(dropout_layers(kinds)) == ["0", "1", "2", "3"]


def test_the_module_is_called_with_other_rates_and_left_alone():
    model, x = net(), torch.randn(4, 5, dtype=D)
    rates = {"body.2": torch.tensor(0.3, dtype=D), "drop": torch.tensor(0.1, dtype=D)}
    torch.manual_seed(1)
    found = with_dropout(called(model), rates)(x)
    torch.manual_seed(1)
    hidden = dropout(model.body[1](model.body[0](x)), 0.3)
    torch.testing.assert_close(found, model.head(dropout(hidden, 0.1)))
    assert all("forward" not in vars(part) for part in model.modules())
    assert model.body[2].p == 0.9
    torch.manual_seed(1)
    one = with_dropout(called(model), torch.tensor(0.3, dtype=D))(x)
    torch.manual_seed(1)
    same = with_dropout(called(model), dict.fromkeys(rates, torch.tensor(0.3, dtype=D)))(x)
    torch.testing.assert_close(one, same)


def test_layers_that_are_not_named_keep_their_own_rate_and_hooks_stay():
    model, seen = net(), []
    model.drop.register_forward_hook(lambda part, inputs, output: seen.append(output))
    with_dropout(called(model), {"drop": 0.2})(torch.ones(4, 5, dtype=D))
    assert len(seen) == 1
    model.body[2].p = 0.0
    torch.manual_seed(1)
    found = with_dropout(called(model), {"drop": 0.2})(torch.ones(4, 5, dtype=D))
    torch.manual_seed(1)
    expected = model.head(dropout(model.body[1](model.body[0](torch.ones(4, 5, dtype=D))), 0.2))
    torch.testing.assert_close(found, expected)


def test_nothing_is_dropped_in_evaluation_mode():
    model, x = net(), torch.randn(4, 5, dtype=D)
    expected = model.eval()(x)
    torch.testing.assert_close(with_dropout(called(model, training=False), 0.5)(x), expected)
    torch.testing.assert_close(with_dropout(called(model), 0.5)(x, training=False), expected)
    frozen = net()
    frozen.body[2].eval()
    frozen.drop.eval()
    torch.testing.assert_close(with_dropout(called(frozen), 0.5)(x), expected)


def test_an_error_inside_leaves_the_module_as_it_was():
    model = net()
    model.drop.forward = before = model.drop.forward
    with pytest.raises(RuntimeError):
        with_dropout(called(model), 0.5)(torch.ones(4, 7, dtype=D))
    assert model.drop.forward is before and "forward" not in vars(model.body[2])


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Dropout1d, (2, 3, 4)), (nn.Dropout2d, (2, 3, 4, 4)), (nn.Dropout2d, (3, 4, 4))]
)
def test_channelwise_kinds_drop_whole_channels(kind, shape):
    model = nn.Sequential(kind(0.5))
    dims = 1 if kind is nn.Dropout1d else 2
    found = with_dropout(called(model), torch.tensor(0.4, dtype=D))(torch.ones(shape, dtype=D))
    first = found[(..., *[slice(0, 1)] * dims)]
    torch.testing.assert_close(found, first.expand(shape))
    assert first.unique().numel() == first.numel()


def test_a_hypergradient_in_rates_against_finite_differences():
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.randn(12, 5, generator=generator, dtype=D), torch.randint(3, (12,), generator=generator)

    def train(weights, rates, batch):
        return cross_entropy(with_dropout(weights, rates)(batch[0]), batch[1]) + bl.penalty(weights, 0.1)

    def valid(weights, batch):
        return cross_entropy(weights(batch[0]), batch[1])

    start = {"body.2": torch.tensor(0.3, dtype=D), "drop": torch.tensor(0.2, dtype=D)}
    game = bl.Game(
        rates=bl.Player(valid, start, data=[(x.flip(0), labels.flip(0))]),
        weights=bl.Player(train, net(), data=[(x, labels)]),
    )
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=4)
    state = response.init(game)

    def loss(one, two):
        torch.manual_seed(5)
        rates = {"body.2": one, "drop": two}
        weights, _ = response(game, {"rates": rates}, state)
        return game.loss("rates", {"weights": weights}, (x.flip(0), labels.flip(0)))

    assert torch.autograd.gradcheck(loss, [value.requires_grad_() for value in start.values()])


def test_what_cannot_be_meant_is_refused():
    model = net()
    with pytest.raises(
        ValueError, match=r"'body\.3' is no dropout layer of the module; those are \['body\.2', 'drop'\]"
    ):
        with_dropout(called(model), {"body.3": 0.1})
    with pytest.raises(ValueError, match=r"Linear has no dropout layers"):
        with_dropout(called(nn.Linear(2, 2)), 0.1)
    with pytest.raises(TypeError, match="weights is a dict; expected what a loss receives"):
        with_dropout({}, 0.1)
    with pytest.raises(ValueError, match=r"The dropout layer 'drop': dropout: the strength is 1\.2"):
        with_dropout(called(model), {"drop": 1.2})(torch.ones(4, 5, dtype=D))


def test_a_transformer_layer_and_half_precision():
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    assert list(dropout_layers(layer)) == ["dropout", "dropout1", "dropout2"]
    rate = torch.tensor(0.4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_dropout(called(layer), {"dropout": rate})(torch.randn(2, 3, 8))
    (slope,) = torch.autograd.grad(found.float().square().sum(), rate)
    assert bool(torch.isfinite(slope)) and float(slope) != 0.0
