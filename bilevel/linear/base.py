"""The contract of every linear solver: products in, a solution with its residual out."""

from __future__ import annotations

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

from bilevel._returned import Lent, described, require_like
from bilevel.autodiff import concrete
from bilevel.errors import (
    ConvergenceError,
    LinearNonConvergenceWarning,
    NonFiniteError,
    NotSymmetricError,
    require_kinds,
)
from bilevel.linear.norms import largest_entry, norm
from bilevel.linear.operator import LinearOperator, Shapes, entries
from bilevel.linear.system import Candidate, LinearSystem, Memory, require_memory
from bilevel.sharding.tensor import entries as entries_of


@dataclass(frozen=True)
class LinearSolution:
    """What a solver found for (A + damping I) u = b.

    Inside `torch.func.vmap` the first two are one per system; the others are plain numbers that speak for the whole
    batch.

    Args:
        solution: u `[n]`.
        residual_norm: |b - (A + damping I) u|, a 0-d tensor, computed from u itself.
        products: How many products with A it took.
        converged: Whether it is as good as was asked for.
        error: The estimated relative error of what u is needed for, where the solver was asked to look at it, else NaN;
            infinite where the solve was over before it had looked often enough.
        memory: What to give the next solve of a system like this one; empty where none was given to this one.
        mixed: What `LinearOperator.matvec_and_mixed` gave at u; None where it was not taken there.
        beats_zero: Whether u is a better answer than 0, a 0-d tensor of bool: its residual is below |b|, or else, A
            being symmetric, it is nearer to the solution in the A-norm.
    """

    solution: Tensor
    residual_norm: Tensor
    products: int
    converged: bool
    error: float = math.nan
    memory: Memory = field(default_factory=dict)
    mixed: tuple[Tensor, ...] | None = None
    beats_zero: Tensor = field(default_factory=lambda: torch.tensor(True))


