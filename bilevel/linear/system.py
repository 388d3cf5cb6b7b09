"""One linear system as a method sees it: checked, its products counted, its candidates measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bilevel._returned import described, require_like
from bilevel.linear.norms import norm
from bilevel.linear.operator import KroneckerFactors, LinearOperator, Shapes
from bilevel.tree import version

Memory = dict[str, Tensor]
"""What a solver or a preconditioner learned, tensors by name: an argument and a return value, never written to."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A vector with its true residual: what a method hands back as its answer.

    Args:
        solution: u `[n]`.
        residual: Rhs - (A + damping I) u `[n]`.
        residual_norm: Its norm, a 0-d tensor.
        mixed: What came along with the product at u; see `LinearOperator.matvec_and_mixed`.
        memory: What was learned from this system, for the next one like it; None for nothing.
        error: The estimated relative error of what u is needed for; NaN where nobody estimates it.
        enough: Whether the method has what it was asked for besides a residual, so that the residual does not matter.
        shortfall: What it was asked for besides a residual and missed, in a sentence to warn with.
        measured: Of which vector the residual was measured; set by `LinearSystem`, which measures a candidate anew
            that says otherwise.
    """

    solution: Tensor
    residual: Tensor
    residual_norm: Tensor
    mixed: tuple[Tensor, ...] | None = None
    memory: Memory | None = None
    error: float = math.nan
    enough: bool = False
    shortfall: str = ""
    measured: tuple[Tensor, int, Tensor] | None = field(default=None, repr=False)

    @property
    def true(self) -> bool:
        """Whether its residual is the one that was measured, of this very solution, not written to since."""
        if self.measured is None:
            return False
        solution, writes, size = self.measured
        return self.solution is solution and version(solution) == writes and self.residual_norm is size


class _Tally:
    """A count that several views of one system share."""

    def __init__(self) -> None:
        self.count = 0

    def counting(self, operator: LinearOperator, like: Tensor) -> LinearOperator:
        """The same operator, each of whose products is counted, of vectors such as `like: [n]`."""
        matvec, both, interest = operator.matvec, operator.matvec_and_mixed, operator.interest
        factors = operator.factors
        shape, dtype = like.shape, like.dtype
        asked = "A product with A was asked for, of a vector that"

        def counted(v: Tensor) -> Tensor:
            if v.shape != shape or v.dtype != dtype:
                require_like(v, like, asked)
            self.count += 1
            product = matvec(v)
            if product.shape != shape or product.dtype != dtype:
                require_like(product, like, "A product with A, by LinearOperator.matvec,")
            return product

        def counted_both(v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            if v.shape != shape or v.dtype != dtype:
                require_like(v, like, asked)
            self.count += 1
            return both(v)  # type: ignore[misc]

        def counted_interest(u: Tensor) -> Tensor:
            if u.shape != shape or u.dtype != dtype:
                require_like(u, like, asked)
            self.count += 1
            return interest(u)  # type: ignore[misc]

        def counted_factors() -> tuple[Sequence[KroneckerFactors], int]:
            blocks, taken = factors()  # type: ignore[misc]
            self.count += taken
            return blocks, taken

        return replace(
            operator,
            matvec=counted,
            matvec_and_mixed=None if both is None else counted_both,
            interest=None if interest is None else counted_interest,
            factors=None if factors is None else counted_factors,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearSystem:
    """(A + damping I) u = rhs, checked and not trivial, for a method to solve.

    All products go through it, and are counted. Inside `torch.func.vmap` its tensors are one per system, beside some
    with rhs = 0: choose by `torch.where`, and by `concrete` where a number is needed.

    Args:
        operator: A + damping I.
        undamped: A.
        rhs: `[n]`; finite, and not all 0.
        rhs_norm: |rhs|, a 0-d tensor.
        tolerance: The residual norm below which a solution counts as converged, a 0-d tensor.
        initial: Where to start, `[n]`; None for 0.
        memory: What earlier systems taught, `init(...)` of the solver before the first. Never write to it: hand the
            new one back as `Candidate.memory`.
        keeps: Whether the caller keeps what is learned here.
        image: (A + damping I) initial, where it is known already.
    """

    operator: LinearOperator
    undamped: LinearOperator
    rhs: Tensor
    rhs_norm: Tensor
    tolerance: Tensor
    initial: Tensor | None = None
    memory: Memory = field(default_factory=dict)
    keeps: bool = False
    image: Tensor | None = None
    tally: _Tally = field(repr=False)

    @staticmethod
    def of(operator: LinearOperator, damping: float, rhs: Tensor, rhs_norm: Tensor, tolerance: Tensor) -> LinearSystem:
        """The system from 0, with nothing remembered."""
        tally = _Tally()
        undamped = tally.counting(operator, rhs)
        return LinearSystem(
            operator=undamped.damped(damping),
            undamped=undamped,
            rhs=rhs,
            rhs_norm=rhs_norm,
            tolerance=tolerance,
            tally=tally,
        )

    @property
    def symmetric(self) -> bool:
        """Whether A is promised to be symmetric."""
        return self.operator.symmetric

    @property
    def shapes(self) -> Shapes | None:
        """The layout of the unknowns, leaf after leaf, where it is known."""
        return self.operator.shapes

    @property
    def products(self) -> int:
        """How many products were taken so far."""
        return self.tally.count

    def matvec(self, v: Tensor) -> Tensor:
        """(A + damping I) v `[n]`."""
        return self.operator.matvec(v)

    def interest(self, u: Tensor) -> Tensor:
        """What u `[n]` is needed for: the hypergradient, for an adjoint; u itself where nobody said. Counts as one."""
        return u if self.operator.interest is None else self.operator.interest(u)

    def start(self) -> Candidate:
        """`initial`, at a product unless its image is known, or 0, at none and in no memory: do not write over it."""
        if self.initial is None:
            return self.with_residual(self.rhs.new_zeros(()).expand_as(self.rhs), self.rhs, self.rhs_norm)
        residual = self.rhs - (self.matvec(self.initial) if self.image is None else self.image)
        return self.with_residual(self.initial, residual, norm(residual))

    def residual(self, u: Tensor, *, out: Tensor | None = None) -> Tensor:
        """rhs - (A + damping I) u `[n]` of a u on the way, at one product; written into `out: [n]`."""
        return torch.sub(self.rhs, self.matvec(u), out=out)

    def measure(self, u: Tensor) -> Candidate:
        """A u `[n]` that may be the answer, with its true residual and what else is needed there, at one product."""
        both = self.operator.matvec_and_mixed
        product, mixed = (self.matvec(u), None) if both is None else both(u)
        residual = self.rhs - product
        return self.with_residual(u, residual, norm(residual), mixed)

    def with_residual(
        self, u: Tensor, residual: Tensor, size: Tensor, mixed: tuple[Tensor, ...] | None = None
    ) -> Candidate:
        """A u whose residual `residual(u)` gave already, of norm `size`: a candidate at no further product."""
        return Candidate(u, residual, size, mixed, measured=(u, version(u), size))


def require_memory(memory: object, who: str) -> None:
    """Raise `TypeError` for what is no memory: a dict by name."""
    if not isinstance(memory, dict) or not all(isinstance(name, str) for name in memory):
        raise TypeError(f"{who} is {described(memory)}; expected a memory: a dict of tensors by name, or {{}}.")


def nested(prefix: str, memory: Mapping[str, Tensor]) -> Memory:
    """A part's memory, to be kept inside that of the whole."""
    return {f"{prefix}.{name}": value for name, value in memory.items()}


def part_of(memory: Mapping[str, Tensor], prefix: str) -> Memory:
    """The memory of the part that `nested` put there."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in memory.items() if name.startswith(start)}
