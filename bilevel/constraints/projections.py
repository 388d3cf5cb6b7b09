"""Projections of single tensors, as formulas that autograd and vmap can follow to any order off their kinks."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped(z: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Each entry between its bounds; a bound that holds one passes its own derivative on."""
    return torch.where(z < low, low, torch.where(z > high, high, z))


def simplex_threshold(z: Tensor, total: Tensor) -> Tensor:
    """t `[..., 1]` with sum(max(z - t, 0)) = total along the last dimension; differentiable in both."""
    with torch.no_grad():
        ordered = z.sort(dim=-1, descending=True).values
        counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        levels = (ordered.cumsum(-1) - total) / counts
        # Those that keep a share are the largest ones; at which level is read at the last of them.
        last = (ordered > levels).sum(-1, keepdim=True).clamp(min=1) - 1
        kept = z >= ordered.gather(-1, last)
    share = torch.where(kept, z, 0.0).sum(-1, keepdim=True)
    return (share - total) / kept.sum(-1, keepdim=True)


def on_simplex(z: Tensor, total: Tensor) -> Tensor:
    """The nearest point with entries of at least 0 that add up to `total` along the last dimension."""
    above = z - simplex_threshold(z, total)
    return torch.where(above > 0.0, above, 0.0)


def on_cone(z: Tensor) -> Tensor:
    """The nearest (x, t) with |x| <= t, along the last dimension."""
    x, t = z[..., :-1], z[..., -1:]
    square = x.square().sum(-1, keepdim=True)
    with torch.no_grad():
        norm = square.sqrt()
        inside, polar = norm <= t, norm <= -t
    # The root's argument is 1 where it is not used: at 0 it has no derivative.
    size = torch.where(inside | polar, 1.0, square).sqrt()
    half = 0.5 * (size + t)
    surface = torch.cat([x * (half / size), half], dim=-1)
    return torch.where(inside, z, torch.where(polar, 0.0, surface))


def semidefinite(z: Tensor) -> Tensor:
    r"""The nearest symmetric matrix without negative eigenvalues.

    torch's derivative of eigenvectors divides by the gaps between eigenvalues, and is NaN where two are equal. The
    projection needs only the gaps between positive and negative ones: in the basis of the eigenvectors, held fixed,
    the positive eigenspace is spanned by (I, X), where X solves the Riccati equation
    \(B_{-+} + B_{--} X - X B_{++} - X B_{+-} X = 0\). X is 0 here, and each of five Newton-like steps makes one more
    of its derivatives right.
    """
    symmetric = 0.5 * (z + z.mT)
    with torch.no_grad():
        values, basis = torch.linalg.eigh(symmetric)
        positive = (values > 0.0).to(z.dtype)
        across = (1.0 - positive).unsqueeze(-1) * positive.unsqueeze(-2)
        gaps = torch.where(across > 0.0, values.unsqueeze(-2) - values.unsqueeze(-1), 1.0)
        kept, left = torch.diag_embed(positive), torch.diag_embed(1.0 - positive)
    b = basis.mT @ symmetric @ basis
    x = torch.zeros_like(b)
    for _ in range(5):
        x = x + across * (b + left @ b @ x - x @ b @ kept - x @ b @ x) / gaps
    span = kept + x
    projector = span @ torch.linalg.solve(span.mT @ span + left, span.mT)
    found = projector @ b @ projector
    nearest: Tensor = basis @ (0.5 * (found + found.mT)) @ basis.mT
    return nearest


def broadcasts(some: torch.Size, to: torch.Size) -> bool:
    """Whether a shape broadcasts to another one, which stays as it is."""
    pairs = zip(reversed(some), reversed(to), strict=False)
    return len(some) <= len(to) and all(a in (1, b) for a, b in pairs)
