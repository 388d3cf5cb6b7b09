"""Augmentation of inputs whose strength is a tensor: mixing, hiding, moving, brightness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.hyper.checks import NONNEGATIVE, SHARE, Strength, strength_of


class Mixed(NamedTuple):
    """Inputs that `mixup` mixed: `inputs`, the `order` of the partners `[batch]`, and the partners' `share` (0-d)."""

    inputs: Tensor
    order: Tensor
    share: Tensor

    def loss(self, criterion: Callable[..., Tensor], outputs: Any, labels: Tensor) -> Tensor:
        """`criterion(outputs, labels)` of both labels, mixed as the inputs are."""
        own, partners = criterion(outputs, labels), criterion(outputs, labels[self.order])
        return (1.0 - self.share) * own + self.share * partners


def mixup(inputs: Tensor, strength: Strength) -> Mixed:
    r"""Each example mixed with another one, \((1 - \lambda)\, x_i + \lambda\, x_{\pi(i)}\), \(\lambda = s u / 2\).

    One u, uniform in (0, 1), and one random order \(\pi\) a batch. At a strength s of 1 it is mixup with its
    Beta(1, 1), since sharing 70 and 30 is sharing 30 and 70 in another order; at 0 nothing is mixed. Mixup's own
    Beta(s, s) has no derivative under common random numbers, because torch draws it by rejection.

    Args:
        inputs: [batch, ...].
        strength: s, 0 <= s <= 1.

    Source: Zhang et al. 2018, arXiv 1710.09412.

    Examples:
        >>> mixed = mixup(torch.eye(2), 0.0)
        >>> mixed.inputs
        tensor([[1., 0.],
                [0., 1.]])
    """
    s = strength_of(strength, "mixup: the strength", inputs, SHARE)
    order = torch.randperm(inputs.shape[0], device=inputs.device)
    share = 0.5 * s * torch.rand((), dtype=inputs.dtype, device=inputs.device)
    return Mixed((1.0 - share) * inputs + share * inputs[order], order, share)


def cutout(images: Tensor, strength: Strength) -> Tensor:
    r"""A rectangle of each image set to 0: of its height and width the share s, its centre anywhere in the image.

    A pixel that the rectangle's edge crosses keeps the share of its area that lies outside, so that the loss is
    continuous in s; its derivative is made by the edges.

    Args:
        images: [batch, channels, height, width].
        strength: s, 0 <= s <= 1.

    Source: DeVries & Taylor 2017, arXiv 1708.04552.

    Examples:
        >>> cutout(torch.ones(1, 1, 2, 2), 0.0).sum()
        tensor(4.)
    """
    _require_images("cutout", images)
    s = strength_of(strength, "cutout: the strength", images, SHARE)
    batch, _, height, width = images.shape
    centres = torch.rand((2, batch, 1), dtype=images.dtype, device=images.device)
    down = _covered(height, centres[0], s)
    across = _covered(width, centres[1], s)
    return images * (1.0 - down[:, None, :, None] * across[:, None, None, :])


def _covered(size: int, centres: Tensor, share: Tensor) -> Tensor:
    """`[batch, size]`: how much of each pixel lies within `share` of the size around a centre in (0, 1)."""
    edges = torch.arange(size, dtype=centres.dtype, device=centres.device)
    low, high = size * (centres - 0.5 * share), size * (centres + 0.5 * share)
    return (torch.minimum(edges + 1.0, high) - torch.maximum(edges, low)).clamp(0.0, 1.0)


def brightness(images: Tensor, strength: Strength) -> Tensor:
    r"""Each image times a factor \(1 + s\, u\), u uniform in (-1, 1).

    Args:
        images: [batch, ...]. Values above 1 are left as they are.
        strength: s, at least 0.

    Examples:
        >>> brightness(torch.ones(1, 1, 2, 2), 0.0).sum()
        tensor(4.)
    """
    s = strength_of(strength, "brightness: the strength", images, NONNEGATIVE)
    shape = (images.shape[0], *[1] * (images.ndim - 1))
    return images * (1.0 + s * _signed(shape, images))


