"""What every linear solver takes and gives: products in, a solution with its residual out."""

from __future__ import annotations

import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import ConvergenceError, NonConvergenceWarning, NonFiniteError, NotSymmetricError


@dataclass(frozen=True)
class LinearOperator:
    """A square matrix A `[n, n]` known only through its products.

    `matvec` maps `v: [n]` to `A v: [n]` and leaves `v` alone. `symmetric` is a promise of the caller that A equals its
    transpose; solvers that need it refuse an operator without it.

    `checked`, where it is given, is taken instead of `matvec` for the product with a vector that may be the answer: a
    caller who needs more than A u at the answer gets it from the product that measures the residual there. `interest`
    maps u to what it is needed for: the hypergradient, for an adjoint.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> LinearOperator(matrix.mv, symmetric=True).damped(0.5).matvec(torch.tensor([1.0, 0.0]))
    tensor([2.5000, 1.0000])
    """

    matvec: Callable[[Tensor], Tensor]
    symmetric: bool = False
    checked: Callable[[Tensor], Tensor] | None = None
    interest: Callable[[Tensor], Tensor] | None = None

    def damped(self, damping: float) -> LinearOperator:
        """A + damping * I."""
        if damping == 0.0:
            return self
        checked = self.checked
        return LinearOperator(
            lambda v: self.matvec(v) + damping * v,
            self.symmetric,
            None if checked is None else lambda v: checked(v) + damping * v,
            self.interest,
        )

    def residual(self, rhs: Tensor, solution: Tensor, *, last: bool = True, out: Tensor | None = None) -> Tensor:
        """rhs - A u `[n]`, at one product, for a u `[n]` that may be the answer if `last`; written into `out: [n]`."""
        product = self.checked if last and self.checked is not None else self.matvec
        return torch.sub(rhs, product(solution), out=out)


