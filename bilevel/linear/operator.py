"""A matrix that is known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

Shapes = Sequence[Sequence[int]]
"""How a vector `[n]` is laid out: the shapes of the leaves that it holds, one after the other."""


@dataclass(frozen=True)
class KroneckerFactors:
    """The block of one leaf, as the Kronecker product of two small matrices and a multiple of I.

    Args:
        slots: The leaf's entries as (outputs, inputs) of its layer; for a bias (outputs, 1).
        rest: The multiple of I, a 0-d tensor.
        slopes: B `[outputs, outputs]`, positive semi-definite; None where the leaf has no factors.
        inputs: A `[inputs, inputs]`; None for a bias.
    """

    slots: tuple[int, int]
    rest: Tensor
    slopes: Tensor | None = None
    inputs: Tensor | None = None


@dataclass(frozen=True)
class LinearOperator:
    """A square matrix A `[n, n]` known only through its products.

    Args:
        matvec: Maps `v: [n]` to `A v: [n]` and leaves `v` alone.
        symmetric: A promise of the caller that A equals its transpose; solvers that need it refuse an operator without.
        shapes: The layout of the unknowns, leaf after leaf, as the leaves of a network; None where they are one vector.
        matvec_and_mixed: Maps v to A v and more that is needed at the answer, such as the mixed products of an
            implicit derivative, which share most of the work. It is taken instead of `matvec` for the product that
            measures the residual of what may be the answer, and the solution brings what came along.
        interest: Maps u to what it is needed for: the hypergradient, for an adjoint.
        random: Whether each product is with another sample of A, such as the Hessian of a fresh batch.
        factors: Gives the Kronecker factors of A's blocks, one a leaf, and what they took in products; None where A is
            no network's.

    Examples:
        >>> import torch
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> LinearOperator(matrix.mv, symmetric=True).damped(0.5).matvec(torch.tensor([1.0, 0.0]))
        tensor([2.5000, 1.0000])
    """

    matvec: Callable[[Tensor], Tensor]
    symmetric: bool = False
    shapes: Shapes | None = field(default=None, kw_only=True)
    matvec_and_mixed: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]] | None = field(default=None, kw_only=True)
    interest: Callable[[Tensor], Tensor] | None = field(default=None, kw_only=True)
    random: bool = field(default=False, kw_only=True)
    factors: Callable[[], tuple[Sequence[KroneckerFactors], int]] | None = field(default=None, kw_only=True)

    def damped(self, damping: float) -> LinearOperator:
        """A + damping * I."""
        if damping == 0.0:
            return self
        matvec, both, factors = self.matvec, self.matvec_and_mixed, self.factors

        def damped_and_mixed(v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            product, mixed = both(v)  # type: ignore[misc]
            return product + damping * v, mixed

        def damped_factors() -> tuple[Sequence[KroneckerFactors], int]:
            blocks, taken = factors()  # type: ignore[misc]
            return [replace(block, rest=block.rest + damping) for block in blocks], taken

        return replace(
            self,
            matvec=lambda v: matvec(v) + damping * v,
            matvec_and_mixed=None if both is None else damped_and_mixed,
            factors=None if factors is None else damped_factors,
        )


def entries(shapes: Shapes) -> int:
    """How many unknowns leaves of these shapes hold together."""
    return sum(math.prod(shape) for shape in shapes)
