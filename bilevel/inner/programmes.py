"""Solvers of convex quadratic and of linear programmes as inner solvers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.constraints.functions import Constrained, Linearised
from bilevel.errors import ConvergenceError, CurvatureError, UnboundedError, require_kinds
from bilevel.inner.base import InnerSolver, Problem
from bilevel.tree import join

_UNBOUNDED = (
    "Player {name!r}: its loss falls without bound within its constraints. Add the missing constraint, or a term that "
    "holds it back."
)


@dataclass(frozen=True)
class Expansion:
    """A programme about a point y `[n]`: f's gradient and Hessian (None where it is not asked for), c, e, A and E."""

    y: Tensor
    slope: Tensor
    hessian: Tensor | None
    at: Linearised


@dataclass(frozen=True)
class ProgrammeSolver(InnerSolver):
    """Solves a follower whose constraints are affine and whose loss is what the solver is made for."""

    @property
    def takes_constraints(self) -> bool:
        """It is made for them."""
        return True

    @property
    @abstractmethod
    def quadratic(self) -> bool:
        """Whether it sees a loss's curvature."""

    @abstractmethod
    def step(self, about: Expansion, name: str) -> Tensor:
        """The step `[n]` from `about.y` to the optimum; of player `name`, for errors."""

    @final
    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The programme's answer, after a look whether the follower is such a programme."""
        programme, solver = problem.constraints, type(self).__name__
        if programme is None:
            raise TypeError(
                f"{solver}: player {problem.name!r} has no constraints (inequality=, equality=). Without them use "
                'Scipy("L-BFGS-B").'
            )
        start = join(y).detach().to("cpu", torch.float64)
        at, slope = programme.linearised(start), programme.loss_and_gradient(start)[1]
        zeros = torch.zeros_like(at.c), torch.zeros_like(at.e)
        hessian = programme.hessian(start, *zeros) if self.quadratic else None
        moved = self.step(Expansion(start, slope, hessian, at), problem.name)
        self._refuse_other_kinds(programme, Expansion(start, slope, hessian, at), moved, problem.name)
        return [leaf.clone() for leaf in problem.form.split((start + moved).to(y[0]))], None

    def _refuse_other_kinds(self, programme: Constrained, about: Expansion, moved: Tensor, name: str) -> None:
        """Raise `TypeError` where the expansion misses the loss's gradient or the constraints at its own answer."""
        there, slope = programme.linearised(about.y + moved), programme.loss_and_gradient(about.y + moved)[1]
        bent = moved.new_zeros(0, len(moved)) if about.hessian is None else about.hessian
        curved = torch.zeros_like(slope) if about.hessian is None else bent @ moved
        loss = "a quadratic" if self.quadratic else "a linear"
        # Values may cancel, as those of a balance do that holds; what they are rounded by has the size of their terms.
        reach = about.y.abs() + moved.abs()
        for what, wanted, found, rows in (
            (f"its loss is not {loss} function", about.slope + curved, slope, bent),
            ("its inequality is not affine", about.at.c + about.at.A @ moved, there.c, about.at.A),
            ("its equality is not affine", about.at.e + about.at.E @ moved, there.e, about.at.E),
        ):
            if not len(wanted):
                continue
            terms = float((rows.abs() @ reach).max()) if len(rows) else 0.0
            size = float(wanted.abs().max()) + float(found.abs().max()) + terms
            off = float((found - wanted).abs().max())
            if off > 100.0 * programme.epsilon**0.6 * size:
                other = "" if self.quadratic else ", or ProxQP() where the loss is quadratic"
                raise TypeError(
                    f"{type(self).__name__}: player {name!r}: {what} of its variables (off by {off:.2g} at the "
                    f'answer). Use Scipy("SLSQP"){other}.'
                )


