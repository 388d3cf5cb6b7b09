"""The Nystroem approximation: a low-rank inverse from a fixed number of products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.errors import IndefiniteSystemError, NonFiniteError, NotSymmetricError, require_kinds
from bilevel.linear.base import LinearSolver
from bilevel.linear.gaussian import gaussian
from bilevel.linear.norms import asymmetry_tolerance, norm
from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import Candidate, LinearSystem


@final
@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    r"""Inverts a low-rank approximation of A plus damping, by a fixed number of products that do not depend on b.

    $$
    u = (N + \text{damping}\, I)^{-1} b, \qquad N = (A \Omega) (\Omega^\top A \Omega)^+ (A \Omega)^\top
    $$

    $\Omega$ `[n, rank]` is orthonormal, from a Gaussian sketch; N <= A, and N = A when rank >= rank(A). It takes no
    initial.

    Costs min(rank, n) products and one for the residual, n rank memory, n rank^2 work. Misleads when A has many
    eigenvalues above `damping` that the rank leaves out: their share of b is divided by the damping alone, and u is far
    too long. Source: Frangella, Tropp & Udell, arXiv 2110.02820; for hypergradients Hataya & Yamada, arXiv 2302.09726.

    Args:
        rank: Products to spend.
        damping: Above 0: N alone is singular.
        rtol: None; give one to be warned of more than an answer that is worse than 0.
        seed: Of the sketch.
        atol: Absolute tolerance of the residual.
        strict: Raise where it would warn.

    Raises:
        NotSymmetricError: If the operator does not promise symmetry, or O'AO shows that it lied.
        IndefiniteSystemError: If O'AO has a negative eigenvalue beyond rounding.

    Examples:
        >>> curvature = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
        >>> operator = LinearOperator(lambda v: curvature * v, symmetric=True)
        >>> Nystrom(rank=2, damping=1.0).solve(operator, torch.ones_like(curvature)).solution
        tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """

    rank: int
    # No default: a subclass's annotation alone would inherit 0.
    damping: float = field()
    rtol: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        super().__post_init__()
        self._require("rank", self.rank >= 1, "at least 1, the number of products to spend")
        self._require("damping", self.damping > 0.0, "a positive number: the low-rank part alone has no inverse")

    @property
    def tells_indefinite(self) -> bool:
        """The sketch has its negative eigenvalues."""
        return True

    @property
    def needs_symmetry(self) -> bool:
        """Its algebra holds for symmetric systems only."""
        return True

    @property
    def remedy(self) -> str:
        """More of the spectrum."""
        return "a larger rank"

    def iterate(self, system: LinearSystem) -> Candidate:
        """(N + damping I)^-1 rhs."""
        rhs = system.rhs
        vectors, values = eigenpairs(system.undamped, rhs, self.rank, self.seed)
        inside = vectors.mT @ rhs
        return system.measure(vectors @ (inside / (values + self.damping)) + (rhs - vectors @ inside) / self.damping)

    def preconditioner(self, operator: LinearOperator, like: Tensor) -> Callable[[Tensor], Tensor]:
        """r `[n]` to M^-1 r, M as close to A + damping I as the rank allows; `like: [n]` gives n, dtype and device.

        M^-1 = (l + damping) U (L + damping I)^-1 U' + I - U U', U L U' the approximation, l its smallest eigenvalue.
        For a `ConjugateGradient` of the same damping. Costs min(rank, n) products, once.
        """
        self._require_symmetric(operator)
        vectors, values = eigenpairs(operator, like, self.rank, self.seed)
        inside = (values[-1] + self.damping) / (values + self.damping) - 1.0
        return lambda r: r + vectors @ (inside * (vectors.mT @ r))


def eigenpairs(operator: LinearOperator, like: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """U `[n, rank]` and L `[rank]`, descending, with N = U diag(L) U' the Nystroem approximation of A."""
    n = like.numel()
    rank = min(rank, n)
    sketch = torch.linalg.qr(gaussian((n, rank), like, seed)).Q
    image = torch.stack([operator.matvec(column) for column in sketch.mT], dim=1)
    size = norm(image.flatten())
    if not math.isfinite(concrete(size)):
        raise NonFiniteError(f"Nystrom met NaN or infinite entries in {rank} products with A.")
    core = sketch.mT @ image
    _refuse_asymmetric(core, size)
    # Of A + shift I instead, so that rounding cannot make the core indefinite; taken off again at the end. The
    # smallest normal number is for A = 0.
    limits = torch.finfo(like.dtype)
    shift = 10.0 * math.sqrt(n) * limits.eps * size + limits.tiny
    core_values, core_vectors = torch.linalg.eigh(0.5 * (core + core.mT))
    lowest = -concrete(-(core_values[0] + shift))
    if lowest <= 0.0:
        raise IndefiniteSystemError(
            f"Nystrom met a negative eigenvalue of O'AO, {lowest:.3g}; it needs a positive semidefinite A. The "
            "follower is not at a minimum: solve its problem further, or use GMRES(). Damping does not help here: "
            "the approximation is of A alone."
        )
    half = (image + shift * sketch) @ (core_vectors / torch.sqrt(core_values + shift))
    vectors, roots, _ = torch.linalg.svd(half, full_matrices=False)
    return vectors, torch.clamp(roots.square() - shift, min=0.0)


def _refuse_asymmetric(core: Tensor, size: Tensor) -> None:
    apart = concrete(norm((core - core.mT).flatten()) / torch.where(size > 0.0, size, 1.0))
    if apart > asymmetry_tolerance(core.dtype):
        raise NotSymmetricError(
            f"Nystrom was promised symmetric=True, but O'AO and its transpose differ by {apart:.2g} of |AO|. Use "
            "GMRES(), or Dense() for a few hundred unknowns, and give the operator symmetric=False."
        )
