"""GMRES: exactness, breakdowns, stagnation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import LinearNonConvergenceWarning
from bilevel.linear import GMRES, LinearOperator


@given(seed=st.integers(0, 10_000), n=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_exact_after_n_steps(general, normal, seed, n):
    matrix, b = general(seed, n, 10.0), normal(seed + 2, n)
    found = GMRES(max_steps=n, rtol=None).solve(LinearOperator(matrix.mv), b)
    # Backward stable: an error of a few n eps times the condition number, |u| <= 10 |b|.
    assert torch.allclose(found.solution, torch.linalg.solve(matrix, b), rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_residual_is_the_least_of_its_krylov_space(steps, general, normal):
    matrix, b = general(3, 9, 10.0), normal(4, 9)
    found = GMRES(max_steps=steps, rtol=None).solve(LinearOperator(matrix.mv), b)
    powers = [b]
    for _ in range(steps - 1):
        powers.append(matrix @ powers[-1])
    space = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    coefficients = torch.linalg.lstsq(matrix @ space, b).solution
    assert torch.allclose(found.residual_norm, torch.linalg.vector_norm(b - matrix @ space @ coefficients), rtol=1e-9)


def test_solves_what_conjugate_gradients_cannot(normal):
    # A saddle point: symmetric and indefinite, as in a zero-sum game; and a rotation, as in its field.
    saddle = torch.diag(torch.tensor([1.0, 2.0, -1.0, -3.0], dtype=torch.float64))
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    for matrix in (saddle, rotation):
        b = normal(1, len(matrix))
        found = GMRES(rtol=1e-10).solve(LinearOperator(matrix.mv, symmetric=True), b)
        assert torch.allclose(found.solution, torch.linalg.solve(matrix, b), rtol=0.0, atol=1e-9)


def test_a_happy_breakdown_ends_with_the_solution(counted):
    # Two distinct eigenvalues: the Krylov space is complete after two steps.
    system = counted(torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0], dtype=torch.float64)), symmetric=False)
    b = torch.ones(5, dtype=torch.float64)
    found = GMRES(rtol=1e-12).solve(system.operator, b)
    assert system.calls == found.products == 3
    assert torch.allclose(found.solution, b / system.matrix.diagonal(), rtol=1e-14)
    exact = GMRES(rtol=None, max_steps=50).solve(system.operator, b)
    assert exact.products <= 6
    assert torch.isfinite(exact.solution).all()


def test_restarts_that_stagnate_stop_and_warn(counted):
    # Every Krylov space of a cyclic shift short of the whole leaves the residual as it is.
    system = counted(torch.roll(torch.eye(6, dtype=torch.float64), 1, 0), symmetric=False)
    b = torch.zeros(6, dtype=torch.float64)
    b[0] = 1.0
    with pytest.warns(LinearNonConvergenceWarning, match="a larger restart"):
        found = GMRES(restart=5, max_steps=10_000).solve(system.operator, b)
    assert found.products == system.calls == 6
    assert torch.linalg.vector_norm(b - system.matrix @ found.solution) <= 1.0 + 1e-12
    assert GMRES(restart=6).solve(system.operator, b).converged


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 2.0, 0.0]))])
def test_a_singular_system_warns_unless_consistent(matrix):
    matrix = matrix.double()
    with pytest.warns(LinearNonConvergenceWarning):
        found = GMRES().solve(LinearOperator(matrix.mv), torch.ones(3, dtype=torch.float64))
    assert torch.isfinite(found.solution).all()
    inside = matrix @ torch.ones(3, dtype=torch.float64)
    assert torch.allclose(GMRES(rtol=None).solve(LinearOperator(matrix.mv), inside).residual_norm, inside.new_zeros(()))


def test_a_nilpotent_system_stays_finite():
    shift = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    b = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    with pytest.warns(LinearNonConvergenceWarning):
        found = GMRES().solve(LinearOperator(shift.mv), b)
    assert found.residual_norm == 1.0


def test_restarts_go_on_from_the_true_residual(general, normal):
    matrix = torch.eye(40, dtype=torch.float64) + 0.3 * general(1, 40, 5.0)
    b = normal(2, 40)
    found = GMRES(restart=4, rtol=1e-12).solve(LinearOperator(matrix.mv), b)
    # Singular values in [0.7, 1.3].
    assert torch.allclose(found.solution, torch.linalg.solve(matrix, b), rtol=0.0, atol=2e-12 * float(b.norm()))