@final
@dataclass(frozen=True)
class ProxQP(ProgrammeSolver):
    """A convex quadratic follower within affine constraints, by ProxQP's proximal augmented Lagrangian, dense.

    For followers of up to a thousand variables; the optimum does not depend on where it starts. An optional extra:
    `pip install "bilevel[qp]"` brings `proxsuite`.

    Costs one Hessian (n products) and the solver's factorisations, n^3. The response's `steps` and tolerance do not
    bind it. Source: Bambade et al. 2022 (RSS); Bambade et al. 2023.

    Args:
        eps_abs: To which its own residuals are solved; the follower's Newton steps on the KKT system do the rest.
        max_iter: Of its own outer iterations.

    Raises:
        TypeError: If the loss is not quadratic or a constraint not affine.
        CurvatureError: If the loss is not convex.
        UnboundedError: If the loss falls for ever. An infeasible programme is told by the constraint that is broken.

    Examples:
        >>> ProxQP()
        ProxQP(eps_abs=1e-09, max_iter=10000)
    """

    eps_abs: float = 1e-9
    max_iter: int = 10_000

    def __post_init__(self) -> None:
        require_kinds(self)
        if not 0.0 < self.eps_abs < float("inf") or self.max_iter < 1:
            raise ValueError(f"{self}: expected eps_abs above 0 and finite, and max_iter of at least 1.")

    @property
    def quadratic(self) -> bool:
        """Yes."""
        return True

    def step(self, about: Expansion, name: str) -> Tensor:
        """By proxsuite, its loss scaled to curvatures and slopes of size 1."""
        try:
            from proxsuite import proxqp  # noqa: PLC0415 - an optional extra
        except ImportError as error:
            raise ImportError(
                'ProxQP needs the package proxsuite: pip install "bilevel[qp]", or use Scipy("SLSQP").'
            ) from error
        assert about.hessian is not None
        at, n = about.at, len(about.y)
        largest = float(torch.linalg.matrix_norm(about.hessian))
        shifted = about.hessian + 1e-8 * largest * torch.eye(n, dtype=about.slope.dtype)
        if largest > 0.0 and int(torch.linalg.cholesky_ex(shifted).info):
            lowest = float(torch.linalg.eigvalsh(about.hessian)[0])
            raise CurvatureError(
                f"Player {name!r}: its loss is not convex (smallest eigenvalue {lowest:.3g}), and ProxQP solves convex "
                'programmes. Use Scipy("SLSQP"), which finds a local optimum.'
            )
        scale = max(largest, float(about.slope.abs().max())) or 1.0
        programme = proxqp.dense.QP(n, len(at.e), len(at.c))
        programme.settings.eps_abs = self.eps_abs
        programme.settings.max_iter = self.max_iter
        # Where nothing is feasible, the point that breaks the constraints least: whose error names them.
        programme.settings.primal_infeasibility_solving = True
        low = torch.full_like(at.c, -1e30)
        given = about.hessian / scale, about.slope / scale, at.E, -at.e, at.A, low, -at.c
        programme.init(*(part.numpy() if part.numel() else None for part in given))
        programme.solve()
        status = programme.results.info.status
        if status == proxqp.PROXQP_DUAL_INFEASIBLE:
            raise UnboundedError(_UNBOUNDED.format(name=name))
        return torch.as_tensor(programme.results.x.copy())


@final
@dataclass(frozen=True)
class HiGHS(ProgrammeSolver):
    """A linear follower within affine constraints, at a vertex, by HiGHS (`scipy.optimize.linprog`).

    At a vertex where as many independent constraints bind as there are variables the answer moves with them alone.
    Where it is degenerate, or one of many optima, the follower says so by name; a small strictly convex term in the
    loss, and `ProxQP` or `Scipy("SLSQP")`, make it unique.

    Raises:
        TypeError: If the loss is not linear or a constraint not affine.
        UnboundedError: If the loss falls for ever. An infeasible programme is told by the constraint that is broken.

    Examples:
        >>> HiGHS().takes_constraints
        True
    """

    @property
    def quadratic(self) -> bool:
        """No."""
        return False

    def step(self, about: Expansion, name: str) -> Tensor:
        """By the dual simplex method; where nothing is feasible, the point that breaks least of the constraints."""
        from scipy.optimize import linprog  # noqa: PLC0415 - with SciPy's optimisers, only where it is used

        at, n = about.at, len(about.y)
        rows, caps = (at.A.numpy(), -at.c.numpy()) if len(at.c) else (None, None)
        balances, levels = (at.E.numpy(), -at.e.numpy()) if len(at.e) else (None, None)
        # The dual simplex method, which ends at a vertex, and not in the middle of a face as an interior point would.
        free = {"bounds": (None, None), "method": "highs-ds"}
        found = linprog(about.slope.numpy(), rows, caps, balances, levels, **free)
        if found.status == 3 or (found.status == 4 and found.x is None):  # 4: unbounded or infeasible, it cannot tell
            feasible = linprog(0.0 * about.slope.numpy(), rows, caps, balances, levels, **free)
            if feasible.status == 0:
                raise UnboundedError(_UNBOUNDED.format(name=name))
        if found.status == 0:
            return torch.as_tensor(found.x.copy())
        m, p = len(at.c), len(at.e)
        slack = torch.cat([at.A, -torch.eye(m, dtype=at.A.dtype), torch.zeros(m, 2 * p, dtype=at.A.dtype)], dim=1)
        gap = torch.eye(p, dtype=at.A.dtype)
        split = torch.cat([at.E, torch.zeros(p, m, dtype=at.A.dtype), gap, -gap], dim=1)
        price = torch.cat([torch.zeros(n), torch.ones(m + 2 * p)])
        bounds = [(None, None)] * n + [(0.0, None)] * (m + 2 * p)
        least = linprog(
            price.numpy(), slack.numpy() if m else None, caps, split.numpy() if p else None, levels, bounds=bounds
        )
        if least.x is None:
            raise ConvergenceError(f"HiGHS: the programme of player {name!r} could not be solved: {found.message}")
        return torch.as_tensor(least.x[:n].copy())
