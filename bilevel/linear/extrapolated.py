"""Where the next solve starts: the best place that the last solutions point to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.linear.base import LinearOperator, LinearSolution, LinearSolver, norm

_OWN = "differences"


@final
@dataclass(frozen=True)
class Extrapolated(LinearSolver):
    r"""Starts `solver` from the last solutions' extrapolation, with the coefficients that suit the new system best.

        u_start = argmin |u - u*|_A  over  span{u_k, u_k - u_(k-1), u_(k-1) - u_(k-2), ...},  u* = (A + damping I)^-1 b

    A leader that moves smoothly takes the adjoints u_k along a smooth curve, of which a warm start at u_k knows only
    the last point. The coefficients are the Galerkin ones, so that the start is never farther from u* than u_k is, nor
    than 0, in the norm of A + damping I and up to rounding. `size` is how many differences are kept. Inside an
    `Implicit` response they are a part of its state, saved and resumed with it; called by hand, in a `torch.func`
    transform, and for many games at once, `solver` starts where it would by itself.

    Costs a product for each difference, since A has changed: none before there is one, and none for one that the
    others span already. Memory `size` n, and thrice as much while it starts. Pays where the leader's steps are small,
    or smoothed by momentum: on two regressions along Adam's steps of 0.05 it saves a third to a half of a warm start's
    products to 1e-3, and a fifth to a quarter to 1e-6. It does not pay where each step goes another way, nor where the
    follower jumps from one optimum to the next, as a network can: then these products are lost.

    Raises `NotSymmetricError` when the operator does not promise symmetry, and what `solver` raises. On a system that
    is not positive definite it leaves the start alone.
    Source: Fischer 1998, "Projection techniques for iterative solution of Ax = b with successive right-hand sides",
    for an A that changes.

    >>> from bilevel.linear import ConjugateGradient
    >>> Extrapolated(ConjugateGradient(rtol=1e-8)).rtol
    1e-08
    """

    solver: LinearSolver
    size: int = field(default=2, kw_only=True)
    # What it is asked for is what its solver is asked for.
    rtol: float | None = field(init=False, repr=False, compare=False)
    atol: float = field(init=False, repr=False, compare=False)
    damping: float = field(init=False, repr=False, compare=False)
    strict: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(f"Extrapolated was given solver={self.solver!r}; it wants one such as ConjugateGradient().")
        for name in ("rtol", "atol", "damping", "strict"):
            object.__setattr__(self, name, getattr(self.solver, name))
        self._require("size", self.size >= 1, "at least 1 difference of solutions to keep")

    @property
    def needs_symmetry(self) -> bool:
        """The A-norm needs it."""
        return True

    @property
    def from_optimizer(self) -> bool:
        """As `solver` does."""
        return self.solver.from_optimizer

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Differences `[size, n]`, newest first, 0 while there are none, and the solver's memory."""
        theirs = {f"solver.{name}": value for name, value in self.solver.init(like).items()}
        return {_OWN: like.new_zeros(self.size, like.numel())} | theirs

    def loosened(self, factor: float) -> LinearSolver:
        """The same, from a solver that is looser."""
        return replace(self, solver=self.solver.loosened(factor))

    def inform(self, memory: dict[str, Tensor], optimizer: Sequence[Mapping[str, Any]]) -> None:
        """Tell the solver."""
        theirs = _theirs(memory)
        self.solver.inform(theirs, optimizer)
        memory |= {f"solver.{name}": value for name, value in theirs.items()}

    def solve(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        initial: Tensor | None = None,
        memory: dict[str, Tensor] | None = None,
    ) -> LinearSolution:
        """u `[n]` with (A + damping I) u = rhs, from the best of `initial: [n]` and what is kept."""
        self._require_symmetric(operator)
        if memory is None or concrete(self._size(rhs, initial)) == 0.0:
            return self.solver.solve(operator, rhs, initial)
        start = _best(operator.damped(self.damping), rhs, initial, memory[_OWN])
        known = _Known(operator, start, self.damping)
        theirs = _theirs(memory)
        kept: dict[str, Any] = {"memory": theirs} if theirs else {}
        found = self.solver.solve(known.operator, rhs, start.place, **kept)
        memory |= {f"solver.{name}": value for name, value in theirs.items()}
        if initial is not None:
            memory[_OWN] = torch.cat([(found.solution - initial)[None], memory[_OWN][:-1]])
        return replace(found, products=found.products + start.products - known.spared)


@dataclass(frozen=True)
class _Start:
    """u `[n]`, (A + damping I) u, and the products that it took; None where there is nothing to start from."""

    place: Tensor | None
    image: Tensor | None
    products: int


def _best(damped: LinearOperator, rhs: Tensor, initial: Tensor | None, differences: Tensor) -> _Start:
    """The nearest point to the solution, in the A-norm, of the span of an initial and of differences."""
    given = [v for v in ([] if initial is None else [initial]) + list(differences) if bool(v.any())]
    if not given:
        return _Start(initial, None, 0)
    basis, upper = torch.linalg.qr(torch.stack([v / norm(v) for v in given], dim=1))
    # What lies in the span of those before it but for rounding would cost a product and bring noise.
    basis = basis[:, upper.diagonal().abs() > torch.finfo(rhs.dtype).eps ** 0.5]
    images = torch.stack([damped.matvec(column.contiguous()) for column in basis.mT], dim=1)
    core, wanted = basis.mT @ images, basis.mT @ rhs
    core = 0.5 * (core + core.mT)
    plain = torch.zeros_like(wanted) if initial is None else basis.mT @ initial

    def energy(c: Tensor) -> Tensor:
        return 0.5 * torch.dot(c, core @ c) - torch.dot(c, wanted)

    factor, failed = torch.linalg.cholesky_ex(core)
    best = torch.cholesky_solve(wanted[:, None], factor)[:, 0]
    # Written so that a NaN leaves the start alone, for the solver to report.
    if not int(failed) and bool(energy(best) < energy(plain)):
        return _Start(basis @ best, images @ best, basis.shape[1])
    return _Start(initial, images @ plain, basis.shape[1])


class _Known:
    """An operator whose product with the start is known already, and is not taken again."""

    def __init__(self, operator: LinearOperator, start: _Start, damping: float) -> None:
        self._matvec, self._start, self._damping = operator.matvec, start, damping
        self.operator = LinearOperator(self._product, operator.symmetric, operator.checked, operator.interest)
        self.spared = 0

    def _product(self, vector: Tensor) -> Tensor:
        place, image = self._start.place, self._start.image
        if vector is not place or place is None or image is None:
            return self._matvec(vector)
        self.spared += 1
        return image - self._damping * place


def _theirs(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("solver."): value for name, value in memory.items() if name.startswith("solver.")}
