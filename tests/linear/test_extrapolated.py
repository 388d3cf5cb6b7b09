"""Starts from the last solutions: never farther than the plain one, exact where they lie on a line, resumed."""

import io
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import optim

import bilevel as bl
from bilevel.linear import (
    GMRES,
    ConjugateGradient,
    Diagonal,
    Extrapolated,
    HypergradientTolerance,
    LBFGSPreconditioner,
    LinearOperator,
    LinearSolver,
    Recycled,
)
from bilevel.testing import check_response

D = torch.float64


@dataclass(frozen=True, kw_only=True)
class Started(LinearSolver):
    """Answers with where it was started."""

    def iterate(self, system):
        return system.start()


STARTED = Started(rtol=None)


def symmetric(matrix):
    return LinearOperator(matrix.mv, symmetric=True)


def memory_of(solver, differences):
    return solver.init(differences[0]) | {"differences": differences.clone()}


def distance(matrix, u, solution):
    return float(torch.dot(u - solution, matrix @ (u - solution)).sqrt())


@given(seed=st.integers(0, 10_000), size=st.integers(1, 4), near=st.sampled_from([0.0, 1e-6, 1.0]))
@settings(max_examples=50, deadline=None)
def test_it_never_starts_farther_in_the_a_norm(spd, normal, seed, size, near):
    matrix, b = spd(seed, 12, 1e4), normal(seed + 1, 12)
    solution = torch.linalg.solve(matrix, b)
    initial, kept = solution + near * normal(seed + 2, 12), normal(seed + 3, size, 12)
    solver = Extrapolated(STARTED, size=size)
    for start in (initial, None):
        found = solver.solve(symmetric(matrix), b, start, memory=memory_of(solver, kept)).solution
        plain = torch.zeros_like(b) if start is None else start
        # Energies are compared, 1/2 |u - u*|_A^2 up to a constant of 1/2 |u*|_A^2: so is their rounding.
        slack = 1e-6 * distance(matrix, torch.zeros_like(b), solution)
        assert distance(matrix, found, solution) <= distance(matrix, plain, solution) + slack
        rows = kept if start is None else torch.cat([start[None], kept])
        # Galerkin: the residual is orthogonal to all that was searched.
        assert float((rows @ (b - matrix @ found)).abs().max()) <= 1e-9 * float(b.norm() * rows.norm())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_along_a_polynomial_of_its_degree_it_starts_at_the_solution(counted, spd, normal, size):
    """u_k = a + b k + c k^2 + ... and A that changes, so that b does too."""
    memory, last = Extrapolated(STARTED, size=size).init(normal(0, 20)), None
    for k in range(size + 2):
        solution = sum(float(k) ** power * normal(power, 20) for power in range(size + 1))
        system = counted(spd(k, 20, 50.0), symmetric=True)
        # Those before are right to 50 x 1e-12, of which binomial coefficients, 15 together, make less than 1e-9.
        solver = Extrapolated(ConjugateGradient(rtol=1e-8 if k > size else 1e-12), size=size)
        found = solver.solve(system.operator, system.matrix @ solution, last, memory=memory)
        assert found.products == system.calls
        last, memory = found.solution, found.memory
    # The last solution, and as many differences as the degree: one product each, and nothing to iterate.
    assert found.products == size + 1
    assert float((last - solution).norm()) <= 50.0 * 1e-8 * float(solution.norm())


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("base", [ConjugateGradient(rtol=1e-10), GMRES(rtol=1e-10)], ids=repr)
def test_answers_residuals_and_products_are_true(counted, spd, normal, base, damping):
    solver = Extrapolated(type(base)(rtol=1e-10, damping=damping), size=2)
    memory, last = solver.init(normal(0, 15)), None
    for number in range(5):
        system = counted(spd(3, 15, 20.0) + 0.01 * number * torch.eye(15, dtype=D), symmetric=True)
        b = normal(4, 15) + 0.1 * number * normal(5, 15)
        found = solver.solve(system.operator, b, last, memory=memory)
        whole = system.matrix + damping * torch.eye(15, dtype=D)
        assert found.converged
        assert found.products == system.calls
        # The smallest eigenvalue is 1/20 or more.
        assert float((found.solution - torch.linalg.solve(whole, b)).norm()) <= 20.0 * 1e-10 * float(b.norm())
        assert abs(float((b - whole @ found.solution).norm() - found.residual_norm)) <= 1e-13 * float(b.norm())
        last, memory = found.solution, found.memory


def test_it_saves_along_a_smooth_path(spd, normal):
    base = ConjugateGradient(rtol=1e-5)
    taken = {}
    for solver in (base, Extrapolated(base)):
        memory, last = solver.init(normal(0, 60)), None
        for k in range(8):
            b = normal(1, 60) * (1.0 + 0.05 * k * normal(2, 60)).exp()
            found = solver.solve(symmetric(spd(3, 60, 300.0)), b, last, memory=memory)
            taken[solver], last, memory = found.products, found.solution, found.memory
    assert taken[Extrapolated(base)] < 0.7 * taken[base]


def test_a_first_solve_is_the_solvers_own(spd, normal):
    base, matrix, b = ConjugateGradient(), spd(1, 10, 30.0), normal(2, 10)
    for memory in (None, Extrapolated(base).init(b)):
        own, found = base.solve(symmetric(matrix), b), Extrapolated(base).solve(symmetric(matrix), b, memory=memory)
        assert torch.equal(found.solution, own.solution)
        assert found.products == own.products