class SolvesLinearSystems(Protocol):
    """What an implicit derivative asks of a solver: a `LinearSolver`, or what runs one on many games at once."""

    @property
    def from_optimizer(self) -> bool:
        """Whether it depends on what the follower's own optimiser remembers."""

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """The memory before the first system."""

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """The memory with what the follower's optimiser remembers."""

    def solve(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        initial: Tensor | None = None,
        *,
        memory: Mapping[str, Tensor] | None = None,
    ) -> LinearSolution:
        """u with A u = rhs."""


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    r"""Solves a linear system from products with its matrix, to a residual that is measured.

    $$
    (A + \text{damping}\, I)\, u = b
    \qquad\text{until}\qquad
    |b - (A + \text{damping}\, I)\, u| \le \max(\text{rtol}\, |b|, \text{atol})
    $$

    A method of your own is a frozen dataclass with `iterate(system)`: the base checks what comes in, answers b = 0, and
    judges what comes out. A small residual is not a small error: |u - u*| <= |residual| / (smallest singular value of
    A + damping I). An answer that is no better than u = 0, which has the residual |b|, always warns; a longer residual
    alone does not prove that where A is symmetric, and there it is judged by the A-norm of its error as well.

    Args:
        rtol: Relative to |b|. None asks for no accuracy: the answer is what the method's definition makes it, its
            residual is reported, and it warns only where 0 were a better answer.
        atol: The least that is asked for.
        damping: Added to the diagonal of A.
        strict: Raise `ConvergenceError` when it stops short of its tolerance, instead of a
            `LinearNonConvergenceWarning`.
    """

    rtol: float | None = 1e-6
    atol: float = 0.0
    damping: float = 0.0
    strict: bool = False

    def __new__(cls, *args: object, **options: object) -> LinearSolver:
        """Say who takes an option, where Python would only say that this solver does not."""
        for name, value in options.items():
            if _takes(cls, name) or _takes(LinearSolver, name):
                continue
            takers = sorted(f"{kind.__name__}({name}=...)" for kind in _kinds() if _takes(kind, name))
            if takers:
                raise TypeError(
                    f"{cls.__name__} was given {name}={value!r}, which it does not take; {' or '.join(takers)} does."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuse settings that no system can meet."""
        require_kinds(self)
        wanted = "a finite number >= 0"
        self._require("rtol", self.rtol is None or 0.0 <= self.rtol < math.inf, f"{wanted}, or None for no accuracy")
        self._require("atol", 0.0 <= self.atol < math.inf, wanted)
        self._require("damping", 0.0 <= self.damping < math.inf, f"{wanted}; it is added to the diagonal")

    # What a method says of itself ------------------------------------------------------------------------------------

    @abstractmethod
    def iterate(self, system: LinearSystem) -> Candidate:
        """The method: u with (A + damping I) u = rhs, as `system.measure(u)` measured it.

        Take products by `system.matvec`, begin at `system.start()`, which is not to be written to, and stop once a
        residual's norm is within `system.tolerance`. A method that learns reads `system.memory` and returns
        `replace(system.measure(u), memory=...)`.
        """

    @property
    def needs_symmetry(self) -> bool:
        """Whether it refuses a system that is not symmetric."""
        return False

    @property
    def tells_indefinite(self) -> bool:
        """Whether it raises or misses its tolerance where A, being symmetric, has a direction of negative curvature.

        Who does not is asked for more, as A^-1 may hide that direction: the follower would be at a saddle.
        """
        return False

    @property
    def takes_random(self) -> bool:
        """Whether it takes an operator whose products are each with another sample of A, such as a fresh batch's."""
        return False

    @property
    def takes_parts(self) -> bool:
        """Whether its vectors may be spread over ranks: it takes products, sums and dot products of them alone."""
        return False

    @property
    def remedy(self) -> str:
        """What to give it where it stops short of its tolerance: 'Give it more steps, more damping, ...'."""
        return "more steps"

    @property
    def needs_factors(self) -> bool:
        """Whether it needs a network's Kronecker factors, `LinearOperator.factors`."""
        return False

    @property
    def from_optimizer(self) -> bool:
        """Whether it depends on what the follower's own optimiser remembers, and refuses one that remembers nothing."""
        return False

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """The memory before the first system, for `like: [n]` unknowns laid out as `shapes`; {} if it starts empty.

        What `iterate` returns as `Candidate.memory` is kept from system to system in any case.
        """
        return {}

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """The memory with what the follower's torch.optim optimiser remembers of each leaf; `[]` where it has none."""
        return memory

    def loosened(self, factor: float) -> LinearSolver:
        """The same solver with `rtol` this many times larger, up to 1/2 where it is below that."""
        if self.rtol is None or factor <= 1.0:
            return self
        return replace(self, rtol=loosened(self.rtol, factor))

    # What everybody calls --------------------------------------------------------------------------------------------

    @final
    def solve(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        initial: Tensor | None = None,
        *,
        memory: Mapping[str, Tensor] | None = None,
    ) -> LinearSolution:
        """u `[n]` with (A + damping I) u = rhs.

        Args:
            operator: A.
            rhs: `[n]`. Where it is 0, so is the solution, at no product.
            initial: where to start, `[n]`, for methods that start somewhere.
            memory: what earlier solves learned: `init(rhs)` or {} at first, then the last solution's `memory`. It is
                not written to. None: nothing is kept.

        Raises:
            ValueError: for vectors or a layout that cannot be of one system.
            NonFiniteError: for NaN or infinity in them or in products.
            NotSymmetricError: where `needs_symmetry` and the operator does not promise it.
            ConvergenceError: when `strict`, for a residual above the tolerance, or a solution that is worse than 0.

        The residual of an operator with `random=True` is that of one more sample, in which nothing is judged.
        """
        if self.needs_symmetry:
            self._require_symmetric(operator)
        if operator.random:
            self.require_random()
        size = self._size(rhs, initial)
        if operator.shapes is not None and entries(operator.shapes) != rhs.numel():
            raise ValueError(
                f"{type(self).__name__} was given an operator with shapes={[tuple(s) for s in operator.shapes]}, which "
                f"have {entries(operator.shapes)} entries; the right-hand side has {rhs.numel()}."
            )
        system = LinearSystem.of(operator, self.damping, rhs, size, self._tolerance(size))
        if concrete(size) == 0.0:
            return self._judged(system, Candidate(torch.zeros_like(rhs), rhs, size), memory)
        # What has an empty memory begins it, as what is given none does.
        known = dict(memory) if memory else self.init(rhs, operator.shapes)
        require_memory(known, f"{type(self).__name__}.init: what it returned")
        system = replace(system, initial=initial, memory=known, keeps=memory is not None)
        return self._judged(system, self._iterated(system), memory)

    def _iterated(self, system: LinearSystem) -> Candidate:
        """What `iterate` returns, held to its contract; measured here where it was not."""
        name, lent = f"{type(self).__name__}.iterate", Lent()
        lent.note("system.rhs", system.rhs)
        lent.note("system.initial", system.initial)
        lent.note("system.memory", system.memory)
        found = self.iterate(system)
        if not isinstance(found, Candidate):
            raise TypeError(
                f"{name} returned {described(found)}; expected what system.measure(u) returns, u with its true "
                "residual."
            )
        lent.require_untouched(name)
        require_like(found.solution, system.rhs, f"{name}: the solution that it returned")
        if found.memory is not None:
            require_memory(found.memory, f"{name}: the memory that it returned")
        if not found.true:
            measured = system.measure(found.solution)
            given = {n: getattr(found, n) for n in ("memory", "error", "enough", "shortfall")}
            return replace(measured, **given)
        return found

    def require_random(self) -> None:
        """Raise `ValueError` unless it can take products that are each with another sample of A."""
        name = type(self).__name__
        if not self.takes_random:
            raise ValueError(
                f"{name} needs one matrix for all its products, and each would be with another sample of it, such as "
                "a fresh batch's. Use Neumann(rtol=None) or linear.StochasticGradient(step_size=...), or products "
                "with one matrix: responses.HeldBatch(), or AllBatches()."
            )
        if self.rtol is not None:
            raise ValueError(
                f"{name} was given rtol={self.rtol:g}, by which a solve ends; the residual of random products is "
                "noise, and an end that depends on it biases the answer. Give rtol=None and a number of steps."
            )

    def tolerance(self, rhs: Tensor) -> Tensor:
        """The residual norm below which a solution counts as converged, a 0-d tensor."""
        return self._tolerance(norm(rhs))

    # ------------------------------------------------------------------------------------------------------------------

    def _tolerance(self, size: Tensor) -> Tensor:
        """The same from |rhs|, which one pass over a long vector gives."""
        relative = 0.0 if self.rtol is None else self.rtol
        return torch.clamp(relative * size, min=self.atol)

    def _require(self, name: str, fulfilled: bool, wanted: str) -> None:
        if not fulfilled:
            raise ValueError(f"{type(self).__name__} was given {name}={getattr(self, name)!r}; it wants {wanted}.")

    def _require_symmetric(self, operator: LinearOperator) -> None:
        if not operator.symmetric:
            raise NotSymmetricError(
                f"{type(self).__name__} needs a symmetric system; this operator says symmetric=False. Use GMRES(), "
                "or Dense() for a few hundred unknowns."
            )

    def _size(self, rhs: Tensor, initial: Tensor | None) -> Tensor:
        """|rhs|, a 0-d tensor, of a system that can be solved; refuse others."""
        name = type(self).__name__
        if rhs.dim() != 1 or entries_of(rhs) == 0 or not rhs.is_floating_point():
            raise ValueError(
                f"{name} was given a right-hand side {list(rhs.shape)} of {rhs.dtype}; it wants one floating-point "
                "vector [n], n >= 1. Flatten what you have, and use torch.func.vmap for several systems."
            )
        size = norm(rhs)
        # Only a norm that overflows leaves open whether all entries are finite.
        if not math.isfinite(concrete(size)) and not math.isfinite(largest_entry(rhs)):
            raise NonFiniteError(
                f"{name} was given a right-hand side [{rhs.numel()}] with NaN or infinite entries. It is usually the "
                "gradient of an objective: look for what made that non-finite."
            )
        if initial is not None:
            if initial.shape != rhs.shape or initial.dtype != rhs.dtype:
                raise ValueError(
                    f"{name} was given an initial {list(initial.shape)} of {initial.dtype}; the right-hand side is "
                    f"{list(rhs.shape)} of {rhs.dtype}. Give one like it, or None to start from 0."
                )
            if not math.isfinite(largest_entry(initial)):
                raise NonFiniteError(f"{name} was given an initial with NaN or infinite entries. Start from None.")
        return size

    def _judged(self, system: LinearSystem, found: Candidate, memory: Mapping[str, Tensor] | None) -> LinearSolution:
        """The solution that a candidate is; warn or raise when it misses the tolerance."""
        worst, products = concrete(found.residual_norm), system.products
        if not math.isfinite(worst):
            raise NonFiniteError(
                f"{type(self).__name__} met NaN or infinite numbers within {products} products. Either the products "
                "with A are not finite, or the system is so close to singular that its solution overflows: add damping."
            )
        if system.operator.random:
            learned = {} if memory is None else dict(memory) if found.memory is None else found.memory
            solution = found.solution.contiguous()
            return LinearSolution(solution, found.residual_norm, products, False, memory=learned, mixed=found.mixed)
        within = self.rtol is not None and concrete(found.residual_norm - system.tolerance) <= 0.0
        beats_zero = self._beats_zero(system, found)
        missed = "" if within or found.enough else found.shortfall
        if self.rtol is not None and not (within or found.enough):
            missed = self._missed(system, worst)
        if not missed and concrete(~beats_zero) > 0.0:
            missed = self._worse_than_zero(system, found)
        self._complain(missed)
        learned = {} if memory is None else dict(memory) if found.memory is None else found.memory
        return LinearSolution(
            found.solution.contiguous(),  # a start that is the answer may be a 0 that takes no memory
            found.residual_norm,
            products,
            within or found.enough,
            found.error,
            learned,
            found.mixed,
            beats_zero,
        )

    def _beats_zero(self, system: LinearSystem, found: Candidate) -> Tensor:
        """Whether a candidate is worth more than the answer 0, a 0-d tensor of bool."""
        size, left = system.rhs_norm, found.residual_norm
        # |b| less a few roundings: a method that gains nothing ends on either side of it.
        good = (left < (1.0 - 10.0 * torch.finfo(size.dtype).eps) * size) | (left <= self.atol) | (size == 0.0)
        if self.rtol is not None and self.rtol >= 1.0:  # 0 is as good as was asked for
            good = good | (left <= size)
        if not system.symmetric or found.enough or concrete(~good) <= 0.0:
            return good | found.enough
        # The energy u'Au / 2 - b'u, which is 0 at 0, is half the squared A-norm of the error up to a constant. With
        # r = b - Au it is -u'(b + r) / 2. Conjugate gradients lower it at every step, while their |r| may grow.
        u, b, r = found.solution, system.rhs, found.residual
        return good | ((torch.dot(u, b - r) > 0.0) & (torch.dot(u, b + r) > 0.0))

    def _worse_than_zero(self, system: LinearSystem, found: Candidate) -> str:
        size = system.rhs_norm
        ratio = concrete(found.residual_norm / torch.where(size > 0.0, size, 1.0))
        return (
            f"{type(self).__name__} answered after {system.products} products with a residual of {ratio:.3g} |b|. The "
            f"answer 0 has a residual of |b|, so this one is no better than none, and a hypergradient made of it can "
            f"be {ratio:.2g} times too large. Give it {self.remedy}, more damping, or use another solver."
        )

    def _missed(self, system: LinearSystem, residual: float) -> str:
        size = system.rhs_norm
        return (
            f"{type(self).__name__} stopped after {system.products} products at a residual of {residual:.3g} "
            f"(|b| = {concrete(size):.3g}); wanted max({self.rtol:g} |b|, {self.atol:g}). Give it "
            f"{self.remedy}, more damping, or a larger rtol: at best, that of a well-conditioned system, {size.dtype} "
            f"resolves {torch.finfo(size.dtype).eps:.1g}."
        )

    def _complain(self, message: str) -> None:
        """Warn that the accuracy asked for was missed; raise when `strict`."""
        if message and self.strict:
            raise ConvergenceError(message)
        if message:
            warnings.warn(message, LinearNonConvergenceWarning, stacklevel=4)


def loosened(tolerance: float, factor: float) -> float:
    """A tolerance this many times larger, up to 1/2 where it is below that."""
    return max(tolerance, min(0.5, factor * tolerance))


def _takes(kind: type[Any], option: str) -> bool:
    return option in inspect.signature(kind.__init__).parameters


def _kinds(kind: type[LinearSolver] = LinearSolver) -> Iterator[type[LinearSolver]]:
    """Every solver that there is, but for private ones."""
    for sub in kind.__subclasses__():
        if not sub.__name__.startswith("_"):
            yield sub
        yield from _kinds(sub)
