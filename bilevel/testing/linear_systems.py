"""Check a linear solver or a preconditioner of one's own on systems whose solutions are known."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from bilevel.errors import LinearNonConvergenceWarning
from bilevel.linear import ConjugateGradient, LinearOperator, LinearSolver, Memory, Preconditioner
from bilevel.linear.preconditioner import begun, prepared


@dataclass(frozen=True)
class _System:
    """A u = b with |A| = 1 and a least singular value of 1/condition, laid out as two leaves."""

    matrix: Tensor
    rhs: Tensor
    condition: float
    symmetric: bool

    @property
    def operator(self) -> LinearOperator:
        n = len(self.rhs)
        shapes = [(1,), (n - 1,)] if n > 1 else [(1,)]
        return LinearOperator(lambda v: self.matrix @ v, self.symmetric, shapes=shapes)

    @property
    def solution(self) -> Tensor:
        found: Tensor = torch.linalg.solve(self.matrix, self.rhs)
        return found

    def __str__(self) -> str:
        return f"A = {self.matrix.tolist()}, b = {self.rhs.tolist()}"


def check_linear_solver(solver: LinearSolver, *, general: bool = False, examples: int = 10, seed: int = 0) -> None:
    r"""Assert what holds for every right linear solver, on random systems of one to eight unknowns.

    It must find

    $$
    |u - u^*| \le \frac{|b - A u|}{\sigma_{\min}(A)},
    \qquad |b - A u| \le \max(\text{rtol}\, |b|, \text{atol})
    $$

    in float64, from 0 and from a start, and with damping; warn where it misses its tolerance; give the same twice from
    the same memory, which `torch.load(..., weights_only=True)` reads; and under `torch.func.vmap` what it gives one by
    one. With `rtol=None` nothing is asked of the residual. Takes a second.

    Args:
        solver: What is tested.
        general: Whether it is for systems that are neither symmetric nor definite too, as GMRES() is.
        examples: Systems.
        seed: Of the systems.

    Raises:
        AssertionError: Naming what does not hold, and the system.
        TypeError: For what is no linear solver.

    Examples:
        >>> from bilevel.linear import GMRES
        >>> check_linear_solver(GMRES(rtol=1e-9), general=True)
    """
    if not isinstance(solver, LinearSolver):
        raise TypeError(f"check_linear_solver was given {solver!r}; expected a LinearSolver such as GMRES().")
    for system in _systems(examples, seed, general=general):
        start = system.solution + 0.1 * system.rhs
        memory = _plain(solver.init(system.rhs, system.operator.shapes), "init", solver, system)
        for initial in (None, start):
            memory = _solves(solver, system, initial, memory)
        if any(option.name == "damping" and option.init for option in fields(solver)):
            _solves(replace(solver, damping=solver.damping + 0.5), system, None, memory)
        _vmapped(solver, system)


def check_preconditioner(preconditioner: Preconditioner, *, examples: int = 10, seed: int = 0) -> None:
    r"""Assert what holds for every right preconditioner, on random symmetric positive-definite systems.

    The map must be linear, symmetric and positive, $r^\top M^{-1} s = s^\top M^{-1} r$ and $r^\top M^{-1} r > 0$; be
    the same twice from the same memory, which `torch.load(..., weights_only=True)` reads; write to nothing; go on from
    the memory of an earlier system; and `ConjugateGradient(preconditioner=...)` must pass `check_linear_solver`. One
    that knows only what the follower's optimiser remembers is tested as it is before it was told. Takes a few seconds.

    Args:
        preconditioner: What is tested.
        examples: Systems.
        seed: Of the systems.

    Raises:
        AssertionError: Naming what does not hold, and the system.
        TypeError: For what is no preconditioner.

    Examples:
        >>> from bilevel.linear import Diagonal
        >>> check_preconditioner(Diagonal())
    """
    if not isinstance(preconditioner, Preconditioner):
        raise TypeError(f"check_preconditioner was given {preconditioner!r}; expected one such as Diagonal().")
    for system in _systems(examples, seed, general=False):
        n, operator = len(system.rhs), system.operator
        memory = _plain(begun(preconditioner, system.rhs, operator.shapes), "init", preconditioner, system)
        for _ in range(2):
            inverse, after = prepared(preconditioner, operator, memory)
            again, _ = prepared(preconditioner, operator, memory)
            columns = [inverse(unit).clone() for unit in torch.eye(n, dtype=system.rhs.dtype)]
            matrix = torch.stack(columns, dim=1)
            size, told = float(matrix.norm()), "M^-1"
            slack = 1e3 * n * torch.finfo(matrix.dtype).eps * size
            straight = float((inverse(system.rhs) - matrix @ system.rhs).norm())
            bent = float((matrix - matrix.mT).norm())
            least = float(torch.linalg.eigvalsh(0.5 * (matrix + matrix.mT))[0])
            repeated = torch.equal(again(system.rhs), inverse(system.rhs))
            rounding = slack * float(system.rhs.norm())
            _require(straight <= rounding, f"{told} is not linear: off by {straight:.2g}", preconditioner, system)
            _require(bent <= slack, f"{told} is not symmetric: off by {bent:.2g}", preconditioner, system)
            _require(least > 0.0, f"{told} has the eigenvalue {least:.2g}; positive definite?", preconditioner, system)
            _require(repeated, f"{told} is another one from the same memory", preconditioner, system)
            memory = _plain(after, "prepare", preconditioner, system)
    check_linear_solver(
        ConjugateGradient(rtol=1e-9, max_steps=200, preconditioner=preconditioner), examples=examples, seed=seed
    )


def _systems(count: int, seed: int, *, general: bool) -> Iterator[_System]:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        n, symmetric = 1 + number % 8, not general or number % 2 == 0
        condition = (1.0, 3.0, 30.0)[number % 3]
        exponents = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
        left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for _ in range(2))
        matrix = left * condition**-exponents @ (left.mT if symmetric else right)
        matrix = 0.5 * (matrix + matrix.mT) if symmetric else matrix
        yield _System(matrix, torch.randn(n, generator=generator, dtype=torch.float64), condition, symmetric)


def _solves(solver: LinearSolver, system: _System, initial: Tensor | None, memory: Memory) -> Memory:
    """What one solve must do; the memory after it."""
    solution, converged, after, warned = _quiet(solver, system, initial, memory)
    where = "from 0" if initial is None else "from a start"
    shifted = system.matrix + solver.damping * torch.eye(len(system.rhs), dtype=system.rhs.dtype)
    left = float((system.rhs - shifted @ solution).norm())
    allowed = _allowed(solver, system) + 1e-13 * float(system.rhs.norm())
    if solver.rtol is not None:
        told = f"{where} it leaves a residual of {left:.2g}, of {float(system.rhs.norm()):.2g}"
        _require(left <= allowed or warned, f"{told}, and does not warn", solver, system)
        _require(not converged or left <= allowed, f"{told}, and says that it has converged", solver, system)
    again, *_ = _quiet(solver, system, initial, memory)
    _require(torch.equal(again, solution), f"{where} it gives another solution from the same memory", solver, system)
    return _plain(after, "iterate", solver, system)


def _quiet(
    solver: LinearSolver, system: _System, initial: Tensor | None, memory: Memory | None
) -> tuple[Tensor, bool, Memory, bool]:
    """The solution, whether it has converged, the memory, and whether it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = solver.solve(system.operator, system.rhs, initial, memory=memory)
    warned = any(w.category is LinearNonConvergenceWarning for w in caught)
    return found.solution, found.converged, found.memory, warned


