"""Penalties against their definitions, torch's weight decay, and finite differences."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import bilevel as bl
from bilevel.hyper import elastic_net, l1_penalty

D = torch.float64


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "0.weight": torch.randn(3, 2, generator=generator, dtype=D),
        "0.bias": torch.randn(3, generator=generator, dtype=D),
        "2.weight": torch.randn(1, 3, generator=generator, dtype=D),
    }


def halves(w):
    return {name: 0.5 * value.square().sum() for name, value in w.items()}


def test_one_number_for_all():
    w = weights()
    expected = 0.3 * sum(halves(w).values())
    torch.testing.assert_close(bl.penalty(w, 0.3), expected)
    torch.testing.assert_close(bl.penalty(w, torch.tensor(0.3, dtype=D)), expected)
    torch.testing.assert_close(bl.penalty(list(w.values()), 0.3), expected)


def test_it_is_the_weight_decay_of_torch():
    w = weights()["0.weight"].requires_grad_()
    (by_loss,) = torch.autograd.grad(bl.penalty(w, 0.3), w)
    stepped = nn.Parameter(w.detach().clone())
    stepped.grad = torch.zeros_like(stepped)
    torch.optim.SGD([stepped], lr=1.0, weight_decay=0.3).step()
    torch.testing.assert_close(w.detach() - by_loss, stepped.detach())


def test_by_parameter_by_layer_and_by_weight():
    w, half = weights(), halves(weights())
    by_parameter = {"0.weight": 0.1, "0.bias": 0.2, "2.weight": torch.tensor(0.3, dtype=D)}
    expected = 0.1 * half["0.weight"] + 0.2 * half["0.bias"] + 0.3 * half["2.weight"]
    torch.testing.assert_close(bl.penalty(w, by_parameter), expected)
    expected = 0.1 * (half["0.weight"] + half["0.bias"]) + 0.3 * half["2.weight"]
    torch.testing.assert_close(bl.penalty(w, {"0": 0.1, "2": 0.3}), expected)
    torch.testing.assert_close(bl.penalty(w, {"2": 0.3}), 0.3 * half["2.weight"])
    each = {name: value.abs() for name, value in w.items()}
    expected = sum((0.5 * each[name] * value.square()).sum() for name, value in w.items())
    torch.testing.assert_close(bl.penalty(w, each), expected)
    columns = torch.tensor([1.0, 2.0], dtype=D)
    expected = (0.5 * columns * w["0.weight"].square()).sum()
    torch.testing.assert_close(bl.penalty(w, {"0.weight": columns}), expected)
    torch.testing.assert_close(bl.penalty([w["0.weight"], w["0.bias"]], [0.0, 1.0]), half["0.bias"])


def test_absolute_values_and_both():
    w = weights()
    total = sum(value.abs().sum() for value in w.values())
    torch.testing.assert_close(l1_penalty(w, 0.3), 0.3 * total)
    torch.testing.assert_close(elastic_net(w, 0.3, 0.2), 0.3 * total + 0.2 * sum(halves(w).values()))
    torch.testing.assert_close(l1_penalty(w, {"0.bias": 2.0}), 2.0 * w["0.bias"].abs().sum())


@pytest.mark.parametrize("function", [bl.penalty, l1_penalty])
def test_derivatives_in_weights_and_strengths(function):
    w = weights()
    names = list(w)

    def total(*tensors):
        given, strengths = tensors[: len(names)], tensors[len(names) :]
        return function(dict(zip(names, given)), dict(zip(names, strengths)))

    shapes = [w["0.weight"].shape, (), (3,)]
    strengths = [torch.rand(shape, dtype=D) + 0.1 for shape in shapes]
    inputs = [tensor.requires_grad_() for tensor in (*w.values(), *strengths)]
    assert gradcheck(total, inputs) and gradgradcheck(total, inputs)


def test_under_vmap_each_row_has_its_own_strength():
    w = weights()["0.weight"]
    strengths = torch.tensor([0.1, 0.2], dtype=D)
    found = torch.func.vmap(lambda s: bl.penalty(w, s))(strengths)
    torch.testing.assert_close(found, strengths * bl.penalty(w, 1.0))
    with pytest.raises(ValueError, match=r"the decay is from -0\.1 to 0\.2; expected at least 0"):
        torch.func.vmap(lambda s: bl.penalty(w, s))(torch.tensor([0.2, -0.1], dtype=D))


@pytest.mark.parametrize(
    ("decay", "error", "words"),
    [
        (-0.1, ValueError, r"is -0\.1; expected at least 0.*bilevel\.Log"),
        (float("nan"), ValueError, "is nan; expected at least 0"),
        (float("inf"), ValueError, "is inf; expected at least 0"),
        (torch.ones(3), ValueError, "one tensor of shape \\(3,\\) for 3 tensors of weights"),
        ({"0.weight": torch.ones(3)}, ValueError, r"\['0\.weight'\] has shape \(3,\); expected one number.*\(3, 2\)"),
        ({"1": 0.1}, ValueError, r"'1', which is no parameter and no layer; those are \['0', '2', '0\.weight'"),
        ({"0": 0.1, "0.bias": 0.1}, ValueError, "two parts for '0.bias': '0' and '0.bias'"),
        ({}, ValueError, "empty mapping"),
        ({"0": "much"}, TypeError, "is a str; expected a number"),
        ([0.1, 0.2], ValueError, "a list with the parts"),
    ],
)
def test_what_cannot_be_meant_is_refused(decay, error, words):
    with pytest.raises(error, match=words):
        bl.penalty(weights(), decay)
