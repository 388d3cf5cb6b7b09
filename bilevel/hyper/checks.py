"""What strengths are refused for: their kind, their range, their shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.game.player import kind

Strength = float | Tensor
"""A number or a tensor, in which what it regularises is differentiable."""


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, with the words for them and for a player that stays within."""

    low: float
    high: float
    told: str
    player: str
    low_included: bool = True
    high_included: bool = True

    def holds(self, values: Tensor) -> Tensor:
        """Entry by entry; a NaN compares with nothing, and is outside."""
        above = values >= self.low if self.low_included else values > self.low
        below = values <= self.high if self.high_included else values < self.high
        return above & below


NONNEGATIVE: Final = Range(0.0, math.inf, "at least 0", "bilevel.Log(1e-6, 1e-1)", high_included=False)
POSITIVE: Final = Range(0.0, math.inf, "above 0", "bilevel.Positive()", low_included=False, high_included=False)
RATE: Final = Range(0.0, 1.0, "at least 0 and below 1", "bilevel.Unit(0.0, 0.9)", high_included=False)
SHARE: Final = Range(0.0, 1.0, "from 0 to 1", "bilevel.Unit()")


def strength_of(value: Strength, what: str, like: Tensor, within: Range, *, shape: Sequence[int] = ()) -> Tensor:
    """A strength as a tensor of the dtype and on the device of `like`; refuses one that cannot be meant.

    `what` begins the message; `shape` is what it must broadcast to, by default one number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{what} is {kind(value)}; expected a number or a tensor.")
    found = value if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)
    if not found.is_floating_point():
        raise TypeError(f"{what} has dtype {found.dtype}; expected a floating dtype, such as {like.dtype}.")
    if found.device != like.device:
        raise ValueError(f"{what} is on {found.device}, and what it acts on is on {like.device}. Use .to(device).")
    refuse_shape(found.shape, what, shape)
    refuse_outside([found], what, within)
    return found.to(like.dtype)


def refuse_shape(found: Sequence[int], what: str, shape: Sequence[int]) -> None:
    """Raise `ValueError` for a shape that does not broadcast to another one, which stays as it is."""
    pairs = zip(reversed(tuple(found)), reversed(tuple(shape)), strict=False)
    if len(found) > len(shape) or not all(a in (1, b) for a, b in pairs):
        wanted = f", or a tensor that broadcasts to {tuple(shape)}" if len(shape) else ", a tensor of shape ()"
        raise ValueError(f"{what} has shape {tuple(found)}; expected one number{wanted}.")


def refuse_outside(found: Sequence[Tensor], what: str, within: Range) -> None:
    """Raise `ValueError` for entries out of a range, or NaN; all tensors by one look at their numbers."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in found])
    if concrete((~within.holds(flat)).any().float()) <= 0.0:
        return
    least, most = -concrete((-flat).max()), concrete(flat.max())
    came = f"{most:.4g}" if least == most or math.isnan(most) else f"from {least:.4g} to {most:.4g}"
    raise ValueError(
        f"{what} is {came}; expected {within.told}. A player that is one stays within by its init={within.player}."
    )
