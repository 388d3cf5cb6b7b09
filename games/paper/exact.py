"""The exact best response of the paper's game: a group-lasso problem with one unknown number a group."""

from __future__ import annotations

import torch
from torch import Tensor

from games.paper.seed_game import NOISE, Batch, Weights


def best_response(decay: Tensor, batch: Batch) -> dict[str, Tensor]:
    r"""argmin over w of  k/2 |Z w - t|^2 + sum_g exp(decay_g) |w_g|,  Z = [images, 1], k = 1/(n classes s^2).

    A group is a class, or all classes together when `decay` is a scalar. With Z = U S V' the minimum is

        w_g = 0                                      when |k Z't_g| <= exp(decay_g)
        w_g = V (k S^2 + exp(decay_g)/r)^-1 k S U't_g    otherwise, with r = |w_g|

    and r is the root of a decreasing function, found by bisection to the last bit. This is where a minimiser that
    goes by gradients stalls: at the kink w_g = 0 the gradient is not zero. Costs one SVD of `[n, 785]`, in float64.
    """
    images, targets = (part.double() for part in batch)
    inputs = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    left, spectrum, right = torch.linalg.svd(inputs, full_matrices=False)
    k = 1.0 / (targets.numel() * NOISE**2)
    pull = k * spectrum[:, None] * (left.T @ targets)  # [rank, classes]
    curvature = k * spectrum[:, None].square()
    strength = decay.detach().double().exp()

    def squared(numbers: Tensor) -> Tensor:
        """Sums of squares by group."""
        return numbers.square().sum(dim=0) if decay.ndim else numbers.square().sum()

    # |w|^2 / r^2 = sum (pull / (curvature r + strength))^2 falls in r, and is 1 at the answer.
    kept = squared(pull) > strength.square()
    low = torch.zeros_like(strength)
    high = squared(pull / curvature.clamp_min(1e-300)).sqrt()  # the norm without any penalty
    for _ in range(200):
        middle = (low + high) / 2
        above = squared(pull / (curvature * middle + strength)) > 1.0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    norm = (low + high) / 2
    coordinates = pull * norm / (curvature * norm + strength)
    stacked = right.T @ torch.where(kept, coordinates, 0.0)
    return {"weight": stacked[:-1], "bias": stacked[-1]}


def stationarity(decay: Tensor, weights: Weights, batch: Batch) -> Tensor:
    """Distance from 0 to the subdifferential of the training loss, a number a group; 0 at the best response.

    Where a group is zero its penalty has every slope of norm exp(decay) or less.
    """
    images, targets = (part.double() for part in batch)
    inputs = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    stacked = torch.cat([weights["weight"], weights["bias"][None]]).double()
    slope = inputs.T @ (inputs @ stacked - targets) / (targets.numel() * NOISE**2)
    dim = 0 if decay.ndim else None
    strength, norm = decay.double().exp(), torch.linalg.vector_norm(stacked, dim=dim)
    moving = slope + strength * stacked / torch.where(norm > 0.0, norm, 1.0)
    at_kink = (torch.linalg.vector_norm(slope, dim=dim) - strength).clamp_min(0.0)
    return torch.where(norm > 0.0, torch.linalg.vector_norm(moving, dim=dim), at_kink)