def affine(
    images: Tensor,
    *,
    shift: Strength | None = None,
    rotation: Strength | None = None,
    zoom: Strength | None = None,
) -> Tensor:
    r"""Each image moved, turned and zoomed at random, by bilinear interpolation once; outside of the image there is 0.

    Args:
        images: [batch, channels, height, width].
        shift: By how much at most, as a share of height and width, in each direction: uniform in (-shift, shift).
        rotation: By how many degrees at most, around the centre: uniform in (-rotation, rotation).
        zoom: By how much at most: a factor \((1 + \text{zoom})^u\), u uniform in (-1, 1); above 1 shows a part, larger.

    Each is at least 0. Each draws its random numbers only where it is given.

    The interpolation has kinks where a sample falls on a pixel's centre; elsewhere it has derivatives of any order, in
    every version of PyTorch and by dual numbers, which `torch.nn.functional.grid_sample` has not. Costs four gathers of
    the images.

    Examples:
        >>> affine(torch.ones(1, 1, 2, 2), shift=0.0, rotation=0.0, zoom=0.0).sum()
        tensor(4.)
    """
    _require_images("affine", images)
    batch, _, height, width = images.shape
    like = {"dtype": images.dtype, "device": images.device}
    y = (torch.arange(height, **like) - 0.5 * (height - 1)).reshape(1, height, 1)  # type: ignore[call-overload]
    x = (torch.arange(width, **like) - 0.5 * (width - 1)).reshape(1, 1, width)  # type: ignore[call-overload]
    # From a place in the result to one in the image: what turns to the right is looked up to the left.
    if shift is not None:
        s = strength_of(shift, "affine: shift", images, NONNEGATIVE)
        u = _signed((2, batch, 1, 1), images)
        y, x = y - s * height * u[0], x - s * width * u[1]
    if rotation is not None:
        degrees = strength_of(rotation, "affine: rotation", images, NONNEGATIVE)
        angle = degrees * (math.pi / 180.0) * _signed((batch, 1, 1), images)
        y, x = angle.cos() * y - angle.sin() * x, angle.sin() * y + angle.cos() * x
    if zoom is not None:
        largest = strength_of(zoom, "affine: zoom", images, NONNEGATIVE).log1p()
        factor = (-largest * _signed((batch, 1, 1), images)).exp()
        y, x = factor * y, factor * x
    shape = (batch, height, width)
    return bilinear(images, (y + 0.5 * (height - 1)).expand(shape), (x + 0.5 * (width - 1)).expand(shape))


def bilinear(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images `[batch, channels, height, width]` at places in pixels, `[batch, h, w]` each; 0 outside."""
    batch, channels, height, width = images.shape
    flat = images.reshape(batch, channels, height * width)
    top, left = rows.detach().floor(), columns.detach().floor()
    below, right = rows - top, columns - left
    total = images.new_zeros((batch, channels, *rows.shape[1:]))
    for row, down in ((top, 1.0 - below), (top + 1.0, below)):
        for column, across in ((left, 1.0 - right), (left + 1.0, right)):
            inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
            place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index = place.long().reshape(batch, 1, -1).expand(batch, channels, place[0].numel())
            share = torch.where(inside, down * across, 0.0)
            total = total + flat.gather(2, index).reshape(total.shape) * share.unsqueeze(1)
    return total


def _signed(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uniform in (-1, 1)."""
    return 2.0 * torch.rand(shape, dtype=like.dtype, device=like.device) - 1.0


def _require_images(who: str, images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(
            f"{who}: the images have shape {tuple(images.shape)}; expected [batch, channels, height, width]. "
            "images.unflatten(1, (1, height, width)) makes them of rows of pixels."
        )
    if not images.is_floating_point():
        raise TypeError(f"{who}: the images are {images.dtype}; expected floating-point numbers: images.float() / 255.")