def test_what_others_span_costs_nothing(counted, spd, normal):
    """A leader that stands still leaves differences of 0; one that goes straight, differences that are alike."""
    solver, b = Extrapolated(STARTED, size=3), normal(2, 8)
    step = normal(3, 8)
    for kept, wanted in ((torch.zeros(3, 8, dtype=D), 1), (torch.stack([step, 2.0 * step, 0.0 * step]), 2)):
        system = counted(spd(1, 8, 30.0), symmetric=True)
        found = solver.solve(system.operator, b, normal(4, 8), memory=memory_of(solver, kept))
        assert system.calls == wanted == found.products


@pytest.mark.filterwarnings("ignore:.*no better than none")  # a start is no answer
def test_a_system_that_is_not_positive_definite_is_left_to_the_solver(spd, normal):
    matrix = spd(1, 8, 10.0) - 0.5 * torch.eye(8, dtype=D)
    solver, initial = Extrapolated(STARTED), normal(2, 8)
    memory = memory_of(solver, normal(3, 2, 8))
    assert torch.equal(solver.solve(symmetric(-matrix), normal(4, 8), initial, memory=memory).solution, initial)
    with pytest.raises(bl.errors.IndefiniteSystemError):
        Extrapolated(ConjugateGradient()).solve(symmetric(-matrix), normal(4, 8), initial, memory=memory)


def test_products_that_are_not_finite_are_the_solvers_to_report(normal):
    solver = Extrapolated(ConjugateGradient())
    broken = LinearOperator(lambda v: v * torch.nan, symmetric=True)
    with pytest.raises(bl.errors.NonFiniteError):
        solver.solve(broken, normal(4, 8), normal(2, 8), memory=memory_of(solver, normal(3, 2, 8)))


def test_a_right_hand_side_of_zeros_has_the_solution_zero(spd, normal):
    solver = Extrapolated(ConjugateGradient())
    memory = memory_of(solver, normal(3, 2, 8))
    found = solver.solve(symmetric(spd(1, 8, 3.0)), torch.zeros(8, dtype=D), normal(2, 8), memory=memory)
    assert not found.solution.any()
    assert found.products == 0


def test_it_is_asked_for_what_its_solver_is_asked_for():
    base = ConjugateGradient(rtol=1e-3, atol=1e-9, damping=0.5, strict=True, stopping=HypergradientTolerance(1e-3))
    solver = Extrapolated(base, size=1)
    assert (solver.rtol, solver.atol, solver.damping, solver.strict) == (1e-3, 1e-9, 0.5, True)
    assert solver.loosened(10.0) == Extrapolated(base.loosened(10.0), size=1)
    assert solver.loosened(10.0).rtol == pytest.approx(1e-2)
    assert solver.needs_symmetry and not solver.from_optimizer
    assert Extrapolated(ConjugateGradient(preconditioner=LBFGSPreconditioner())).from_optimizer


def test_what_cannot_work_is_refused(general, normal):
    with pytest.raises(TypeError, match=r"it wants one such as ConjugateGradient\(\)"):
        Extrapolated(ConjugateGradient)
    with pytest.raises(ValueError, match="size=0; it wants at least 1"):
        Extrapolated(ConjugateGradient(), size=0)
    with pytest.raises(bl.errors.NotSymmetricError):
        Extrapolated(GMRES()).solve(LinearOperator(general(1, 4, 2.0).mv), normal(1, 4))


# Within a response --------------------------------------------------------------------------------------------------

EVERY = [
    ConjugateGradient(rtol=1e-8),
    ConjugateGradient(rtol=1e-8, preconditioner=Recycled(size=6, base=Diagonal())),
    ConjugateGradient(rtol=None, stopping=HypergradientTolerance(1e-6)),
]


def implicit(solver):
    ends = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    inner = partial(optim.LBFGS, max_iter=50, line_search_fn="strong_wolfe", **ends)
    # A line search tells losses apart down to some 2e-8 of the first gradient.
    return bl.Implicit(inner, steps=50, tolerance=1e-6, linear_solver=solver)


@pytest.mark.parametrize("base", EVERY, ids=repr)
def test_a_run_ends_where_the_plain_one_ends_and_resumes_bit_for_bit(ridge, ends_where_it_did_without, base):
    ends_where_it_did_without(ridge, implicit(base), implicit(Extrapolated(base)), steps=8, atol=1e-3)


def test_the_memory_is_a_part_of_the_state_that_a_call_does_not_write_to(ridge):
    game, response = ridge(), implicit(Extrapolated(ConjugateGradient()))
    state, x = response.init(game), game.initial("x").clone().requires_grad_()
    for _ in range(2):
        before, kept = state, state["linear"]["memory"]["differences"].clone()
        y, state = response(game, {"x": x + 0.01}, state)
        game.loss("x", {"x": x, "y": y}).backward()
        state = response.after_backward(state, y)
        x = (x.detach() + 0.01).requires_grad_()
        assert torch.equal(before["linear"]["memory"]["differences"], kept)
    assert state["linear"]["memory"]["differences"][0].any()
    written = io.BytesIO()
    torch.save(state, written)
    written.seek(0)
    torch.load(written, weights_only=True)


def test_many_games_start_where_the_solver_would(ridge):
    start = torch.linspace(-9.0, 0.0, 25, dtype=D)
    games = bl.Games(ridge(), 2, init={"x": torch.stack([start, start.flip(0)])})
    adam, base = partial(optim.Adam, lr=0.1), ConjugateGradient(rtol=1e-8)
    response = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-6, linear_solver=base)
    plain = bl.solve(games, y=response, optimizer=adam, steps=3)
    response = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-6, linear_solver=Extrapolated(base))
    found = bl.solve(games, y=response, optimizer=adam, steps=3)
    for index in range(2):
        assert torch.equal(found[index].variables["x"], plain[index].variables["x"])


@pytest.mark.slow
def test_the_laws_hold():
    solver = Extrapolated(ConjugateGradient())
    check_response(bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-10, linear_solver=solver), examples=3)
