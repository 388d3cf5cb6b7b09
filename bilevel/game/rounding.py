r"""How large the terms of a follower's gradient are, and so what of it is rounding.

Two terms as large as $|H|\,|y|$ that cancel leave rounding of that size, and no gradient can be told from 0 below it.
Who starts at an optimum starts with rounding for a gradient, and nothing can be told relative to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from bilevel.game.constrained import spread
from bilevel.sharding.tensor import noise_like
from bilevel.tree import Structure, join

Size = Any
"""A float; of many games a tensor `[count]` with one for each."""

ROUNDINGS = 2.0
"""So many roundings of its terms a gradient has where y is as near to an optimum as numbers lie."""

SURE = 16.0
"""Within so many it is not told of: a step of a sixteenth of Newton's is then below half a digit of y."""


def terms(curvature: float, size: float, mixed: float = 0.0, others: float = 0.0) -> float:
    """The size of a gradient's terms: curvature times size of y, and mixed derivative times size of the others."""
    return curvature * size + mixed * others


def rounding(terms: Size, dtype: torch.dtype, roundings: float = SURE) -> Size:
    """What of a gradient with such terms is rounding."""
    return roundings * torch.finfo(dtype).eps * terms


def least_telling(terms: Size, dtype: torch.dtype) -> Size:
    """A gradient below that measures no other: beside its terms, half of its digits are rounding."""
    return torch.finfo(dtype).eps ** 0.5 * terms


@final
@dataclass(frozen=True, eq=False)
class GradientScale:
    """What a follower's gradient is measured by.

    Args:
        reference: The norm of F at the start of the game; where that says nothing, the largest one since with which a
            call began. 0 where there has been none yet.
        terms: The size of the terms of F.
        dtype: The follower's.
    """

    reference: Size
    terms: Size
    dtype: torch.dtype

    @property
    def tells(self) -> Any:
        """Whether the reference is large enough beside the terms."""
        return self.reference > least_telling(self.terms, self.dtype)

    @property
    def unit(self) -> Size:
        """What a norm of F is told in units of; 1 where nothing is known."""
        return _where(self.reference > 0.0, self.reference, 1.0)

    @property
    def shown(self) -> Size:
        """The same for who does not look where calls begin: at least what tells."""
        least = least_telling(self.terms, self.dtype)
        return GradientScale(_where(self.reference > least, self.reference, least), self.terms, self.dtype).unit

    @property
    def natural(self) -> Size:
        """How large F is away from rest, as far as is known: its norm at the start, else its terms."""
        return _where(self.tells, self.unit, _where(self.terms > 0.0, self.terms, self.unit))

    @property
    def rounding(self) -> Size:
        """A norm of F below which steps gain nothing."""
        return rounding(self.terms, self.dtype, ROUNDINGS)

    def threshold(self, tolerance: float) -> Size:
        """Where to stop who is to come to `tolerance`; 0 for as many steps as there are."""
        if tolerance <= 0.0:
            return 0.0 * self.unit
        return _where(tolerance * self.unit > self.rounding, tolerance * self.unit, self.rounding)

    def begun(self, norm: Size) -> GradientScale:
        """After a call that began with a norm of F."""
        # A follower on its way to infinity is no measure.
        known = _where(_both(self.terms > 0.0, norm > self.terms), self.terms, norm)
        grown = _where(known > self.reference, known, self.reference)
        return GradientScale(_where(self.tells, self.reference, grown), self.terms, self.dtype)


class Measured(Protocol):
    """What is asked of a follower whose gradient's terms are measured."""

    xs: list[Tensor]
    unknowns: Structure

    @property
    def owners(self) -> list[list[int]]:
        """The places of the leaves of each player who makes it up."""

    def norm(self, slopes: Sequence[Tensor]) -> Size:
        """The norm of F."""

    def noise(self, unknowns: Tensor, generator: torch.Generator) -> Tensor:
        """Noise in the form of its unknowns."""


