"""The iteration of conjugate gradients: of one system in plain memory, and of what is differentiated or batched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import IndefiniteSystemError, NotSymmetricError
from bilevel.linear.base import asymmetry_tolerance, norm
from bilevel.linear.stopping import Watch


class Iteration:
    """One solve's iterations, and the pairs (p, A p) that they went through, evenly spaced.

    The configuration sets what it wants: `inverse` is M^-1, `pairs` how many pairs to keep, `watch` looks at the
    solution on the way, which began at `start`. `spent` are products that were no steps. Curvatures p'Ap / p'p
    that a watched solve met lie between `least` and `largest`, which in the end are near A's extreme eigenvalues.
    """

    def __init__(self, matvec: Callable[[Tensor], Tensor]) -> None:
        self.matvec = matvec
        self.inverse: Callable[[Tensor], Tensor] | None = None
        self.pairs, self.spent = 0, 0
        self.watch: Watch | None = None
        self.start: Tensor | None = None
        self.least, self.largest = math.inf, 0.0
        self.directions: list[Tensor] = []
        self.products: list[Tensor] = []
        self._stride, self._seen = 1, 0

    def counted(self, vector: Tensor) -> Tensor:
        """A product that is no step."""
        self.spent += 1
        return self.matvec(vector)

    def correct(self, residual: Tensor, size: Tensor, target: Tensor, most: int, first: bool) -> tuple[Tensor, int]:
        """The e `[n]` that takes A e from 0 towards `residual`, of norm `size`, and the steps taken.

        `first`: whether its directions may tell that A is indefinite or not symmetric. After a restart they are
        rounding's: one without curvature ends the search, and proves nothing.
        """
        if transforms_active() or torch.is_grad_enabled():
            return self._tracked(residual, size, target, most, first)
        return self._plain(residual, float(size), float(target), most, first)

    def _plain(self, residual: Tensor, size: float, target: float, most: int, first: bool) -> tuple[Tensor, int]:
        """One system that nobody differentiates: scalars are Python's, and vectors are written over."""
        # Unit size, because curvatures are squares, and squares of small float32 numbers underflow to "indefinite".
        scale = size or 1.0
        goal, left = target / scale, size / scale
        r = residual / scale
        z = self._preconditioned(r)
        p, rho = z, float(torch.dot(r, z))
        e: Tensor | None = None
        before: _Before | None = None
        steps = 0
        if rho <= 0.0 and left > goal:
            raise indefinite_preconditioner(rho)
        while steps < most and left > goal:
            product = self.matvec(p)
            steps += 1
            self._note(p, product)
            curvature = float(torch.dot(p, product))
            if first and curvature <= 0.0:
                length = float(norm(p))
                raise indefinite(curvature / length / length)  # its square may underflow
            if before is not None:
                before.compare(p, product, curvature)
                before = None
            if curvature <= 0.0:
                break
            step = rho / curvature
            # In the first step p is r itself, or what the preconditioner gave; pairs that are kept stay as they are.
            over = steps > 1 and not self.pairs
            e = step * p if e is None else e.add_(p, alpha=step)
            r = torch.sub(r, product, alpha=step, out=r if over else None)
            z = self._preconditioned(r)
            new_rho = float(torch.dot(r, z))
            turn, rho = new_rho / rho, new_rho
            last, p = p, torch.add(z, p, alpha=turn, out=p if over else None)
            if first and steps == 1:
                plain = self.inverse is None
                direction = (residual, scale) if plain else (last, 1.0)
                size_last = 1.0 if plain else float(norm(last))
                across = float(torch.dot(p, product))
                before = _Before(*direction, size_last, float(norm(product)), curvature, across)
            del last, product
            if self._settled(scale, e):
                break
            # Without a preconditioner rho is |r|^2, of an r that was scaled to unit size.
            left = math.sqrt(rho) if self.inverse is None else float(norm(r))
            if rho <= 0.0 and left > goal:
                raise indefinite_preconditioner(rho)
        if e is None:
            return torch.zeros_like(r), steps
        return e.mul_(scale), steps

    def _tracked(self, residual: Tensor, size: Tensor, target: Tensor, most: int, first: bool) -> tuple[Tensor, int]:
        """With grad, or inside a transform: one flag a system; those that are done stand still while others go on."""
        scale = torch.where(size > 0.0, size, 1.0)
        goal = target / scale
        r = residual / scale
        z = self._preconditioned(r)
        p, rho = z, torch.dot(r, z)
        e = torch.zeros_like(r)
        moving = (size / scale) > goal
        before: tuple[Tensor, Tensor] | None = None
        steps = 0
        if self.inverse is not None and _lowest(moving, rho) <= 0.0:
            raise indefinite_preconditioner(_lowest(moving, rho))
        while steps < most and concrete(moving):
            product = self.matvec(p)
            steps += 1
            self._note(p, product)
            curvature = torch.dot(p, product)
            if first:
                if _lowest(moving, curvature) <= 0.0:
                    raise indefinite(_lowest(moving, curvature / norm(p).square()))
                if steps == 2 and before is not None:
                    _compare(moving, *before, p, product)
            moving = moving & ((curvature > 0.0) | torch.isnan(curvature))
            step = torch.where(moving, rho / torch.where(moving, curvature, 1.0), 0.0)
            e = torch.addcmul(e, step, p)
            r = torch.addcmul(r, step, product, value=-1.0)
            z = self._preconditioned(r)
            new_rho = torch.dot(r, z)
            before = p, product
            p = torch.addcmul(z, torch.where(moving, new_rho / torch.where(moving, rho, 1.0), 0.0), p)
            rho = torch.where(moving, new_rho, rho)
            if self._settled(scale, e):
                break
            moving = moving & ((rho.sqrt() if self.inverse is None else norm(r)) > goal)
            if self.inverse is not None and _lowest(moving, rho) <= 0.0:
                raise indefinite_preconditioner(_lowest(moving, rho))
        return scale * e, steps

    def _preconditioned(self, residual: Tensor) -> Tensor:
        return residual if self.inverse is None else self.inverse(residual)

    def _settled(self, scale: Tensor | float, e: Tensor) -> bool:
        """Whether the watch, if there is one and it wants to look now, has seen enough."""
        if self.watch is None or not self.watch.due(self._seen):
            return False
        self.watch.look(self._seen, scale * e if self.start is None else self.start + scale * e)
        return self.watch.satisfied

    def _note(self, p: Tensor, product: Tensor) -> None:
        if self.watch is not None:
            curvature = torch.dot(p, product) / torch.dot(p, p)  # NaN of a system that is done: neither below nor above
            self.least = min(self.least, -concrete(torch.where(curvature > 0.0, -curvature, -torch.inf)))
            self.largest = max(self.largest, concrete(torch.where(curvature > 0.0, curvature, 0.0)))
        if self.pairs and self._seen % self._stride == 0:
            if len(self.directions) == self.pairs:
                # Twice as far apart from here on, and so before.
                self._stride *= 2
                self.directions, self.products = self.directions[::2], self.products[::2]
            if self._seen % self._stride == 0:
                self.directions.append(p)
                self.products.append(product)
        self._seen += 1


