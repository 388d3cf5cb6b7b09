"""The iteration of conjugate gradients, from a residual to a correction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import IndefiniteSystemError, NonFiniteError, NotSymmetricError
from bilevel.linear.arithmetic import Arithmetic, Flag, Scalar, arithmetic
from bilevel.linear.lanczos import extreme_eigenvalues
from bilevel.linear.norms import asymmetry_tolerance, largest_entry
from bilevel.linear.operator import LinearOperator
from bilevel.linear.stopping import Watch


class Iteration:
    """One solve's iterations, and the pairs (p, A p) that they went through, evenly spaced.

    `inverse` is M^-1, `pairs` how many pairs to keep, `watch` looks at the solution on the way, which began at `start`.
    Curvatures p'Ap / p'p that a watched solve met lie between `least` and `largest`, which in the end are near A's
    extreme eigenvalues.

    Written once, over two kinds of `Arithmetic`: with tensors for scalars and no vector written over, one float32
    system takes 1.06 times as long with 7,850 unknowns and 1.16 times with a million, products included.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        *,
        inverse: Callable[[Tensor], Tensor] | None = None,
        pairs: int = 0,
        watch: Watch | None = None,
        start: Tensor | None = None,
    ) -> None:
        self.matvec, self.inverse, self.pairs, self.watch, self.start = matvec, inverse, pairs, watch, start
        self.least, self.largest = math.inf, 0.0
        self.directions: list[Tensor] = []
        self.products: list[Tensor] = []
        self._stride, self._seen = 1, 0

    def correct(self, residual: Tensor, size: Tensor, target: Tensor, most: int, first: bool) -> tuple[Tensor, int]:
        """The e `[n]` that takes A e from 0 towards `residual`, of norm `size`, and the steps taken.

        `first`: whether its directions may tell that A is indefinite or not symmetric. After a restart they are
        rounding's: one without curvature ends the search, and proves nothing.
        """
        on = arithmetic()
        # Unit size, because curvatures are squares, and squares of small float32 numbers underflow to "indefinite".
        whole = on.scalar(size)
        scale = on.either(whole > 0.0, whole, 1.0)
        goal, left = on.scalar(target) / scale, whole / scale
        moving = left > goal
        r = residual / scale
        z = self._preconditioned(r)
        p, rho = z, on.dot(r, z)
        self._require_definite(on, moving, rho, r, z)
        e: Tensor | None = None
        before: _Before | None = None
        steps = 0
        while steps < most and on.some(moving):
            product = self.matvec(p)
            steps += 1
            self._note(p, product)
            curvature = on.dot(p, product)
            if first and on.lowest(moving, curvature) <= 0.0:
                length = on.norm(p)
                self._refuse_indefinite(on.lowest(moving, curvature / length / length), p, e)  # p'p may underflow
            if before is not None:
                before.compare(on, moving, p, product, curvature)
                before = None
            moving = on.either(curvature <= 0.0, False, moving)  # a NaN goes on, to be reported
            step = on.ratio(moving, rho, curvature)
            # In the first step p is r itself, or what the preconditioner gave; pairs that are kept stay as they are.
            over = steps > 1 and not self.pairs
            e = step * p if e is None else on.add(e, step, p, into=e)
            r = on.add(r, -step, product, into=r if over else None)
            z = self._preconditioned(r)
            new_rho = on.dot(r, z)
            turn, rho = on.ratio(moving, new_rho, rho), on.either(moving, new_rho, rho)
            last, p = p, on.add(z, turn, p, into=p if over else None)
            if first and steps == 1:
                # Without a preconditioner p is the residual, scaled, which is kept anyhow.
                kept, by, length = (residual, scale, left) if self.inverse is None else (last, 1.0, on.norm(last))
                before = _Before(kept, by, length, on.norm(product), curvature, on.dot(p, product))
            del last, product
            if self._settled(scale, e):
                break
            # Without a preconditioner rho is |r|^2, of an r that was scaled to unit size.
            moving = moving & ((on.root(rho) if self.inverse is None else on.norm(r)) > goal)
            self._require_definite(on, moving, rho, r, z)
        if e is None:
            return torch.zeros_like(r), steps
        return on.scaled(e, scale), steps

    def _preconditioned(self, residual: Tensor) -> Tensor:
        return residual if self.inverse is None else self.inverse(residual)

    def _require_definite(self, on: Arithmetic, moving: Flag, rho: Scalar, r: Tensor, z: Tensor) -> None:
        """Of the preconditioner, by rho = r'M^-1 r with z = M^-1 r."""
        if self.inverse is None:
            return
        least = on.lowest(moving, rho)
        if least <= 0.0:
            raise IndefiniteSystemError(
                f"ConjugateGradient's preconditioner gave r'M^-1 r = {least:.3g} for a residual r; it has to be "
                "symmetric positive definite. Leave it out, or damp it."
            )
        if math.isfinite(least) or not on.some(moving):
            return
        if math.isfinite(largest_entry(r)) and not math.isfinite(largest_entry(z)):
            raise NonFiniteError(
                "ConjugateGradient's preconditioner gave NaN or infinite entries for a finite residual. Leave it out, "
                "or look for a division by zero in it."
            )

    def _refuse_indefinite(self, relative: float, p: Tensor, e: Tensor | None) -> None:
        """Raise for a direction p with this p'Ap / p'p <= 0, unless rounding alone put it below 0.

        What rounding may have done is told from A's largest eigenvalue, for 30 products at most. Where A is flat along
        p, the search ends with what it has; its residual tells how much that is.
        """
        if transforms_active():  # one number for all systems at once
            raise _indefinite(relative, relative)
        spectrum = extreme_eigenvalues(LinearOperator(self.matvec, symmetric=True), p)
        lowest = min(relative, spectrum.smallest)
        if lowest < -spectrum.rounding:
            raise _indefinite(relative, lowest)
        if e is None:
            raise IndefiniteSystemError(
                f"ConjugateGradient met a direction p with curvature p'Ap / p'p = {relative:.3g}; that is 0 up to "
                f"rounding ({spectrum.rounding:.1g}), and p is its whole right-hand side. The follower's optimum is "
                "not unique: add damping=0.001 or more, or a small penalty on its variables. GMRES() would not help."
            )

    def _settled(self, scale: Scalar, e: Tensor) -> bool:
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


