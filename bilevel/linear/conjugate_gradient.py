"""Conjugate gradients: the default for followers that sit at a minimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import IndefiniteSystemError, NotSymmetricError
from bilevel.linear.base import LinearOperator, LinearSolution, LinearSolver, asymmetry_tolerance, norm
from bilevel.linear.preconditioner import Memory, Preconditioner
from bilevel.linear.refinement import default_steps, refine
from bilevel.linear.stopping import Stopping, Watch


@final
@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(LinearSolver):
    """Solves a symmetric positive-definite system to the tolerance asked for, or says by how much it missed.

    Minimises 1/2 u'(A + damping I)u - b'u over a Krylov space that grows by one product a step; exact after n steps
    in exact arithmetic, and the error falls by (sqrt(k) - 1)/(sqrt(k) + 1) a step for condition number k.

    `max_steps`: None is min(max(2n, 20), 1000). `preconditioner`: `Diagonal()`, `BlockDiagonal(shapes=)`,
    `NystromPreconditioner()`, `Recycled()`, `SecondMoment()` or `InnerPairs()`, which make M close to A + damping I and
    keep what they learned in `memory`; or a map from `r: [n]` to `M^-1 r: [n]`, M symmetric positive definite.
    `stopping=Settled(1e-3)` ends the solve, as converged, once what u is needed for has settled, whatever the
    residual. `initial` is used.

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
                f"ConjugateGradient was given stopping={self.stopping!r}; it wants Settled(1e-3), say, or None."
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
        if self._vanishes(rhs, initial):
            return self._conclude(torch.zeros_like(rhs), rhs, rhs, 0)
        damped = operator.damped(self.damping)
        limit = default_steps(rhs.numel()) if self.max_steps is None else self.max_steps
        run = _Run(damped.matvec)
        kept = self.init(rhs) if memory is None else memory
        if isinstance(self.preconditioner, Preconditioner):
            # Its own products are part of the price.
            run.inverse = self.preconditioner.prepare(LinearOperator(run.counted, symmetric=True), kept)
            run.wanted = self.preconditioner.pairs if memory is not None else 0
        else:
            run.inverse = self.preconditioner

        run.start = initial
        watch = None if self.stopping is None else self.stopping.watch(damped.interest or (lambda u: u))
        run.watch = watch

        def correct(residual: Tensor, target: Tensor, most: int) -> tuple[Tensor, int]:
            found, steps = run.correct(residual, target, most, first=most == limit)
            if watch is not None:  # whose looks are at the whole solution
                run.start = found if run.start is None else run.start + found
            return found, steps

        def settled() -> bool:
            return watch is not None and watch.satisfied

        # Short of its limit it ends believing to have converged: where not even half is gone, rounding is in the way.
        wanted = self.tolerance(rhs)
        solution, residual, products = refine(damped, rhs, initial, correct, wanted, limit, stalled=0.5, enough=settled)
        if run.wanted and isinstance(self.preconditioner, Preconditioner):
            self.preconditioner.learn(kept, run.directions, run.products)
        products += run.spent
        if watch is None or self.stopping is None:
            return self._conclude(solution, residual, rhs, products, remedy="more max_steps, a preconditioner")
        products += watch.looks
        if not settled():
            told = (
                f"ConjugateGradient stopped after {products} products before its answer settled: its error was about "
                f"{watch.error:.2g} at the last look; wanted {self.stopping.rtol:g}. Give it more max_steps."
            )
            found = self._conclude(solution, residual, rhs, products, remedy="more max_steps, a preconditioner")
            # A residual of rounding is all there is to be had: a small system, or a warm start, gets there unwatched.
            exact = concrete(found.residual_norm - torch.finfo(rhs.dtype).eps * norm(rhs)) <= 0.0
            if self.rtol is None and not exact:
                self._complain(told)
            return replace(found, error=watch.error, converged=found.converged or exact)
        return LinearSolution(solution, norm(residual), products, True, watch.error)


