"""Conjugate gradients: exactness, refusals, and three defects of other implementations."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import IndefiniteSystemError, LinearNonConvergenceWarning, NotSymmetricError
from bilevel.linear import ConjugateGradient, LinearOperator, Nystrom


@given(seed=st.integers(0, 10_000), n=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_exact_after_n_steps(spd, normal, seed, n):
    # A direction that holds some of the old residual is not conjugate, and n steps do not suffice then.
    matrix, b = spd(seed, n, 10.0), normal(seed + 1, n)
    found = ConjugateGradient(max_steps=n, rtol=None).solve(LinearOperator(matrix.mv, symmetric=True), b)
    # Rounding of 1e-16 grows with the loss of conjugacy, by about the condition number a few times: 1e-12 at worst.
    assert torch.allclose(found.solution, torch.linalg.solve(matrix, b), rtol=0.0, atol=1e-10)


def test_the_last_iterate_is_the_one_returned(counted):
    # Stopping on the tolerance before storing the iterate that met it would return 0 here.
    for scale in (0.3, 1.0, 40.0):
        system = counted(scale * torch.eye(4, dtype=torch.float64), symmetric=True)
        b = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
        found = ConjugateGradient().solve(system.operator, b)
        assert torch.allclose(found.solution, b / scale, rtol=1e-14, atol=0.0)
        assert found.products == system.calls == 2  # one step, one for the true residual


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_each_iterate_is_the_minimiser_of_its_krylov_space(steps, spd, normal):
    # A step scaled for the iterate and not for its residual, or the reverse, leaves the minimiser at the second step.
    matrix, b = spd(2, 8, 30.0), normal(3, 8)
    found = ConjugateGradient(max_steps=steps, rtol=None).solve(LinearOperator(matrix.mv, symmetric=True), b)
    powers = [b]
    for _ in range(steps - 1):
        powers.append(matrix @ powers[-1])
    space = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    expected = space @ torch.linalg.solve(space.mT @ matrix @ space, space.mT @ b)
    # The Krylov basis itself is known to eps times its condition number, 1e5 for five powers.
    assert torch.allclose(found.solution, expected, rtol=0.0, atol=1e-10)
    assert torch.allclose(found.residual_norm, torch.linalg.vector_norm(b - matrix @ found.solution), rtol=1e-12)


def test_directions_are_conjugate(spd, normal):
    matrix, b = spd(4, 6, 20.0), normal(5, 6)
    seen = []

    def matvec(v):
        seen.append(v)
        return matrix @ v

    ConjugateGradient(max_steps=6, rtol=None).solve(LinearOperator(matvec, symmetric=True), b)
    directions = torch.stack([v / v.norm() for v in seen[:6]])
    gram = directions @ matrix @ directions.mT
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-10)


def test_a_recurrence_that_lost_its_residual_is_restarted(spd, normal):
    matrix, b = spd(6, 10, 10.0), normal(7, 10)
    calls = 0

    def matvec(v):
        # One product is off by a thousandth: the recurrence does not see it, the true residual does.
        nonlocal calls
        calls += 1
        return matrix @ v + (1e-3 * v.flip(0) if calls == 3 else 0.0)

    found = ConjugateGradient(rtol=1e-10, max_steps=100).solve(LinearOperator(matvec, symmetric=True), b)
    assert found.converged
    assert torch.linalg.vector_norm(b - matrix @ found.solution) <= 1.01e-10 * torch.linalg.vector_norm(b)
    assert found.products == calls > 12  # more than one run of n steps


def test_refuses_an_operator_without_the_promise(spd):
    with pytest.raises(NotSymmetricError, match=r"symmetric=False. Use GMRES\(\)"):
        ConjugateGradient().solve(LinearOperator(spd(1, 3, 2.0).mv), torch.ones(3, dtype=torch.float64))


@given(seed=st.integers(0, 10_000), n=st.integers(2, 10), amount=st.sampled_from([1e-2, 0.3]))
@settings(max_examples=40, deadline=None)
def test_a_false_promise_shows_at_the_second_product(spd, normal, counted, seed, n, amount):
    matrix, b = spd(seed, n, 10.0), normal(seed + 1, n)
    # A rotation in the plane of b and A b: random ones nearly vanish there when n is large.
    p = b / b.norm()
    q = matrix @ p - p * (p @ matrix @ p)
    q = q / q.norm()
    system = counted(matrix + amount * (torch.outer(p, q) - torch.outer(q, p)), symmetric=True)
    with pytest.raises(NotSymmetricError, match="was promised symmetric=True"):
        ConjugateGradient().solve(system.operator, b)
    assert system.calls == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_true_promise_is_believed(dtype, spd, normal):
    # Warm starts lie where A is small, and rounding weighs most there.
    for seed in range(40):
        matrix = spd(seed, 30, 1e5 if dtype == torch.float32 else 1e12).to(dtype)
        matrix = 0.5 * (matrix + matrix.mT)
        operator, start = LinearOperator(matrix.mv, symmetric=True), None
        b = normal(seed + 1, 30).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LinearNonConvergenceWarning)
            for _ in range(4):
                start = ConjugateGradient(max_steps=8).solve(operator, b, start).solution


@pytest.mark.parametrize(("lowest", "pattern"), [(-0.5, "-0.5"), (0.0, " = 0;")])
def test_curvature_that_is_not_positive_raises(lowest, pattern):
    diagonal = torch.tensor([lowest, 2.0], dtype=torch.float64)
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    operator = LinearOperator(lambda v: diagonal * v, symmetric=True)
    with pytest.raises(IndefiniteSystemError, match=pattern) as caught:
        ConjugateGradient().solve(operator, b)
    assert "damping=" in str(caught.value)
    assert "GMRES()" in str(caught.value)
    assert ConjugateGradient(damping=1.0).solve(operator, b).converged


def test_negative_curvature_is_seen_late_too(normal):
    diagonal = torch.linspace(1.0, 2.0, 8, dtype=torch.float64)
    diagonal[3] = -0.1
    with pytest.raises(IndefiniteSystemError):
        ConjugateGradient().solve(LinearOperator(lambda v: diagonal * v, symmetric=True), normal(1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_not_taken_for_negative_curvature(dtype):
    # Positive semidefinite matrices of any rank and scale, whose flat directions rounding puts on either side of 0.
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(2, 40, (), generator=generator))
        rank = int(torch.randint(1, n + 1, (), generator=generator))
        factor = torch.randn(n, rank, generator=generator, dtype=dtype)
        matrix = 10.0 ** (seed % 12 - 6) * (factor @ factor.mT)
        operator = LinearOperator(matrix.mv, symmetric=True)
        consistent = matrix @ torch.randn(n, generator=generator, dtype=dtype)
        for b in (consistent, torch.randn(n, generator=generator, dtype=dtype)):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = ConjugateGradient(rtol=rtol).solve(operator, b)
            left = float((matrix @ found.solution - b).norm() / b.norm())
            assert left <= rtol or said


def test_a_consistent_singular_system_is_solved():
    diagonal = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    b = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)
    found = ConjugateGradient().solve(LinearOperator(lambda v: diagonal * v, symmetric=True), b)
    assert torch.allclose(found.solution, torch.tensor([0.0, 3.0, 2.0], dtype=torch.float64), atol=1e-12)


def test_a_preconditioner_that_is_the_inverse_needs_one_step(spd, normal):
    matrix, b = spd(1, 9, 1e6), normal(2, 9)
    inverse = torch.linalg.inv(matrix)
    solver = ConjugateGradient(preconditioner=inverse.mv)
    assert solver.solve(LinearOperator(matrix.mv, symmetric=True), b).products == 2


def test_a_diagonal_preconditioner_saves_products(normal):
    scales = torch.logspace(-3, 3, 40, dtype=torch.float64)
    noise = normal(1, 40, 40) / 40
    matrix = scales.sqrt()[:, None] * (torch.eye(40, dtype=torch.float64) + noise @ noise.mT) * scales.sqrt()
    operator, b = LinearOperator(matrix.mv, symmetric=True), normal(2, 40)
    plain = ConjugateGradient(max_steps=2000).solve(operator, b)
    quick = ConjugateGradient(preconditioner=lambda r: r / matrix.diagonal()).solve(operator, b)
    assert quick.converged
    assert quick.products < plain.products / 3


def test_a_sketch_preconditions(spd, normal):
    # Eigenvalues from 1 to 1e-8: the sketch catches those above the damping.
    matrix, b = spd(1, 60, 1e8), normal(2, 60)
    operator = LinearOperator(matrix.mv, symmetric=True)
    preconditioner = Nystrom(rank=45, damping=1e-4).preconditioner(operator, b)
    plain = ConjugateGradient(damping=1e-4, rtol=1e-10, max_steps=500).solve(operator, b)
    quick = ConjugateGradient(damping=1e-4, rtol=1e-10, preconditioner=preconditioner).solve(operator, b)
    assert quick.converged
    assert quick.products < plain.products / 3
    # Smallest eigenvalue 1e-4: errors of 1e-10 |b| / 1e-4 each, |b| < 10.
    assert torch.allclose(quick.solution, plain.solution, rtol=0.0, atol=2e-5)


def test_a_preconditioner_that_is_not_definite_is_refused(spd, normal):
    operator = LinearOperator(spd(1, 5, 10.0).mv, symmetric=True)
    with pytest.raises(IndefiniteSystemError, match="preconditioner"):
        ConjugateGradient(preconditioner=lambda r: -r).solve(operator, normal(2, 5))


def test_a_right_hand_side_that_requires_grad_does_not_warn(spd, normal):
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch's warning of a tensor that is made a number comes once a process otherwise
    try:
        found = ConjugateGradient().solve(
            LinearOperator(spd(0, 5, 10.0).mv, symmetric=True), normal(0, 5).requires_grad_()
        )
    finally:
        torch.set_warn_always(always)
    assert found.converged


@pytest.mark.parametrize("grad", [False, True])
def test_a_preconditioner_that_lets_nothing_through_is_named(grad):
    operator = LinearOperator(lambda v: 2.0 * v, symmetric=True)
    solver = ConjugateGradient(preconditioner=lambda r: 0.0 * r)
    with torch.set_grad_enabled(grad), pytest.raises(IndefiniteSystemError, match="preconditioner gave r'M"):
        solver.solve(operator, torch.ones(3))
