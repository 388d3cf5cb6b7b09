"""Cross entropy against torch's, its definition, and finite differences."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from bilevel.hyper import cross_entropy
from bilevel.hyper.criterion import CriterionMode, MixedCriterion

D = torch.float64


def data(*more):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, *more, generator=generator, dtype=D)
    labels = torch.randint(4, (6, *more), generator=generator)
    labels.view(-1)[0] = -100
    weights = torch.rand(4, generator=generator, dtype=D) + 0.5
    return logits, labels, weights


@pytest.mark.parametrize("more", [(), (3,), (2, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_torchs_where_torch_has_it(more, reduction, smoothing, weighted):
    logits, labels, weights = data(*more)
    weights = weights if weighted else None
    expected = functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction=reduction)
    found = cross_entropy(logits, labels, class_weights=weights, smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(found, expected)
    targets = logits.flip(0).softmax(1)
    expected = functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction=reduction)
    found = cross_entropy(logits, targets, class_weights=weights, smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(found, expected)


def test_one_example_without_a_batch_and_classes_that_are_ruled_out():
    logits, labels, _ = data()
    torch.testing.assert_close(cross_entropy(logits[1], labels[1]), functional.cross_entropy(logits[1], labels[1]))
    logits = torch.tensor([[1.0, -torch.inf, 0.0]], dtype=D, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]), temperature=torch.tensor(2.0, dtype=D))
    torch.testing.assert_close(loss, functional.cross_entropy(logits / 2.0, torch.tensor([0])))
    (slope,) = torch.autograd.grad(loss, logits)
    assert bool(torch.isfinite(slope).all())


def test_focal_loss_and_temperature_have_their_definitions():
    logits, labels, _ = data()
    logits, labels = logits[1:], labels[1:]
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(cross_entropy(logits, labels, focusing=2.0), (-((1 - p) ** 2) * p.log()).mean())
    torch.testing.assert_close(
        cross_entropy(logits, labels, temperature=0.7), functional.cross_entropy(logits / 0.7, labels)
    )
    torch.testing.assert_close(cross_entropy(logits, labels, focusing=0.0), functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_derivatives_of_both_orders_in_everything(kind):
    logits, labels, weights = data()
    target = labels if kind == "labels" else logits.flip(0).softmax(1)

    def loss(z, s, gamma, w, t):
        return cross_entropy(z, target, smoothing=s, focusing=gamma, class_weights=w, temperature=t)

    strengths = [torch.tensor(value, dtype=D) for value in (0.1, 1.5)]
    inputs = [t.requires_grad_() for t in (logits, *strengths, weights, torch.tensor(0.8, dtype=D))]
    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


def test_the_derivative_in_the_smoothing_at_0_is_the_one_sided_one():
    logits, labels, _ = data()
    s = torch.tensor(0.0, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(cross_entropy(logits, labels, smoothing=s), s)
    rise = functional.cross_entropy(logits, labels, label_smoothing=1.0) - functional.cross_entropy(logits, labels)
    torch.testing.assert_close(slope, rise)  # it is linear in s


def test_a_mode_gives_options_to_a_loss_that_calls_torchs():
    logits, labels, weights = data()
    s = torch.tensor(0.1, dtype=D)
    expected = functional.cross_entropy(logits, labels, weights, label_smoothing=0.1)
    with CriterionMode("It", {"smoothing": s}) as mode:
        torch.testing.assert_close(functional.cross_entropy(logits, labels, weights), expected)
        torch.testing.assert_close(nn.CrossEntropyLoss(weights)(logits, labels), expected)
    assert mode.calls == 2
    with CriterionMode("A", {"smoothing": s}), CriterionMode("B", {"class_weights": weights}):
        torch.testing.assert_close(functional.cross_entropy(logits, labels), expected)
    torch.testing.assert_close(  # nothing of it is left
        functional.cross_entropy(logits, labels), -logits.log_softmax(1)[range(1, 6), labels[1:]].mean()
    )


def test_a_mode_mixes_labels():
    logits, labels, _ = data()
    order, share = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor(0.3, dtype=D)
    expected = 0.7 * functional.cross_entropy(logits, labels) + 0.3 * functional.cross_entropy(logits, labels[order])
    with MixedCriterion("It", order, share) as mode:
        torch.testing.assert_close(functional.cross_entropy(logits, labels), expected)
    assert mode.calls == 1
    smooth = [functional.cross_entropy(logits, target, label_smoothing=0.2) for target in (labels, labels[order])]
    for modes in (0, 1):
        inner, outer = (MixedCriterion("It", order, share), CriterionMode("B", {"smoothing": 0.2}))[:: 1 - 2 * modes]
        with outer, inner:
            torch.testing.assert_close(functional.cross_entropy(logits, labels), 0.7 * smooth[0] + 0.3 * smooth[1])


def test_what_a_mode_cannot_do_is_refused():
    logits, labels, _ = data()
    with CriterionMode("LabelSmoothing", {"smoothing": 0.1}) as mode:
        with pytest.raises(ValueError, match="LabelSmoothing changes .* the loss called none.*hyper.cross_entropy"):
            mode.require_called()
        with pytest.raises(ValueError, match="LabelSmoothing sets the smoothing .* has one already"):
            functional.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"smoothing": -0.1}, r"the smoothing is -0\.1; expected from 0 to 1"),
        ({"smoothing": 1.1}, r"the smoothing is 1\.1; expected from 0 to 1"),
        ({"smoothing": torch.ones(4)}, r"the smoothing has shape \(4,\); expected one number"),
        ({"focusing": -1.0}, "focusing is -1; expected at least 0"),
        ({"temperature": 0.0}, "the temperature is 0; expected above 0"),
        ({"class_weights": torch.ones(3)}, r"class_weights has shape \(3,\).*broadcasts to \(4,\)"),
        ({"class_weights": -torch.ones(4)}, "class_weights is -1; expected at least 0"),
        ({"reduction": "average"}, "expected 'mean', 'sum' or 'none'"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    logits, labels, _ = data()
    with pytest.raises(ValueError, match=words):
        cross_entropy(logits, labels, **options)
