"""Augmentations against their definitions, torch's grid_sample, and finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy, grid_sample

from bilevel.hyper import affine, brightness, cutout, mixup
from bilevel.hyper.images import bilinear

D = torch.float64


def images(batch=3, channels=2, height=6, width=5):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0), dtype=D)


def seeded(function):
    def call(*inputs):
        torch.manual_seed(0)
        return function(*inputs)

    return call


def test_bilinear_is_torchs_grid_sample():
    x = images()
    generator = torch.Generator().manual_seed(1)
    rows = (torch.rand(3, 4, 7, generator=generator, dtype=D) * 9 - 2).requires_grad_()  # some of them outside
    columns = (torch.rand(3, 4, 7, generator=generator, dtype=D) * 8 - 2).requires_grad_()
    grid = torch.stack([2 * columns / (5 - 1) - 1, 2 * rows / (6 - 1) - 1], dim=-1)
    found, expected = bilinear(x, rows, columns), grid_sample(x, grid, align_corners=True)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(value.square().sum(), (rows, columns)) for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_affine_moves_turns_and_zooms_by_what_was_drawn():
    x = images(height=5, width=5)
    torch.testing.assert_close(affine(x, shift=0.0, rotation=0.0, zoom=0.0), x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u = 2 * torch.rand(2, 3, 1, 1, dtype=D) - 1
        found = seeded(lambda: affine(x, shift=0.4))()
    for i in range(3):
        down, right = (0.4 * 5 * u[k, i].item() for k in (0, 1))
        # What was at (r, c) is at (r + down, c + right): an image that is linear stays so where it is seen.
        ramp = torch.arange(5, dtype=D)[:, None] * 10 + torch.arange(5, dtype=D)
        moved = seeded(lambda ramp=ramp: affine(ramp.expand(3, 1, 5, 5), shift=0.4))()[i, 0]
        seen = (
            slice(math.ceil(max(down, 0)), 5 + math.floor(min(down, 0))),
            slice(math.ceil(max(right, 0)), 5 + math.floor(min(right, 0))),
        )
        torch.testing.assert_close(moved[seen], (ramp - 10 * down - right)[seen])
    assert found.shape == x.shape


def test_a_quarter_turn_and_a_zoom_by_two():
    x = images(batch=1, height=5, width=5)

    def drawn(**options):
        """With u = 1 in place of a random number."""
        original, torch.rand = torch.rand, lambda shape, **like: torch.ones(shape, **like)
        try:
            return affine(x, **options)
        finally:
            torch.rand = original

    turned = drawn(rotation=90.0)
    assert any(torch.allclose(turned, torch.rot90(x, turns, (2, 3))) for turns in (1, 3))
    larger = drawn(zoom=1.0)  # (1 + 1) ** 1: the pixel beside the centre is now two beside it
    torch.testing.assert_close(larger[..., ::2, ::2], x[..., 1:4, 1:4])


def test_brightness_cutout_and_mixup_have_their_definitions():
    x = images()
    torch.manual_seed(0)
    u = 2 * torch.rand(3, 1, 1, 1, dtype=D) - 1
    torch.testing.assert_close(seeded(lambda: brightness(x, 0.3))(), x * (1 + 0.3 * u))
    torch.manual_seed(0)
    order, v = torch.randperm(3), torch.rand((), dtype=D)
    mixed = seeded(lambda: mixup(x, 0.8))()
    assert torch.equal(mixed.order, order) and mixed.share.item() == pytest.approx(0.4 * v.item())
    torch.testing.assert_close(mixed.inputs, (1 - 0.4 * v) * x + 0.4 * v * x[order])
    logits, labels = x.flatten(1)[:, :4], torch.tensor([0, 1, 2])
    expected = (1 - 0.4 * v) * cross_entropy(logits, labels) + 0.4 * v * cross_entropy(logits, labels[order])
    torch.testing.assert_close(mixed.loss(cross_entropy, logits, labels), expected)


def test_cutout_hides_the_share_that_lies_within_the_image():
    ones = torch.ones(4, 1, 6, 5, dtype=D)
    torch.manual_seed(0)
    centres = torch.rand(2, 4, 1, dtype=D)[..., 0]
    hidden = 1.0 - seeded(lambda: cutout(ones, 0.5))()
    low, high = (centres - 0.25).clamp(0, 1), (centres + 0.25).clamp(0, 1)
    sides = (high - low) * torch.tensor([[6.0], [5.0]], dtype=D)
    torch.testing.assert_close(hidden.sum((1, 2, 3)), sides[0] * sides[1])
    torch.testing.assert_close(cutout(ones, 0.0), ones)
    # A centre in the image's middle and a share of 1 hide everything.
    original, torch.rand = torch.rand, lambda shape, **like: torch.full(shape, 0.5, **like)
    try:
        assert float(cutout(ones, 1.0).sum()) == 0.0
    finally:
        torch.rand = original


@pytest.mark.parametrize(
    ("function", "strengths"),
    [
        (lambda x, s: affine(x, shift=s), (0.13,)),
        (lambda x, s: affine(x, rotation=s), (17.0,)),
        (lambda x, s: affine(x, zoom=s), (0.21,)),
        (lambda x, a, b, c: affine(x, shift=a, rotation=b, zoom=c), (0.13, 17.0, 0.21)),
        (lambda x, s: brightness(x, s), (0.3,)),
        (lambda x, s: cutout(x, s), (0.37,)),
        (lambda x, s: mixup(x, s).inputs, (0.6,)),
    ],
    ids=["shift", "rotation", "zoom", "all three", "brightness", "cutout", "mixup"],
)
def test_derivatives_of_both_orders_under_common_random_numbers(function, strengths):
    given = [torch.tensor(s, dtype=D, requires_grad=True) for s in strengths]
    inputs = (images(2, 1, 5, 4).requires_grad_(), *given)
    assert gradcheck(seeded(function), inputs)
    assert gradgradcheck(seeded(function), inputs)


def test_under_vmap():
    x = images()
    strengths = torch.tensor([0.1, 0.2], dtype=D)
    for function in (
        lambda s: affine(x, shift=s, rotation=s, zoom=s),
        lambda s: cutout(x, s),
        lambda s: brightness(x, s),
    ):
        assert torch.func.vmap(function, randomness="different")(strengths).shape == (2, *x.shape)


@pytest.mark.parametrize("function", [cutout, lambda x, s: affine(x, shift=s)])
def test_images_of_another_form_are_refused(function):
    with pytest.raises(ValueError, match=r"shape \(3, 784\); expected \[batch, channels.*unflatten"):
        function(torch.ones(3, 784), 0.1)
    with pytest.raises(TypeError, match=r"torch\.uint8; expected floating-point"):
        function(torch.ones(3, 1, 4, 4, dtype=torch.uint8), 0.1)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: cutout(x, 1.5), r"cutout: the strength is 1\.5; expected from 0 to 1"),
        (lambda x: mixup(x, -0.5), r"mixup: the strength is -0\.5; expected from 0 to 1"),
        (lambda x: brightness(x, -0.5), "brightness: the strength is -0.5; expected at least 0"),
        (lambda x: affine(x, shift=-0.5), "affine: shift is -0.5"),
        (lambda x: affine(x, rotation=torch.ones(2)), r"affine: rotation has shape \(2,\)"),
        (lambda x: affine(x, zoom=float("nan")), "affine: zoom is nan"),
    ],
)
def test_strengths_that_cannot_be_meant_are_refused(function, words):
    with pytest.raises(ValueError, match=words):
        function(images())