@dataclass(frozen=True)
class LinearSolution:
    """What a solver found for (A + damping I) u = b.

    `solution`: u `[n]`. `residual_norm`: |b - (A + damping I) u|, a 0-d tensor, computed from u itself. `products`:
    how many products with A it took. `converged`: whether it is as good as was asked for. `error`: the estimated
    relative error of what u is needed for, where the solver was asked to look at it, else NaN; infinite where the
    solve was over before it had looked often enough. Inside `torch.func.vmap` the first two are one per system; the
    others are plain numbers that speak for the whole batch.
    """

    solution: Tensor
    residual_norm: Tensor
    products: int
    converged: bool
    error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Solves (A + damping I) u = b from products with A.

    Converged means |b - (A + damping I) u| <= max(rtol |b|, atol). With `rtol=None` no accuracy is asked for: the
    answer is what the method's definition makes it, its residual is reported, and nothing warns. A solver that
    stops short of its tolerance issues a `NonConvergenceWarning` with the residual and the wanted tolerance, or
    raises `ConvergenceError` when `strict`.

    A small residual is not a small error: |u - u*| <= |residual| / (smallest singular value of A + damping I).
    """

    rtol: float | None = 1e-6
    atol: float = 0.0
    damping: float = 0.0
    strict: bool = False

    def __new__(cls, *args: object, **options: object) -> LinearSolver:
        """Say who stops by more than a residual, where Python would only say that this solver does not."""
        if "stopping" in options and "stopping" not in inspect.signature(cls.__init__).parameters:
            raise TypeError(
                f"{cls.__name__} was given stopping={options['stopping']!r}, but ends by its residual alone: rtol=. "
                "On a symmetric system ConjugateGradient(stopping=...) looks at the hypergradient as well."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuse settings that no system can meet."""
        wanted = "a finite number >= 0"
        self._require("rtol", self.rtol is None or 0.0 <= self.rtol < math.inf, f"{wanted}, or None for no accuracy")
        self._require("atol", 0.0 <= self.atol < math.inf, wanted)
        self._require("damping", 0.0 <= self.damping < math.inf, f"{wanted}; it is added to the diagonal")

    @property
    def needs_symmetry(self) -> bool:
        """Whether it refuses a system that is not symmetric."""
        return False

    @property
    def from_optimizer(self) -> bool:
        """Whether it depends on what the follower's own optimiser remembers, and refuses one that remembers nothing."""
        return False

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """What the method keeps from one system to the next like it, for `like: [n]` unknowns; {} if nothing.

        A solver that keeps something takes it as `solve(..., memory=)`, and writes it in place.
        """
        return {}

    def loosened(self, factor: float) -> LinearSolver:
        """The same solver with `rtol` this many times larger, up to 1/2 where it is below that."""
        if self.rtol is None or factor <= 1.0:
            return self
        return replace(self, rtol=loosened(self.rtol, factor))

    def inform(self, memory: dict[str, Tensor], optimizer: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027
        """Take note of what the follower's torch.optim optimiser remembers of each leaf; writes `memory` in place."""

    @abstractmethod
    def solve(self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None) -> LinearSolution:
        """u `[n]` with (A + damping I) u = rhs, started from `initial: [n]` where the method can use it."""

    def tolerance(self, rhs: Tensor) -> Tensor:
        """The residual norm below which a solution counts as converged, a 0-d tensor."""
        return self._tolerance(norm(rhs))

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
        """|rhs|, a 0-d tensor, of a system that can be solved; refuse others. Where it is 0, so is the solution."""
        name = type(self).__name__
        if rhs.dim() != 1 or rhs.numel() == 0 or not rhs.is_floating_point():
            raise ValueError(
                f"{name} was given a right-hand side {list(rhs.shape)} of {rhs.dtype}; it wants one floating-point "
                "vector [n], n >= 1. Flatten what you have, and use torch.func.vmap for several systems."
            )
        size = norm(rhs)
        # Only a norm that overflows leaves open whether all entries are finite.
        if not math.isfinite(concrete(size)) and not math.isfinite(_largest(rhs)):
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
            if not math.isfinite(_largest(initial)):
                raise NonFiniteError(f"{name} was given an initial with NaN or infinite entries. Start from None.")
        return size

    def _conclude(
        self, solution: Tensor, residual_norm: Tensor, size: Tensor, products: int, *, remedy: str = "more max_steps"
    ) -> LinearSolution:
        """Judge |rhs - (A + damping I) solution| beside `size` = |rhs|: warn or raise when it misses the tolerance."""
        worst = concrete(residual_norm)
        if not math.isfinite(worst):
            raise NonFiniteError(
                f"{type(self).__name__} met NaN or infinite numbers within {products} products. Either the products "
                "with A are not finite, or the system is so close to singular that its solution overflows: add damping."
            )
        converged = self.rtol is not None and concrete(residual_norm - self._tolerance(size)) <= 0.0
        if self.rtol is not None and not converged:
            message = (
                f"{type(self).__name__} stopped after {products} products at a residual of {worst:.3g} "
                f"(|b| = {concrete(size):.3g}); wanted max({self.rtol:g} |b|, {self.atol:g}). Give it "
                f"{remedy}, more damping, or a larger rtol: at best, that of a well-conditioned system, {size.dtype} "
                f"resolves {torch.finfo(size.dtype).eps:.1g}."
            )
            self._complain(message)
        return LinearSolution(solution, residual_norm, products, converged)

    def _complain(self, message: str) -> None:
        """Warn that the accuracy asked for was missed; raise when `strict`."""
        if self.strict:
            raise ConvergenceError(message)
        warnings.warn(message, NonConvergenceWarning, stacklevel=4)


def loosened(tolerance: float, factor: float) -> float:
    """A tolerance this many times larger, up to 1/2 where it is below that."""
    return max(tolerance, min(0.5, factor * tolerance))


def _largest(vector: Tensor) -> float:
    """The largest absolute value, NaN if there is one; in a batch over all of it."""
    if transforms_active():
        return concrete(vector.abs().amax())
    low, high = torch.aminmax(vector.detach())  # no vector of its own
    return float(torch.maximum(-low, high))


def norm(vector: Tensor) -> Tensor:
    """|vector|, a 0-d tensor that is 0 only for the zero vector."""
    if not transforms_active():
        plain: Tensor = torch.linalg.vector_norm(vector)
        # Far from where squares underflow or overflow: a sixth of what the careful way below costs.
        limits = torch.finfo(vector.dtype)
        if limits.tiny**0.5 / limits.eps < float(plain.detach()) < limits.max**0.5:
            return plain
    # The squares of a float32 gradient of 1e-23 underflow, and a residual of 0 would be a lie.
    largest = vector.abs().amax()
    scale = torch.where(largest > 0.0, largest, 1.0)
    size: Tensor = scale * torch.linalg.vector_norm(vector / scale)
    return size


def asymmetry_tolerance(dtype: torch.dtype) -> float:
    """How far p'(A q) and q'(A p) may lie apart, relative to max(|p| |A q|, |q| |A p|), before A is not symmetric.

    Products carry an error of c eps |A| |p| with c around 1 to 10, so what rounding does is small against |A| |p| |q|,
    but a warm start lies where A is small: |A p| = s |A| |p|, s << 1. Conjugate gradients then take a step of 1/(s |A|)
    along p, which turns the rounding of A p into a share eps/s of the next q. So max(s, eps/s) >= sqrt(eps) bounds the
    scale from below, and c eps / sqrt(eps) the effect of rounding: 1.5e-7 in float64, 3.5e-3 in float32.
    """
    return 10.0 * math.sqrt(torch.finfo(dtype).eps)
