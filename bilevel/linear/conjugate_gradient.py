"""Conjugate gradients: the default for followers that sit at a minimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.linear.base import LinearOperator, LinearSolution, LinearSolver, norm
from bilevel.linear.iteration import Iteration
from bilevel.linear.preconditioner import Memory, Preconditioner
from bilevel.linear.refinement import default_steps, refine
from bilevel.linear.stopping import Stopping


@final
@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(LinearSolver):
    """Solves a symmetric positive-definite system to the tolerance asked for, or says by how much it missed.

    Minimises 1/2 u'(A + damping I)u - b'u over a Krylov space that grows by one product a step; exact after n steps
    in exact arithmetic, and the error falls by (sqrt(k) - 1)/(sqrt(k) + 1) a step for condition number k.

    `max_steps`: None is min(max(2n, 20), 1000). `preconditioner`: `Diagonal()`, `BlockDiagonal(shapes=)`,
    `NystromPreconditioner()`, `Recycled()`, `AdamPreconditioner()` or `LBFGSPreconditioner()`, which make M close
    to A + damping I and keep what they learned in `memory`; or a map from `r: [n]` to a new `M^-1 r: [n]`, M
    symmetric positive definite. `stopping=HypergradientTolerance(1e-3)` ends the solve, as converged, once what u
    is needed for has settled, whatever the residual. `initial` is used.

    Raises `NotSymmetricError` when the operator does not promise symmetry, and, at no cost, when its second product
    gives the promise the lie; `IndefiniteSystemError` when p'Ap <= 0 along a direction p, or r'M^-1 r <= 0. Both tests
    can miss: they see only the directions that the iteration visits.

    Costs one product a step, one to measure the true residual at the end, one for an initial; memory for 5 vectors. In
    float32 the residual of an ill-conditioned system stalls early; then this stops and warns.

    Source: Hestenes & Stiefel 1952; for hypergradients Pedregosa, arXiv 1602.02355.

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> operator = LinearOperator(matrix.mv, symmetric=True)
    >>> found = ConjugateGradient(rtol=1e-5).solve(operator, torch.tensor([1.0, 2.0]))
    >>> found.solution, found.products
    (tensor([0.0909, 0.6364]), 3)
    """

    max_steps: int | None = None
    preconditioner: Preconditioner | Callable[[Tensor], Tensor] | None = None
    stopping: Stopping | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        self._require("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1, or None for 2n")
        given = self.preconditioner
        if isinstance(given, type) or not (given is None or isinstance(given, Preconditioner) or callable(given)):
            raise TypeError(
                f"ConjugateGradient was given preconditioner={given!r}; it wants one such as Diagonal(), a function "
                "from r to M^-1 r, or None."
            )
        if not (self.stopping is None or isinstance(self.stopping, Stopping)):
            raise TypeError(
                f"ConjugateGradient was given stopping={self.stopping!r}; it wants "
                "HypergradientTolerance(1e-3), say, or None."
            )

    @property
    def needs_symmetry(self) -> bool:
        """Its algebra holds for symmetric systems only."""
        return True

    @property
    def from_optimizer(self) -> bool:
        """Whether its preconditioner does."""
        return isinstance(self.preconditioner, Preconditioner) and self.preconditioner.from_optimizer

    def loosened(self, factor: float) -> LinearSolver:
        """The same solver with `rtol`, and that of `stopping`, this many times larger, up to 1/2."""
        looser = super().loosened(factor)
        if self.stopping is None or factor <= 1.0 or not isinstance(looser, ConjugateGradient):
            return looser
        return replace(looser, stopping=self.stopping.loosened(factor))

    def init(self, like: Tensor) -> Memory:
        """The preconditioner's memory before the first system."""
        return self.preconditioner.init(like) if isinstance(self.preconditioner, Preconditioner) else {}

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> None:
        """Tell the preconditioner."""
        if isinstance(self.preconditioner, Preconditioner):
            self.preconditioner.inform(memory, optimizer)

    def solve(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None, memory: Memory | None = None
    ) -> LinearSolution:
        """u `[n]` with (A + damping I) u = rhs, started from `initial: [n]`."""
        self._require_symmetric(operator)
        size = self._size(rhs, initial)
        if concrete(size) == 0.0:
            return self._conclude(torch.zeros_like(rhs), size, size, 0)
        damped = operator.damped(self.damping)
        limit = default_steps(rhs.numel()) if self.max_steps is None else self.max_steps
        run = Iteration(damped.matvec)
        kept = self.init(rhs) if memory is None else memory
        if isinstance(self.preconditioner, Preconditioner):
            # Its own products are part of the price.
            run.inverse = self.preconditioner.prepare(LinearOperator(run.counted, symmetric=True), kept)
            run.pairs = self.preconditioner.pairs if memory is not None else 0
        else:
            run.inverse = self.preconditioner

        run.start = initial
        watch = None if self.stopping is None else self.stopping.watch(damped.interest or (lambda u: u))
        run.watch = watch

        def correct(residual: Tensor, left: Tensor, target: Tensor, most: int) -> tuple[Tensor, int]:
            found, steps = run.correct(residual, left, target, most, first=most == limit)
            if watch is not None:  # whose looks are at the whole solution
                run.start = found if run.start is None else run.start + found
            return found, steps

        def settled() -> bool:
            return watch is not None and watch.satisfied

        # Short of its limit it ends believing to have converged: where not even half is gone, rounding is in the way.
        wanted = self._tolerance(size)
        solution, left, products = refine(
            damped, rhs, size, initial, correct, wanted, limit, stalled=0.5, enough=settled
        )
        if run.pairs and isinstance(self.preconditioner, Preconditioner):
            self.preconditioner.learn(kept, run.directions, run.products)
        products += run.spent
        if watch is None or self.stopping is None:
            return self._conclude(solution, left, size, products, remedy="more max_steps, a preconditioner")
        products += watch.looks
        if not settled():
            told = (
                f"ConjugateGradient stopped after {products} products before its answer settled: its error was about "
                f"{watch.error:.2g} at the last look; wanted {self.stopping.rtol:g} twice running. Give it more "
                "max_steps."
            )
            found = self._conclude(solution, left, size, products, remedy="more max_steps, a preconditioner")
            # A small system, or a warm start, is solved down to rounding unwatched. Products are right to
            # c eps |A| |u|, c around 1 to 10, so that no smaller residual can be asked for; what it leaves of an error
            # in u, |residual| / least eigenvalue, must be as small as was asked for too.
            length = norm(solution)
            attainable = 10.0 * torch.finfo(rhs.dtype).eps * (size + run.largest * length)
            allowed = torch.minimum(attainable, self.stopping.rtol * run.least * length)
            exact = concrete(found.residual_norm - allowed) <= 0.0
            if self.rtol is None and not exact:
                self._complain(told)
            return replace(found, error=watch.error, converged=found.converged or exact)
        return LinearSolution(solution, left, products, True, watch.error)
