"""Conjugate gradients: the default for followers that sit at a minimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.errors import require_kinds
from bilevel.linear.base import LinearSolver
from bilevel.linear.iteration import Iteration
from bilevel.linear.norms import norm
from bilevel.linear.operator import Shapes
from bilevel.linear.preconditioner import Applied, Preconditioner, begun, guarded, prepared
from bilevel.linear.refinement import default_steps, refine
from bilevel.linear.stopping import Stopping, Watch
from bilevel.linear.system import Candidate, LinearSystem, Memory
from bilevel.sharding.tensor import entries as entries_of


@final
@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(LinearSolver):
    r"""Solves a symmetric positive-definite system to the tolerance asked for, or says by how much it missed.

    $$
    u_k = \arg\min_{u \in u_0 + \mathcal K_k} \tfrac12 u^\top (A + \text{damping}\, I)\, u - b^\top u
    $$

    over a Krylov space $\mathcal K_k$ that grows by one product a step. It is exact after n steps in exact arithmetic;
    the error falls by $(\sqrt k - 1) / (\sqrt k + 1)$ a step for condition number k.

    Costs one product a step, one to measure the true residual at the end, one for an initial; memory for 5 vectors. In
    float32 the residual of an ill-conditioned system stalls early; then this stops and warns. Both tests for what A is
    see only the directions that the iteration visits.
    Source: Hestenes & Stiefel 1952; for hypergradients Pedregosa, arXiv 1602.02355.

    Args:
        max_steps: None is min(max(2n, 20), 1000).
        preconditioner: One such as `Diagonal()`, which makes M close to A + damping I and keeps what it learned in the
            solver's memory; or a map from `r: [n]` to a new `M^-1 r: [n]`, M symmetric positive definite.
        stopping: `HypergradientTolerance(1e-3)` ends the solve, as converged, once what u is needed for has settled,
            whatever the residual.
        rtol: Relative tolerance of the residual; None asks for no accuracy; worse than 0 still warns.
        atol: Absolute tolerance of the residual.
        damping: Added to the diagonal of A.
        strict: Raise where it would warn.

    Raises:
        NotSymmetricError: If the operator does not promise symmetry, or, at no cost, if its second product shows that
            it is not symmetric.
        IndefiniteSystemError: If p'Ap <= 0 along a direction p, or r'M^-1 r <= 0.

    Examples:
        >>> from bilevel.linear import LinearOperator
        >>> operator = LinearOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]).mv, symmetric=True)
        >>> found = ConjugateGradient(rtol=1e-5).solve(operator, torch.tensor([1.0, 2.0]))
        >>> found.solution, found.products
        (tensor([0.0909, 0.6364]), 3)
    """

    max_steps: int | None = None
    preconditioner: Preconditioner | Callable[[Tensor], Tensor] | None = None
    stopping: Stopping | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
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
    def tells_indefinite(self) -> bool:
        """Each of its directions tells its curvature."""
        return True

    @property
    def needs_symmetry(self) -> bool:
        """Its algebra holds for symmetric systems only."""
        return True

    @property
    def remedy(self) -> str:
        """More steps, or shorter ones to take."""
        return "more max_steps, a preconditioner"

    @property
    def from_optimizer(self) -> bool:
        """Whether its preconditioner does."""
        return isinstance(self.preconditioner, Preconditioner) and self.preconditioner.from_optimizer

    @property
    def needs_factors(self) -> bool:
        """Whether its preconditioner does."""
        return isinstance(self.preconditioner, Preconditioner) and self.preconditioner.needs_factors

    @property
    def takes_parts(self) -> bool:
        """Whether its preconditioner does."""
        return self.preconditioner is None or (
            isinstance(self.preconditioner, Preconditioner) and self.preconditioner.takes_parts
        )

    def loosened(self, factor: float) -> LinearSolver:
        """The same solver with `rtol`, and that of `stopping`, this many times larger, up to 1/2."""
        looser = super().loosened(factor)
        if self.stopping is None or factor <= 1.0 or not isinstance(looser, ConjugateGradient):
            return looser
        return replace(looser, stopping=self.stopping.loosened(factor))

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """The preconditioner's memory before the first system."""
        given = self.preconditioner
        return begun(given, like, shapes) if isinstance(given, Preconditioner) else {}

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """As the preconditioner takes it."""
        kind = self.preconditioner
        return kind.inform(memory, optimizer) if isinstance(kind, Preconditioner) else memory

    def iterate(self, system: LinearSystem) -> Candidate:
        """By conjugate gradients, corrected from the true residual as long as that helps."""
        limit = default_steps(entries_of(system.rhs)) if self.max_steps is None else self.max_steps
        watch = None if self.stopping is None else self.stopping.watch(system.interest)
        given, memory, pairs = self.preconditioner, system.memory, 0
        if isinstance(given, Preconditioner):
            pairs = given.pairs if system.keeps else 0
            inverse: Applied | None
            inverse, memory = prepared(given, system.operator, memory)  # its own products are part of the price
        else:
            inverse = None if given is None else guarded(given, "preconditioner=")
        run = Iteration(system.matvec, inverse=inverse, pairs=pairs, watch=watch, start=system.initial)

        def correct(residual: Tensor, left: Tensor, target: Tensor, most: int) -> tuple[Tensor, int]:
            found, steps = run.correct(residual, left, target, most, first=most == limit)
            if watch is not None:  # whose looks are at the whole solution
                run.start = found if run.start is None else run.start + found
            return found, steps

        def settled() -> bool:
            return watch is not None and watch.satisfied

        # Short of its limit it ends believing to have converged: where not even half is gone, rounding is in the way.
        found = refine(system, correct, max_steps=limit, stalled=0.5, enough=settled)
        if pairs and isinstance(given, Preconditioner):
            memory = given.learn(memory, run.directions, run.products)
        found = replace(found, memory=memory)
        return found if watch is None else self._watched(system, found, watch, run)

    def _watched(self, system: LinearSystem, found: Candidate, watch: Watch, run: Iteration) -> Candidate:
        """The candidate with what the looks at it say."""
        if watch.satisfied or self.stopping is None:
            return replace(found, error=watch.error, enough=True)
        # A small system, or a warm start, is solved down to rounding unwatched. Products are right to
        # c eps |A| |u|, c around 1 to 10, so that no smaller residual can be asked for; what it leaves of an error
        # in u, |residual| / least eigenvalue, must be as small as was asked for too.
        length = norm(found.solution)
        attainable = 10.0 * torch.finfo(length.dtype).eps * (system.rhs_norm + run.largest * length)
        allowed = torch.minimum(attainable, self.stopping.rtol * run.least * length)
        exact = concrete(found.residual_norm - allowed) <= 0.0
        shortfall = (
            f"ConjugateGradient stopped after {system.products} products before its answer settled: its error was "
            f"about {watch.error:.2g} at the last look; wanted {self.stopping.rtol:g} twice running. Give it more "
            "max_steps."
        )
        return replace(found, error=watch.error, enough=exact, shortfall=shortfall)
