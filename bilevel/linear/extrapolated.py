"""Where the next solve starts: the best place that the last solutions point to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import require_kinds
from bilevel.linear.base import LinearSolver
from bilevel.linear.norms import norm
from bilevel.linear.operator import Shapes
from bilevel.linear.system import Candidate, LinearSystem, Memory, nested, part_of

_OWN = "differences"


def _of_solver(name: str) -> Any:
    """In place of a field's value: that of `solver`, each time it is read."""
    return property(attrgetter(f"solver.{name}"))


@final
@dataclass(frozen=True)
class Extrapolated(LinearSolver):
    r"""Starts `solver` from the last solutions' extrapolation, with the coefficients that suit the new system best.

    $$
    u_\text{start} = \arg\min_u |u - u^*|_A, \qquad
    u \in \operatorname{span}\{u_k,\; u_k - u_{k-1},\; u_{k-1} - u_{k-2},\; \dots\}
    $$

    A leader that moves smoothly takes the adjoints $u_k$ along a smooth curve, of which a warm start at $u_k$ knows the
    last point only. The coefficients are the Galerkin ones, so that in the norm of A + damping I the start is never
    farther from the solution $u^*$ than $u_k$ is, nor than 0. Inside an `Implicit` response the differences are a part
    of its state. Called without a memory, in a `torch.func` transform, and for many games at once, `solver` starts
    where it would by itself; and so it does on a system that is not positive definite.

    Costs a product for each difference, since A has changed, and none for one that the others span. Memory `size` n,
    and thrice as much while it starts. Pays where the leader's steps are small, or smoothed by momentum: on two
    regressions along Adam's steps of 0.05 it saves a third to a half of a warm start's products to 1e-3. It does not
    pay where each step goes another way, nor where the follower jumps between optima.
    Source: Fischer 1998, "Projection techniques for iterative solution of Ax = b with successive right-hand sides".

    Args:
        solver: What is started; its `rtol`, `atol`, `damping` and `strict` are those of the whole.
        size: How many differences are kept.

    Raises:
        NotSymmetricError: If the operator does not promise symmetry.

    Examples:
        >>> from bilevel.linear import ConjugateGradient
        >>> Extrapolated(ConjugateGradient(rtol=1e-8)).rtol
        1e-08
    """

    solver: LinearSolver
    size: int = field(default=2, kw_only=True)
    # What it is asked for is what its solver is asked for: read there, and no options of its own.
    rtol: float | None = field(init=False, repr=False, compare=False, default=_of_solver("rtol"))
    atol: float = field(init=False, repr=False, compare=False, default=_of_solver("atol"))
    damping: float = field(init=False, repr=False, compare=False, default=_of_solver("damping"))
    strict: bool = field(init=False, repr=False, compare=False, default=_of_solver("strict"))

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(f"Extrapolated was given solver={self.solver!r}; it wants one such as ConjugateGradient().")
        self._require("size", self.size >= 1, "at least 1 difference of solutions to keep")

    @property
    def tells_indefinite(self) -> bool:
        """Where the solver does."""
        return self.solver.tells_indefinite

    @property
    def needs_symmetry(self) -> bool:
        """The A-norm needs it."""
        return True

    @property
    def remedy(self) -> str:
        """As `solver` says."""
        return self.solver.remedy

    @property
    def from_optimizer(self) -> bool:
        """As `solver` does."""
        return self.solver.from_optimizer

    @property
    def needs_factors(self) -> bool:
        """Whether its solver does."""
        return self.solver.needs_factors

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """Differences `[size, n]`, newest first, 0 while there are none, and the solver's memory."""
        return {_OWN: like.new_zeros(self.size, like.numel())} | nested("solver", self.solver.init(like, shapes))

    def loosened(self, factor: float) -> LinearSolver:
        """The same, from a solver that is looser."""
        return replace(self, solver=self.solver.loosened(factor))

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """As the solver takes it."""
        return memory | nested("solver", self.solver.inform(part_of(memory, "solver"), optimizer))

    def iterate(self, system: LinearSystem) -> Candidate:
        """By `solver`, from the best of the initial and what is kept."""
        memory, initial = system.memory, system.initial
        within = replace(system, memory=part_of(memory, "solver"))
        if not system.keeps:
            return self.solver.iterate(within)
        start = _best(system, memory[_OWN])
        found = self.solver.iterate(replace(within, initial=start.place, image=start.image))
        learned = nested("solver", found.memory or {})
        if initial is not None:
            learned[_OWN] = torch.cat([(found.solution - initial)[None], memory[_OWN][:-1]])
        return replace(found, memory=memory | learned)


@dataclass(frozen=True, eq=False)
class _Start:
    """u `[n]` and (A + damping I) u where it is known; None where there is nothing to start from."""

    place: Tensor | None
    image: Tensor | None


def _best(system: LinearSystem, differences: Tensor) -> _Start:
    """The nearest point to the solution, in the A-norm, of the span of an initial and of differences."""
    rhs, initial = system.rhs, system.initial
    given = [v for v in ([] if initial is None else [initial]) + list(differences) if bool(v.any())]
    if not given:
        return _Start(initial, None)
    basis, upper = torch.linalg.qr(torch.stack([v / norm(v) for v in given], dim=1))
    # What lies in the span of those before it but for rounding would cost a product and bring noise.
    basis = basis[:, upper.diagonal().abs() > torch.finfo(rhs.dtype).eps ** 0.5]
    images = torch.stack([system.matvec(column.contiguous()) for column in basis.mT], dim=1)
    core, wanted = basis.mT @ images, basis.mT @ rhs
    core = 0.5 * (core + core.mT)
    plain = torch.zeros_like(wanted) if initial is None else basis.mT @ initial

    def energy(c: Tensor) -> Tensor:
        return 0.5 * torch.dot(c, core @ c) - torch.dot(c, wanted)

    factor, failed = torch.linalg.cholesky_ex(core)
    best = torch.cholesky_solve(wanted[:, None], factor)[:, 0]
    # Written so that a NaN leaves the start alone, for the solver to report.
    if not int(failed) and bool(energy(best) < energy(plain)):
        return _Start(basis @ best, images @ best)
    return _Start(initial, images @ plain)
