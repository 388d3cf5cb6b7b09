r"""Dropout and noise whose strength is a tensor: the same random numbers, moved by the strength.

All of them draw from torch's global generators, as torch's own do: games keep and restore these where one evaluation
must be repeated, and one that is resumed goes on with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.hyper.checks import NONNEGATIVE, RATE, Strength, refuse_shape, strength_of


def dropout(
    x: Tensor, strength: Strength, *, mask_shape: Sequence[int] | None = None, temperature: float = 0.1
) -> Tensor:
    r"""Dropout with a relaxed mask, differentiable in its rate p: concrete dropout.

    \[ x\, \frac{m}{1 - p}, \qquad
       m = \sigma\Big(\frac{1}{\tau}\big(\log\tfrac{1-p}{p} + \log\tfrac{u}{1-u}\big)\Big), \quad u \sim U(0, 1) \]

    A mask entry is above one half with probability 1 - p, and nearly 0 or 1 where the temperature \(\tau\) is small; in
    the limit it is a Bernoulli mask. Its mean is below 1 - p by about \(1.64\, \tau^2 p (1-p) (1-2p)\), and its
    variance below p (1 - p) by about \(\tau\, p (1-p)\).

    Args:
        x: Any shape.
        strength: The rate p, 0 <= p < 1: a number, or a tensor that broadcasts to x, one rate a feature, say.
        mask_shape: That of the mask, which broadcasts to x: [batch, channels, 1, 1] drops whole channels. Default: that
            of x.
        temperature: Smaller is closer to Bernoulli masks, and makes rarer and larger derivatives.

    At a rate of exactly 0 nothing is dropped, and the derivative knows only the factor 1 / (1 - p): start above 0.

    Source: Gal, Hron & Kendall 2017, arXiv 1705.07832.

    Examples:
        >>> dropout(torch.ones(3), 0.0)
        tensor([1., 1., 1.])
    """
    p = _rate("dropout", x, strength)
    mask = _relaxed_mask(x, p, mask_shape, temperature, "dropout")
    return x * (mask / (1.0 - p)).to(x.dtype)


def gaussian_dropout(x: Tensor, strength: Strength, *, mask_shape: Sequence[int] | None = None) -> Tensor:
    r"""\(x\, (1 + \sqrt{p / (1 - p)}\; \epsilon)\) with standard normal \(\epsilon\): dropout's mean and variance.

    Args:
        x: Any shape.
        strength: The rate p, 0 <= p < 1: a number, or a tensor that broadcasts to x. Its derivative is infinite at 0.
        mask_shape: As in `dropout`.

    Source: Srivastava et al. 2014, JMLR 15, section 10.

    Examples:
        >>> gaussian_dropout(torch.ones(2), 0.0)
        tensor([1., 1.])
    """
    p = _rate("gaussian_dropout", x, strength)
    return x * (1.0 + (p / (1.0 - p)).sqrt() * _normal(x, p, mask_shape, "gaussian_dropout")).to(x.dtype)


def alpha_dropout(
    x: Tensor, strength: Strength, *, mask_shape: Sequence[int] | None = None, temperature: float = 0.1
) -> Tensor:
    r"""`torch.nn.functional.alpha_dropout`, for networks of SELUs, with the relaxed mask m of `dropout`.

    \[ a\, (m\, x + (1 - m)\, \alpha) + b,
       \quad a = \big((1-p)(1 + p\, \alpha^2)\big)^{-1/2}, \quad b = -a\, \alpha\, p \]

    \(\alpha \approx -1.758\) is where a SELU saturates. Arguments are those of `dropout`.

    Source: Klambauer et al. 2017, arXiv 1706.02515.

    Examples:
        >>> alpha_dropout(torch.ones(2), 0.0)
        tensor([1., 1.])
    """
    p = _rate("alpha_dropout", x, strength)
    mask = _relaxed_mask(x, p, mask_shape, temperature, "alpha_dropout")
    scale = ((1.0 - p) * (1.0 + p * _SATURATED**2)).rsqrt()
    return (scale * (mask * x + (1.0 - mask) * _SATURATED) - scale * _SATURATED * p).to(x.dtype)


def noise(x: Tensor, strength: Strength) -> Tensor:
    r"""\(x + s\, \epsilon\) with standard normal \(\epsilon\).

    Args:
        x: Any shape.
        strength: The standard deviation s, at least 0: a number, or a tensor that broadcasts to x.

    Examples:
        >>> noise(torch.ones(2), 0.0)
        tensor([1., 1.])
    """
    s = strength_of(strength, "noise: the strength", x, NONNEGATIVE, shape=x.shape)
    return x + s * torch.randn(x.shape, dtype=x.dtype, device=x.device)


_SATURATED = -1.7580993408473766


def _rate(who: str, x: Tensor, strength: Strength) -> Tensor:
    """The rate in at least single precision: 1 - p of a half has steps of .05 %."""
    precise = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return strength_of(strength, f"{who}: the strength", precise, RATE, shape=x.shape)


def _relaxed_mask(x: Tensor, p: Tensor, mask_shape: Sequence[int] | None, temperature: float, who: str) -> Tensor:
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"{who}: temperature={temperature}; expected a number above 0.")
    shape = _mask_shape(x, mask_shape, who)
    # Neither 0 nor 1, whose logits are infinite.
    least = torch.finfo(p.dtype).eps
    u = torch.rand(shape, dtype=p.dtype, device=x.device).clamp(least, 1.0 - least)
    none = p == 0.0
    inner = torch.where(none, 0.5, p)
    kept = ((torch.log1p(-inner) - inner.log() + torch.logit(u)) / temperature).sigmoid()
    return torch.where(none, 1.0, kept)


def _normal(x: Tensor, p: Tensor, mask_shape: Sequence[int] | None, who: str) -> Tensor:
    return torch.randn(_mask_shape(x, mask_shape, who), dtype=p.dtype, device=x.device)


def _mask_shape(x: Tensor, mask_shape: Sequence[int] | None, who: str) -> tuple[int, ...]:
    if mask_shape is None:
        return tuple(x.shape)
    refuse_shape(mask_shape, f"{who}: mask_shape", x.shape)
    return tuple(mask_shape)