class _Run:
    """One solve: the iteration, and the pairs (p, A p) that it went through, evenly spaced."""

    def __init__(self, matvec: Callable[[Tensor], Tensor]) -> None:
        self.matvec = matvec
        self.inverse: Callable[[Tensor], Tensor] | None = None
        self.wanted, self.spent = 0, 0
        self.watch: Watch | None = None
        self.start: Tensor | None = None
        self.directions: list[Tensor] = []
        self.products: list[Tensor] = []
        self._stride, self._seen = 1, 0

    def counted(self, vector: Tensor) -> Tensor:
        """A product that is no step."""
        self.spent += 1
        return self.matvec(vector)

    def correct(self, residual: Tensor, target: Tensor, most: int, first: bool) -> tuple[Tensor, int]:
        """The e `[n]` that takes A e from 0 towards `residual`, and the steps taken."""
        size = norm(residual)
        # Unit size, because curvatures are squares, and squares of small float32 numbers underflow to "indefinite".
        scale = torch.where(size > 0.0, size, 1.0)
        r, goal = residual / scale, target / scale
        e: Tensor | None = None
        z = self._preconditioned(r)
        p, rho = z, torch.dot(r, z)
        # One flag a system: those in a batch that are done stand still while the others go on.
        moving = norm(r) > goal
        single = not transforms_active()  # then the loop's end says what the flag would
        before: tuple[Tensor, Tensor] | None = None
        steps = 0
        while steps < most and concrete(moving):
            product = self.matvec(p)
            steps += 1
            self._note(p, product)
            curvature = torch.dot(p, product)
            if first:
                _refuse_indefinite(moving, curvature, p)
                if steps == 2 and before is not None:
                    _refuse_asymmetric(moving, *before, p, product)
            # After a restart the directions are rounding's; one without curvature ends the search, and proves nothing.
            moving = moving & ((curvature > 0.0) | torch.isnan(curvature))
            if single and not concrete(moving):
                break
            step = rho / curvature if single else torch.where(moving, rho / torch.where(moving, curvature, 1.0), 0.0)
            e = step * p if e is None else torch.addcmul(e, step, p)
            r = torch.addcmul(r, step, product, value=-1.0)
            z = self._preconditioned(r)
            new_rho = torch.dot(r, z)
            before = p, product
            turn = new_rho / rho if single else torch.where(moving, new_rho / torch.where(moving, rho, 1.0), 0.0)
            p = torch.addcmul(z, turn, p)
            rho = new_rho if single else torch.where(moving, new_rho, rho)
            if self.watch is not None and self.watch.due(self._seen):
                self.watch.look(self._seen, scale * e if self.start is None else self.start + scale * e)
                if self.watch.satisfied:
                    break
            # Without a preconditioner rho is |r|^2, of an r that was scaled to unit size.
            moving = moving & ((rho.sqrt() if self.inverse is None else norm(r)) > goal)
            if self.inverse is not None:
                _refuse_preconditioner(moving, rho)
        if e is None:
            return torch.zeros_like(r), steps
        return e.mul_(scale) if single else scale * e, steps

    def _preconditioned(self, residual: Tensor) -> Tensor:
        return residual if self.inverse is None else self.inverse(residual)

    def _note(self, p: Tensor, product: Tensor) -> None:
        if self.wanted and self._seen % self._stride == 0:
            if len(self.directions) == self.wanted:
                # Twice as far apart from here on, and so before.
                self._stride *= 2
                self.directions, self.products = self.directions[::2], self.products[::2]
            if self._seen % self._stride == 0:
                self.directions.append(p)
                self.products.append(product)
        self._seen += 1


def _refuse_indefinite(moving: Tensor, curvature: Tensor, direction: Tensor) -> None:
    # A single system that stands still does not come here.
    seen = -curvature if not transforms_active() else torch.where(moving, -curvature, -torch.inf)
    lowest = -concrete(seen)
    if lowest <= 0.0:
        relative = -concrete(torch.where(moving, -curvature / norm(direction).square(), -torch.inf))
        raise IndefiniteSystemError(
            f"ConjugateGradient met a direction p with curvature p'Ap / p'p = {relative:.3g}; it needs a positive "
            "definite system. The follower is not at a strict minimum: solve its problem further, or add "
            f"damping={max(-2.0 * relative, 1e-3):.1g} or more, or use GMRES(), which needs no definiteness."
        )


def _refuse_asymmetric(moving: Tensor, p: Tensor, product_p: Tensor, q: Tensor, product_q: Tensor) -> None:
    scale = torch.maximum(norm(p) * norm(product_q), norm(q) * norm(product_p))
    apart = (torch.dot(p, product_q) - torch.dot(q, product_p)).abs() / torch.where(scale > 0.0, scale, 1.0)
    most_apart = concrete(torch.where(moving, apart, 0.0))
    if most_apart > asymmetry_tolerance(p.dtype):
        raise NotSymmetricError(
            f"ConjugateGradient was promised symmetric=True, but p'(Aq) and q'(Ap) differ by {most_apart:.2g} of their "
            "size. Use GMRES(), or Dense() for a few hundred unknowns, and give the operator symmetric=False."
        )


def _refuse_preconditioner(moving: Tensor, rho: Tensor) -> None:
    lowest = -concrete(torch.where(moving, -rho, -torch.inf))
    if lowest <= 0.0:
        raise IndefiniteSystemError(
            f"ConjugateGradient's preconditioner gave r'M^-1 r = {lowest:.3g} for a residual r; it has to be symmetric "
            "positive definite. Leave it out, or damp it."
        )
