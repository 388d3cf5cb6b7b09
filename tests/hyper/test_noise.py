"""Dropout and noise against their definitions and, with common random numbers, finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import alpha_dropout as torch_alpha_dropout

from bilevel.hyper import alpha_dropout, dropout, gaussian_dropout, noise

D = torch.float64


def seeded(function):
    """The same with the same random numbers in each call."""

    def call(*inputs):
        torch.manual_seed(0)
        return function(*inputs)

    return call


def uniform(*shape):
    torch.manual_seed(0)
    return torch.rand(shape, dtype=D)


def test_the_mask_is_a_relaxed_bernoulli_one():
    x = torch.ones(200, dtype=D)
    u = uniform(200)
    # In the limit an entry is kept where logit(u) > logit(p), that is u > p, and is 1 / (1 - p).
    near = seeded(lambda: dropout(x, 0.3, temperature=1e-6))()
    torch.testing.assert_close(near, (u > 0.3).to(D) / 0.7)
    p, t = 0.3, 0.1
    m = ((math.log((1 - p) / p) + (u / (1 - u)).log()) / t).sigmoid()
    torch.testing.assert_close(seeded(lambda: dropout(x, p))(), m / (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_its_mean_is_one_but_for_the_relaxation(p):
    # The integral over u by the midpoint rule: no noise, and the mask is smooth on the scale of one cell.
    u = (torch.arange(200_000, dtype=D) + 0.5) / 200_000
    m = ((math.log((1 - p) / p) + (u / (1 - u)).log()) / 0.1).sigmoid()
    told = 1.0 - p - math.pi**2 / 6 * 0.1**2 * p * (1 - p) * (1 - 2 * p)
    # The next term of the expansion is of fourth order in the temperature, with a factor of 7 pi^4 / 360 = 1.9.
    assert m.mean().item() == pytest.approx(told, abs=2 * 0.1**4)


@pytest.mark.parametrize("draw", [dropout, gaussian_dropout, alpha_dropout, noise])
def test_nothing_happens_at_a_strength_of_0(draw):
    x = torch.randn(4, 5)
    torch.testing.assert_close(draw(x, 0.0), x, rtol=0.0, atol=0.0)
    torch.testing.assert_close(draw(x, torch.tensor(0.0)), x, rtol=0.0, atol=0.0)


def test_gaussian_dropout_and_noise_have_their_definitions():
    x = torch.linspace(1.0, 2.0, 6, dtype=D)
    torch.manual_seed(0)
    e = torch.randn(6, dtype=D)
    torch.testing.assert_close(seeded(lambda: gaussian_dropout(x, 0.2))(), x * (1 + math.sqrt(0.2 / 0.8) * e))
    torch.testing.assert_close(seeded(lambda: noise(x, 0.2))(), x + 0.2 * e)


def test_alpha_dropout_keeps_mean_and_variance_as_torchs_does():
    torch.manual_seed(1)
    x = torch.randn(200_000, dtype=D)
    ours, theirs = alpha_dropout(x, 0.2), torch_alpha_dropout(x, 0.2, training=True)
    # Entries of the relaxed mask that are neither 0 nor 1 take E m (1 - m) = t p (1 - p) off its variance, and that
    # times a^2 E (x - alpha)^2 off the result's. Standard errors of mean and variance are .0022 and about .004.
    lost = 0.1 * 0.2 * 0.8 / ((1 - 0.2) * (1 + 0.2 * 1.7581**2)) * (1 + 1.7581**2)
    for found, variance in ((ours, 1.0 - lost), (theirs, 1.0)):
        assert abs(found.mean().item()) < 0.02 and abs(found.var().item() - variance) < 0.02
    u = uniform(200_000)
    near = seeded(lambda: alpha_dropout(x, 0.2, temperature=1e-12))()
    scale = ((1 - 0.2) * (1 + 0.2 * 1.7580993408473766**2)) ** -0.5
    expected = scale * torch.where(u > 0.2, x, -1.7580993408473766) + scale * 1.7580993408473766 * 0.2
    torch.testing.assert_close(near, expected)


@pytest.mark.parametrize("draw", [dropout, gaussian_dropout, alpha_dropout, noise])
@pytest.mark.parametrize("shape", [(), (5,), (4, 1)])
def test_derivatives_of_both_orders_under_common_random_numbers(draw, shape):
    torch.manual_seed(3)
    x = torch.randn(4, 5, dtype=D, requires_grad=True)
    strength = (0.2 + 0.4 * torch.rand(shape, dtype=D)).requires_grad_()
    assert gradcheck(seeded(draw), (x, strength))
    assert gradgradcheck(seeded(draw), (x, strength))


def test_a_mask_for_whole_channels():
    x = torch.ones(2, 3, 4, 4, dtype=D)
    found = dropout(x, 0.5, mask_shape=[2, 3, 1, 1])
    torch.testing.assert_close(found, found[..., :1, :1].expand(x.shape))
    assert found[..., 0, 0].unique().numel() == 6


def test_half_precision_goes_through_single():
    x = torch.ones(1000, dtype=torch.bfloat16)
    found = dropout(x, torch.tensor(0.3, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16 and bool(torch.isfinite(found).all())


def test_under_vmap_with_numbers_of_their_own():
    x = torch.ones(50, dtype=D)
    strengths = torch.tensor([0.2, 0.4], dtype=D)
    found = torch.func.vmap(lambda s: dropout(x, s), randomness="different")(strengths)
    assert found.shape == (2, 50) and not torch.equal(found[0] > 0.5, found[1] > 0.5)


@pytest.mark.parametrize("draw", [dropout, gaussian_dropout, alpha_dropout])
@pytest.mark.parametrize(
    ("strength", "error", "words"),
    [
        (-0.1, ValueError, r"the strength is -0\.1; expected at least 0 and below 1.*bilevel\.Unit"),
        (1.0, ValueError, "the strength is 1; expected at least 0 and below 1"),
        (torch.tensor(float("nan")), ValueError, "the strength is nan"),
        (torch.ones(3), ValueError, r"has shape \(3,\); expected one number, or a tensor that broadcasts to \(4, 5\)"),
        (torch.tensor(1), TypeError, "torch.int64; expected a floating dtype"),
        ("much", TypeError, "is a str"),
    ],
)
def test_what_cannot_be_meant_is_refused(draw, strength, error, words):
    with pytest.raises(error, match=words):
        draw(torch.ones(4, 5), strength)


def test_the_rest_that_is_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        dropout(torch.ones(3), 0.1, temperature=0.0)
    with pytest.raises(ValueError, match=r"mask_shape has shape \(2,\)"):
        dropout(torch.ones(3), 0.1, mask_shape=[2])
    with pytest.raises(ValueError, match=r"noise: the strength is -1; expected at least 0"):
        noise(torch.ones(3), -1.0)
