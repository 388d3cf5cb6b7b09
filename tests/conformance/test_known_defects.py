"""What other implementations got wrong, once each. Those of conjugate gradients are in tests/linear."""

from functools import partial

import pytest
import torch
from torch import optim
from torch.func import grad, vmap

import bilevel as bl

D = torch.float64
RESPONSES = {
    "unrolled": bl.Unrolled(partial(optim.SGD, lr=0.25), steps=60),
    "implicit": bl.Implicit(partial(optim.SGD, lr=0.25), steps=60, tolerance=1e-11),
}


def lead(x, y):
    return (y - 1) ** 2 + 0.1 * x


def follow(x, y):
    return (y - x.sin()) ** 2


def value(response, x):
    start = torch.tensor(0.0, dtype=D)
    game = bl.Game(x=bl.Player(lead, start + 0.3), y=bl.Player(follow, start))
    y, _ = response(game, {"x": x}, response.init(game))
    return lead(x, y)


def exact(x):
    return lead(x, x.sin())


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
def test_scalar_variables_get_their_whole_gradient(response):
    """Not 0, and not the direct term 0.1 alone: the implicit term is not dropped."""
    x = torch.tensor(0.7, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(value(response, x), x)
    torch.testing.assert_close(slope, grad(exact)(x.detach()))


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
def test_second_derivatives_are_right(response):
    x = torch.tensor(0.7, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(value(response, x), x, create_graph=True)
    (second,) = torch.autograd.grad(slope, x)
    torch.testing.assert_close(second, grad(grad(exact))(x.detach()))


def test_maximize_climbs():
    game = bl.Game(
        x=bl.Player(lambda y: y, torch.tensor(2.0, dtype=D)),
        y=bl.Player(lambda x, y: -((y - x) ** 2), torch.tensor(0.0, dtype=D)),
    )
    x = torch.tensor(2.0, dtype=D, requires_grad=True)
    response = bl.Unrolled(partial(optim.SGD, lr=0.25, maximize=True), steps=1)
    y, _ = response(game, {"x": x}, response.init(game))
    assert y.item() == 1.0  # half-way up; minimising goes to -1
    assert torch.autograd.grad(y, x)[0].item() == 0.5


def test_transforms_over_an_implicit_layer():
    response = bl.Implicit(bl.ClosedForm(lambda x: x.sin()), tolerance=1e-11)
    start = torch.tensor(0.0, dtype=D)
    game = bl.Game(x=bl.Player(lead, start + 0.3), y=bl.Player(follow, start))
    state = response.init(game)
    rows = torch.linspace(-1, 1, 5, dtype=D)
    found = vmap(grad(lambda x: lead(x, response(game, {"x": x}, state)[0])))(rows)
    torch.testing.assert_close(found, vmap(grad(exact))(rows))