@dataclass(frozen=True, eq=False)
class _Before:
    """What is kept of the first step until the second: p = `direction` / `scale`, |p|, |Ap|, p'Ap, and q'Ap."""

    direction: Tensor
    scale: Scalar
    size: Scalar
    product_size: Scalar
    curvature: Scalar
    across: Scalar

    def compare(self, on: Arithmetic, moving: Flag, q: Tensor, product: Tensor, curvature: Scalar) -> None:
        """Raise when p'(Aq) and q'(Ap) differ by more than rounding."""
        gap = abs(on.dot(self.direction, product) / self.scale - self.across)
        tolerance = asymmetry_tolerance(q.dtype)
        # The curvatures bound |p| |Aq| or |q| |Ap| from below, and mostly spare the long vectors' norms.
        bound = on.root(on.either(moving, self.curvature, 1.0)) * on.root(on.either(moving, curvature, 1.0))
        if on.highest(moving, gap - tolerance * bound) <= 0.0:
            return
        scale = on.larger(self.size * on.norm(product), on.norm(q) * self.product_size)
        apart = on.highest(moving, gap / on.either(scale > 0.0, scale, 1.0))
        if apart > tolerance:
            raise NotSymmetricError(
                f"ConjugateGradient was promised symmetric=True, but p'(Aq) and q'(Ap) differ by {apart:.2g} of their "
                "size. Use GMRES(), or Dense() for a few hundred unknowns, and give the operator symmetric=False."
            )


def _indefinite(relative: float, lowest: float) -> IndefiniteSystemError:
    """Of a direction p with this p'Ap / p'p, where A has an eigenvalue at or below `lowest`."""
    return IndefiniteSystemError(
        f"ConjugateGradient met a direction p with curvature p'Ap / p'p = {relative:.3g}; it needs a positive "
        "definite system. The follower is not at a strict minimum: solve its problem further, or add "
        f"damping={max(-2.0 * lowest, 1e-3):.1g} or more, or use GMRES(), which needs no definiteness."
    )