def _vmapped(solver: LinearSolver, system: _System) -> None:
    rows = torch.stack([system.rhs, 2.0 * system.rhs.flip(0)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LinearNonConvergenceWarning)
        together = torch.func.vmap(lambda rhs: solver.solve(system.operator, rhs).solution)(rows)
        alone = torch.stack([solver.solve(system.operator, rhs).solution for rhs in rows])
    if any(w.category is LinearNonConvergenceWarning for w in caught):
        return  # each stopped where it was, and said so
    off, size = float((together - alone).norm()), float(rows.norm())
    # Each is within its tolerance of the solution; those without one take the same steps.
    relative = 1e-8 if solver.rtol is None else 2.0 * solver.rtol
    allowed = system.condition * (relative * size + 2.0 * solver.atol) + 1e-10 * size
    _require(off <= allowed, f"under torch.func.vmap it differs by {off:.2g} from one by one", solver, system)


def _allowed(solver: LinearSolver, system: _System) -> float:
    return max((solver.rtol or 0.0) * float(system.rhs.norm()), solver.atol)


def _plain(memory: Memory, method: str, who: object, system: _System) -> Memory:
    """The memory, saved and loaded."""
    file = io.BytesIO()
    try:
        torch.save(memory, file)
        file.seek(0)
        loaded: Memory = torch.load(file, weights_only=True)
    except Exception as error:
        message = f"the memory of {method} does not go through torch.save and torch.load(weights_only=True): {error}"
        raise AssertionError(_told(message, who, system)) from error
    return loaded


def _require(holds: bool, message: str, who: object, system: _System) -> None:
    if not holds:
        raise AssertionError(_told(message, who, system))


def _told(message: str, who: object, system: _System) -> str:
    return f"{who!r}: {message}.\n{system}"
