"""What holds for every linear solver; a new one adds a line to a list."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import BilevelError, ConvergenceError, LinearNonConvergenceWarning, NonFiniteError
from bilevel.linear import GMRES, ConjugateGradient, Dense, Identity, LinearOperator, Neumann, Nystrom

EPS = torch.finfo(torch.float64).eps

# Accurate to what is asked for, on symmetric positive-definite systems.
ACCURATE = [ConjugateGradient(), GMRES(), GMRES(restart=3, max_steps=2000), Dense(), Neumann(max_steps=3000)]
# Accurate on the rest too.
GENERAL = [GMRES(), Dense()]
# What their definition makes them.
APPROXIMATE = [
    ConjugateGradient(max_steps=3, rtol=None),
    GMRES(max_steps=3, rtol=None),
    Neumann(max_steps=5, rtol=None),
    Neumann(max_steps=5, step_size=0.5, rtol=None),
    Identity(scale=0.5),
    Nystrom(rank=2, damping=0.5),
]
EVERY = ACCURATE + APPROXIMATE
STARTED = [ConjugateGradient(), GMRES(), Neumann()]

seeds = st.integers(0, 10_000)
some = settings(max_examples=20, deadline=None)


@pytest.mark.parametrize("solver", ACCURATE, ids=repr)
@given(seed=seeds, n=st.integers(1, 8), condition=st.sampled_from([1.0, 3.0, 30.0]))
@some
def test_agrees_with_the_dense_solution(solver, spd, normal, seed, n, condition):
    matrix, b = spd(seed, n, condition), normal(seed + 2, n)
    found = dataclasses.replace(solver, rtol=1e-10).solve(LinearOperator(matrix.mv, symmetric=True), b)
    # |u - u*| <= |A^-1| |residual| <= condition * 1e-10 |b| with |A| = 1, and as much rounding in u* itself.
    error = torch.linalg.vector_norm(found.solution - torch.linalg.solve(matrix, b))
    assert error <= 2 * condition * 1e-10 * torch.linalg.vector_norm(b)
    assert found.converged


@pytest.mark.parametrize("solver", GENERAL, ids=repr)
@given(seed=seeds, n=st.integers(1, 8), condition=st.sampled_from([1.0, 30.0, 1000.0]))
@some
def test_agrees_with_the_dense_solution_when_not_symmetric(solver, general, normal, seed, n, condition):
    matrix, b = general(seed, n, condition), normal(seed + 2, n)
    found = dataclasses.replace(solver, rtol=1e-10).solve(LinearOperator(matrix.mv), b)
    error = torch.linalg.vector_norm(found.solution - torch.linalg.solve(matrix, b))
    assert error <= 2 * condition * 1e-10 * torch.linalg.vector_norm(b)


@pytest.mark.filterwarnings("ignore:.*no better than none")  # Nystrom's rank is small, and so is its damping
@pytest.mark.parametrize("solver", EVERY, ids=repr)
@given(seed=seeds, n=st.integers(1, 8), damping=st.sampled_from([0.1, 2.0]))
@some
def test_residual_and_products_are_true(solver, spd, normal, counted, seed, n, damping):
    matrix, b = spd(seed, n, 10.0), normal(seed + 2, n)
    step = {"step_size": 0.2} if getattr(solver, "step_size", None) is not None else {}  # < 2 / (1 + damping)
    solver = dataclasses.replace(solver, damping=damping, **step)
    system = counted(matrix, symmetric=True)
    found = solver.solve(system.operator, b)
    true = torch.linalg.vector_norm(b - matrix @ found.solution - damping * found.solution)
    # The same numbers subtracted in another order: rounding of |A| |u| <= (1 + damping) |u|, n terms a product.
    slack = 4 * n * EPS * (torch.linalg.vector_norm(b) + (1 + damping) * torch.linalg.vector_norm(found.solution))
    assert abs(found.residual_norm - true) <= slack
    assert found.products == system.calls
    if found.converged:
        assert found.residual_norm <= solver.tolerance(b)


@pytest.mark.parametrize("solver", ACCURATE, ids=repr)
def test_damping_is_added_to_the_diagonal(solver, spd, normal):
    matrix, b = spd(1, 6, 1e3), normal(2, 6)
    found = dataclasses.replace(solver, damping=0.5, rtol=1e-10).solve(LinearOperator(matrix.mv, symmetric=True), b)
    expected = torch.linalg.solve(matrix + 0.5 * torch.eye(6, dtype=b.dtype), b)
    # Smallest eigenvalue above 0.5, so the error is at most twice the residual, 1e-10 |b| < 1e-9.
    assert torch.allclose(found.solution, expected, rtol=0.0, atol=2e-9)


@pytest.mark.parametrize("solver", STARTED, ids=repr)
def test_a_start_at_the_solution_takes_one_product(solver, spd, normal, counted):
    matrix, b = spd(3, 7, 20.0), normal(4, 7)
    start = torch.linalg.solve(matrix, b)
    system = counted(matrix, symmetric=True)
    found = solver.solve(system.operator, b, start)
    assert system.calls == found.products == 1
    assert torch.equal(found.solution, start)
    assert found.converged


@pytest.mark.parametrize("solver", STARTED, ids=repr)
def test_a_start_nearby_saves_products(solver, spd, normal):
    matrix, b = spd(3, 30, 20.0), normal(4, 30)
    operator = LinearOperator(matrix.mv, symmetric=True)
    start = torch.linalg.solve(matrix, b) + 1e-5 * normal(5, 30)
    solver = dataclasses.replace(solver, max_steps=2000)
    assert solver.solve(operator, b, start).products < 0.75 * solver.solve(operator, b).products


@pytest.mark.parametrize("solver", [ConjugateGradient(), GMRES(), Neumann(max_steps=2000)], ids=repr)
def test_tolerances_are_met_and_not_overdone(solver, spd, normal):
    matrix, b = spd(5, 30, 50.0), normal(6, 30)
    operator = LinearOperator(matrix.mv, symmetric=True)
    size = torch.linalg.vector_norm(b)
    found = {rtol: dataclasses.replace(solver, rtol=rtol).solve(operator, b) for rtol in (1e-2, 1e-8)}
    assert all(solution.residual_norm <= rtol * size for rtol, solution in found.items())
    assert found[1e-2].products < found[1e-8].products
    absolute = dataclasses.replace(solver, rtol=0.0, atol=float(1e-2 * size)).solve(operator, b)
    assert absolute.products == found[1e-2].products
    assert absolute.converged


SHORT = [
    ConjugateGradient(max_steps=2),
    GMRES(max_steps=2),
    Neumann(max_steps=2),
    Identity(rtol=1e-6),
    Nystrom(rank=1, damping=1e-3, rtol=1e-6),
]


@pytest.mark.parametrize("solver", SHORT, ids=repr)
def test_falling_short_warns_by_how_much_or_raises(solver, spd, normal):
    matrix, b = spd(7, 12, 100.0), normal(8, 12)
    operator = LinearOperator(matrix.mv, symmetric=True)
    with pytest.warns(
        LinearNonConvergenceWarning, match=rf"{type(solver).__name__} stopped after \d+ products"
    ) as caught:
        found = solver.solve(operator, b)
    assert f"{float(found.residual_norm):.3g}" in str(caught[0].message)
    assert not found.converged
    with pytest.raises(ConvergenceError, match="wanted max"):
        dataclasses.replace(solver, strict=True).solve(operator, b)
    if not bool(found.beats_zero):
        with pytest.raises(ConvergenceError, match="no better than none"):
            dataclasses.replace(solver, strict=True, rtol=None).solve(operator, b)
        return
    silent = dataclasses.replace(solver, strict=True, rtol=None).solve(operator, b)
    assert torch.equal(silent.solution, found.solution)
    assert not silent.converged


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_zero_needs_no_product(solver, spd, counted):
    system = counted(spd(1, 4, 10.0), symmetric=True)
    b = torch.zeros(4, dtype=torch.float64)
    found = solver.solve(system.operator, b, torch.ones_like(b))
    assert torch.equal(found.solution, b)
    assert system.calls == found.products == 0
    assert found.residual_norm == 0.0


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_nothing_is_mutated(solver, spd, normal):
    matrix, b, start = spd(1, 5, 10.0), normal(2, 5), normal(3, 5)
    copies = matrix.clone(), b.clone(), start.clone()
    found = solver.solve(LinearOperator(matrix.mv, symmetric=True), b, start)
    again = solver.solve(LinearOperator(matrix.mv, symmetric=True), b, start)
    assert all(torch.equal(now, then) for now, then in zip((matrix, b, start), copies, strict=True))
    assert torch.equal(found.solution, again.solution)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_an_operator_may_return_its_argument(solver):
    b = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = solver.solve(LinearOperator(lambda v: v, symmetric=True), b)
    assert torch.equal(b, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    assert torch.equal(torch.sign(found.solution), torch.sign(b))


@pytest.mark.parametrize("solver", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("enabled", [True, False])
def test_dtype_and_grad_mode_are_respected(solver, dtype, enabled, spd, normal):
    matrix, b = spd(1, 5, 10.0).to(dtype), normal(2, 5).to(dtype)
    with torch.set_grad_enabled(enabled):
        found = dataclasses.replace(solver, rtol=solver.rtol and 1e-4).solve(
            LinearOperator(matrix.mv, symmetric=True), b, torch.zeros_like(b)
        )
    assert found.solution.dtype == found.residual_norm.dtype == dtype
    assert not found.solution.requires_grad


@pytest.mark.parametrize("solver", [ConjugateGradient(), GMRES(), Neumann(max_steps=500), Dense()], ids=repr)
def test_an_unattainable_tolerance_warns_soon(solver, spd, normal, counted):
    matrix, b = spd(1, 20, 1e3).float(), normal(2, 20).float()
    system = counted(matrix, symmetric=True)
    with pytest.warns(LinearNonConvergenceWarning, match=r"torch.float32 resolves 1e-07"):
        found = dataclasses.replace(solver, rtol=1e-12).solve(system.operator, b)
    # CG and GMRES stop after a few corrections of about n steps in vain; the series runs its course.
    assert found.products == system.calls <= (520 if isinstance(solver, Neumann) else 120)
    assert torch.isfinite(found.solution).all()


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_tiny_and_huge_systems_are_scaled_right(solver, spd, normal):
    # Squares of 1e-25 underflow in float32, those of 1e25 overflow.
    matrix, b = spd(1, 5, 4.0).float(), normal(2, 5).float()
    solver = dataclasses.replace(solver, rtol=solver.rtol and 1e-4)
    operator = LinearOperator(matrix.mv, symmetric=True)
    usual = solver.solve(operator, b)
    for scale in (1e-25, 1e25):
        scaled = solver.solve(operator, scale * b)
        assert torch.allclose(scaled.solution / scale, usual.solution, rtol=1e-3, atol=1e-3)
        assert scaled.residual_norm > 0 or usual.residual_norm < 1e-6


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_what_cannot_be_solved_is_refused(solver, spd):
    operator = LinearOperator(spd(1, 3, 10.0).mv, symmetric=True)
    b = torch.ones(3, dtype=torch.float64)
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = torch.tensor([1.0, bad, 0.0], dtype=torch.float64)
        with pytest.raises(NonFiniteError, match="right-hand side"):
            solver.solve(operator, spoilt)
        with pytest.raises(NonFiniteError, match="initial"):
            solver.solve(operator, b, spoilt)
    for bad_b in (torch.ones(3, 1), torch.ones(()), torch.ones(0), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"wants one floating-point vector \[n\]"):
            solver.solve(operator, bad_b)
    for bad_start in (torch.ones(4, dtype=torch.float64), torch.ones(3)):
        with pytest.raises(ValueError, match="Give one like it"):
            solver.solve(operator, b, bad_start)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_products_that_are_not_finite_raise(solver, value):
    with pytest.raises(BilevelError):
        solver.solve(LinearOperator(lambda v: value * v, symmetric=True), torch.ones(3, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*no better than none")  # Nystrom's rank is small, and so is its damping
@pytest.mark.parametrize("solver", EVERY, ids=repr)
@pytest.mark.parametrize("batched", ["both", "matrix", "rhs"])
def test_vmap_equals_a_loop(solver, batched, spd, normal):
    n, batch = 5, 4
    matrices = torch.stack([spd(seed, n, 2.0 + 5.0 * seed) for seed in range(batch)])
    vectors = normal(9, batch, n)
    vectors[1] = 0.0  # done before it starts
    vectors[2] = matrices[2] @ vectors[2] * 1e-8
    solver = dataclasses.replace(solver, rtol=solver.rtol and 1e-10)

    def solve(matrix, b):
        found = solver.solve(LinearOperator(lambda v: matrix @ v, symmetric=True), b)
        return found.solution, found.residual_norm

    if batched == "matrix":
        vectors = vectors[:1].expand(batch, n)
    if batched == "rhs":
        matrices = matrices[:1].expand(batch, n, n)
    dims = (None if batched == "rhs" else 0, None if batched == "matrix" else 0)
    arguments = matrices[0] if batched == "rhs" else matrices, vectors[0] if batched == "matrix" else vectors
    solutions, residuals = torch.func.vmap(solve, in_dims=dims)(*arguments)
    for k in range(batch):
        alone, residual = solve(matrices[k], vectors[k])
        # Both within the residual tolerance, with 1/|A^-1| >= 1/17; the approximate ones to rounding.
        assert torch.allclose(solutions[k], alone, rtol=0.0, atol=2 * 17 * 1e-10 * float(vectors[k].norm()) + 1e-13)
        assert abs(residuals[k] - residual) <= 2e-10 * vectors[k].norm() + 1e-13


def test_vmap_nests_and_takes_random_starts(spd, normal):
    matrices = torch.stack([spd(seed, 4, 5.0) for seed in range(6)]).reshape(2, 3, 4, 4)
    b = normal(1, 4)
    for solver in (Nystrom(rank=2, damping=1.0), Neumann(max_steps=4, rtol=None), GMRES()):

        def solve(matrix, solver=solver):
            return solver.solve(LinearOperator(lambda v: matrix @ v, symmetric=True), b).solution

        nested = torch.func.vmap(torch.func.vmap(solve))(matrices)
        assert torch.allclose(nested[1, 2], solve(matrices[1, 2]), rtol=1e-6, atol=1e-6)


def test_one_bad_system_in_a_batch_is_reported(spd):
    matrices = torch.stack([spd(0, 3, 2.0), -spd(1, 3, 2.0)])

    def solve(matrix):
        operator = LinearOperator(lambda v: matrix @ v, symmetric=True)
        return ConjugateGradient().solve(operator, torch.ones(3, dtype=torch.float64)).solution

    with pytest.raises(BilevelError, match="curvature"):
        torch.func.vmap(solve)(matrices)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_settings_that_cannot_work_are_refused(solver):
    for name in ("rtol", "atol", "damping"):
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"{type(solver).__name__} was given {name}="):
                dataclasses.replace(solver, **{name: bad})


@pytest.mark.parametrize(
    ("kind", "settings_"),
    [
        (ConjugateGradient, {"max_steps": 0}),
        (GMRES, {"max_steps": 0}),
        (GMRES, {"restart": 0}),
        (Neumann, {"max_steps": -1}),
        (Neumann, {"step_size": 0.0}),
        (Neumann, {"power_steps": 0}),
        (Neumann, {"power_steps": -1, "step_size": 0.1}),
        (Identity, {"scale": 0.0}),
        (Nystrom, {"rank": 0, "damping": 1.0}),
        (Nystrom, {"rank": 1, "damping": 0.0}),
    ],
)
def test_own_settings_that_cannot_work_are_refused(kind, settings_):
    with pytest.raises(ValueError, match=f"{kind.__name__} was given"):
        kind(**settings_)


def test_settings_are_frozen_and_compare():
    assert ConjugateGradient(rtol=1e-3) == ConjugateGradient(rtol=1e-3)
    assert len({GMRES(), GMRES(), GMRES(restart=5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        GMRES().restart = 4


def test_a_solution_that_meets_its_tolerance_is_silent(spd, normal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = GMRES().solve(LinearOperator(spd(1, 5, 10.0).mv), normal(2, 5))
    assert found.converged