class ResidualWithLoss(Protocol):
    """F as a function of y and the others' leaves, which remembers the loss that it saw last."""

    @property
    def loss(self) -> float:
        """The loss at the last call."""

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """F."""


def measured_terms(follower: Measured, residual: ResidualWithLoss, y: Tensor) -> list[Size]:
    r"""The size of the terms of F at `y: [n]`, of each player who makes up the follower.

    By differences: $|F_y \operatorname{diag}(y) s| + |F_x \operatorname{diag}(x) s|$ with random s of about 1 in each
    entry. Where y is 0 it has no size, and gets that at which a loss of its curvature differs from 0 by its value
    there, $\sqrt{2 f / L}$, at most 1. Costs three evaluations of F.
    """
    generator, step = torch.Generator().manual_seed(0), torch.finfo(y.dtype).eps ** 0.5

    def norms(vector: Tensor) -> list[Tensor]:
        parts = follower.unknowns.split(vector)
        return [_tensor(follower.norm([parts[place] for place in own])) for own in follower.owners]

    with torch.no_grad():
        xs = [x.detach() for x in follower.xs]
        here = residual(y, *xs)
        loss = abs(residual.loss) if math.isfinite(residual.loss) else 0.0
        sizes, pattern = norms(y), follower.unknowns.split(_factors(follower.noise(y, generator)))
        way = follower.unknowns.split(y)
        for own, size in zip(follower.owners, sizes, strict=True):
            for place in own:
                here_ = (size > 0.0).to(y.device)
                way[place] = pattern[place] * torch.where(spread(here_, way[place]), way[place], 1.0)
        ahead = join(way)
        moved = [x + step * _factors(noise_like(x, generator)) * x for x in xs]
        curved = norms((residual(y + step * ahead, *xs) - here) / step)
        mixed = norms((residual(y, *moved) - here) / step)
        found = []
        for size, length, bent, pushed in zip(sizes, norms(ahead), curved, mixed, strict=True):
            bent, pushed = (torch.where(torch.isfinite(part), part, 0.0) for part in (bent, pushed))
            likely = (2.0 * loss * length / torch.where(bent > 0.0, bent, 1.0)).sqrt() / length
            found.append(torch.where(size > 0.0, bent, bent * likely.clamp(max=1.0)) + pushed)
    return [each if each.ndim else float(each) for each in found]


def least_terms(found: Sequence[Size]) -> Size:
    """Those of the follower as one, of whose members nobody's may hide another's: the smallest that is not 0."""
    if len(found) == 1:
        return found[0]
    rows = torch.stack([_tensor(each) for each in found])
    smallest = torch.where(rows > 0.0, rows, torch.inf).amin(0)
    smallest = torch.where(torch.isfinite(smallest), smallest, 0.0)
    return smallest if smallest.ndim else float(smallest)


def beyond_rounding(follower: Measured, slope: Tensor, found: Sequence[Size]) -> Size:
    """The norm of what of F `[n]` is no rounding of its own player's terms."""
    parts, total = follower.unknowns.split(slope), None
    for own, terms_ in zip(follower.owners, found, strict=True):
        norm = follower.norm([parts[place] for place in own])
        mine = _tensor(_where(norm > rounding(terms_, slope.dtype), norm, 0.0 * norm))
        total = mine if total is None else torch.hypot(total, mine)
    assert total is not None
    return total if total.ndim else float(total)


def _factors(noise: Tensor) -> Tensor:
    """Numbers between 1/2 and 3/2 of either sign."""
    return torch.where(noise < 0.0, -0.5, 0.5) + noise.clamp(-1.0, 1.0)


def _tensor(size: Size) -> Tensor:
    return size if isinstance(size, Tensor) else torch.tensor(size, dtype=torch.float64)


def _both(one: Any, other: Any) -> Any:
    return one & other if isinstance(one, Tensor) else bool(one and other)


def _where(which: Any, one: Size, other: Size) -> Size:
    """Of one game, or of each of many."""
    if not isinstance(which, Tensor):
        return one if which else other
    return torch.where(which, one, other)