@dataclass(frozen=True)
class _Before:
    """What is kept of the first step until the second: p = `direction` / `scale`, |p|, |Ap|, p'Ap, and q'Ap."""

    direction: Tensor
    scale: float
    size: float
    product_size: float
    curvature: float
    across: float

    def compare(self, q: Tensor, product: Tensor, curvature: float) -> None:
        """Raise when p'(Aq) and q'(Ap) differ by more than rounding."""
        gap = abs(float(torch.dot(self.direction, product)) / self.scale - self.across)
        tolerance = asymmetry_tolerance(q.dtype)
        # The curvatures bound |p| |Aq| or |q| |Ap| from below, and mostly spare the long vectors' norms.
        if curvature > 0.0 and gap <= tolerance * math.sqrt(self.curvature * curvature):
            return
        scale = max(self.size * float(norm(product)), float(norm(q)) * self.product_size)
        apart = gap / scale if scale > 0.0 else gap
        if apart > tolerance:
            raise not_symmetric(apart)


def _compare(moving: Tensor, p: Tensor, product_p: Tensor, q: Tensor, product_q: Tensor) -> None:
    scale = torch.maximum(norm(p) * norm(product_q), norm(q) * norm(product_p))
    apart = (torch.dot(p, product_q) - torch.dot(q, product_p)).abs() / torch.where(scale > 0.0, scale, 1.0)
    most_apart = concrete(torch.where(moving, apart, 0.0))
    if most_apart > asymmetry_tolerance(p.dtype):
        raise not_symmetric(most_apart)


def _lowest(moving: Tensor, values: Tensor) -> float:
    """Over the systems that are not done."""
    return -concrete(torch.where(moving, -values, -torch.inf))


def indefinite(relative: float) -> IndefiniteSystemError:
    """Of a direction p with this p'Ap / p'p."""
    return IndefiniteSystemError(
        f"ConjugateGradient met a direction p with curvature p'Ap / p'p = {relative:.3g}; it needs a positive "
        "definite system. The follower is not at a strict minimum: solve its problem further, or add "
        f"damping={max(-2.0 * relative, 1e-3):.1g} or more, or use GMRES(), which needs no definiteness."
    )


def not_symmetric(apart: float) -> NotSymmetricError:
    """Of products this far apart, relative to their size."""
    return NotSymmetricError(
        f"ConjugateGradient was promised symmetric=True, but p'(Aq) and q'(Ap) differ by {apart:.2g} of their "
        "size. Use GMRES(), or Dense() for a few hundred unknowns, and give the operator symmetric=False."
    )


def indefinite_preconditioner(product: float) -> IndefiniteSystemError:
    """Of this r'M^-1 r."""
    return IndefiniteSystemError(
        f"ConjugateGradient's preconditioner gave r'M^-1 r = {product:.3g} for a residual r; it has to be symmetric "
        "positive definite. Leave it out, or damp it."
    )
