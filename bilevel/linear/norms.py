"""Sizes of vectors that neither underflow nor overflow, and how far rounding may take them apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.autodiff import concrete, norm, transforms_active


def largest_entry(vector: Tensor) -> float:
    """The largest absolute value, NaN if there is one; in a batch over all of it."""
    if transforms_active():
        return concrete(vector.abs().amax())
    low, high = torch.aminmax(vector.detach())  # no vector of its own
    return float(torch.maximum(-low, high))


def asymmetry_tolerance(dtype: torch.dtype) -> float:
    """How far p'(A q) and q'(A p) may lie apart, relative to max(|p| |A q|, |q| |A p|), before A is not symmetric.

    Products carry an error of c eps |A| |p| with c around 1 to 10, so what rounding does is small against |A| |p| |q|,
    but a warm start lies where A is small: |A p| = s |A| |p|, s << 1. Conjugate gradients then take a step of 1/(s |A|)
    along p, which turns the rounding of A p into a share eps/s of the next q. So max(s, eps/s) >= sqrt(eps) bounds the
    scale from below, and c eps / sqrt(eps) the effect of rounding: 1.5e-7 in float64, 3.5e-3 in float32.
    """
    return 10.0 * math.sqrt(torch.finfo(dtype).eps)


__all__ = ["asymmetry_tolerance", "largest_entry", "norm"]
