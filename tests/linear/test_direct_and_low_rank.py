"""The solvers that do not iterate: the dense matrix, a sketch of it, the identity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import (
    BilevelError,
    IndefiniteSystemError,
    LinearNonConvergenceWarning,
    NotSymmetricError,
    SingularSystemError,
)
from bilevel.linear import Dense, Identity, LinearOperator, Nystrom


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_dense_refuses_a_singular_matrix(rank, normal):
    factor = normal(1, 4, rank)
    operator = LinearOperator((factor @ factor.mT).mv, symmetric=True)
    b = normal(2, 4)
    with pytest.raises(SingularSystemError, match="Add damping="):
        Dense().solve(operator, b)
    assert issubclass(SingularSystemError, BilevelError)
    assert Dense(damping=0.1).solve(operator, b).converged


def test_dense_shows_an_operator_that_is_not_linear():
    with pytest.warns(LinearNonConvergenceWarning):
        Dense().solve(LinearOperator(lambda v: v + v**2), torch.tensor([1.0, 2.0]))


def test_dense_counts_its_columns(spd, normal, counted):
    system = counted(spd(1, 5, 10.0), symmetric=False)
    assert Dense().solve(system.operator, normal(2, 5)).products == system.calls == 6


def test_identity_scales_and_reports(normal, counted):
    system = counted(torch.eye(3, dtype=torch.float64) * 4.0, symmetric=False)
    b = normal(1, 3)
    found = Identity(scale=0.1).solve(system.operator, b)
    assert torch.equal(found.solution, 0.1 * b)
    # 1 - 0.1 * 4 of b is left.
    assert torch.allclose(found.residual_norm, 0.6 * b.norm(), rtol=1e-14)
    assert system.calls == found.products == 1
    assert not found.converged


@given(seed=st.integers(0, 10_000), n=st.integers(1, 10), rank=st.integers(1, 10), spare=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_nystrom_is_exact_when_its_rank_suffices(spd, normal, seed, n, rank, spare):
    # Rank r of n, non-zero eigenvalues in [0.1, 1].
    rank = min(rank, n)
    basis = torch.linalg.qr(normal(seed, n, n)).Q[:, :rank]
    matrix = basis @ spd(seed + 1, rank, 10.0) @ basis.mT
    b = normal(seed + 2, n)
    found = Nystrom(rank=rank + spare, damping=0.1).solve(LinearOperator(matrix.mv, symmetric=True), b)
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(n, dtype=torch.float64), b)
    # With a core as wide as the rank, the shift and rounding of 1e-14 are divided by its smallest eigenvalue, 0.1 times
    # the squared smallest singular value of O'U, a random square matrix: 1e-4 is rare, so 1e-9 in N, over damping^2.
    assert torch.allclose(found.solution, exact, rtol=0.0, atol=1e-6)
    assert found.residual_norm <= 1e-6


def test_nystrom_is_the_formula(spd, normal):
    matrix, b = spd(1, 8, 100.0), normal(2, 8)
    solver = Nystrom(rank=3, damping=0.2, seed=7)
    sketch = torch.randn(8, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    approximation = matrix @ sketch @ torch.linalg.inv(sketch.mT @ matrix @ sketch) @ sketch.mT @ matrix
    expected = torch.linalg.solve(approximation + 0.2 * torch.eye(8, dtype=torch.float64), b)
    # The core's condition number is below 1e4, eps times it and 1/damping twice: 1e-11.
    found = solver.solve(LinearOperator(matrix.mv, symmetric=True), b)
    assert torch.allclose(found.solution, expected, rtol=0.0, atol=1e-10)
    assert found.products == 3 + 1


@pytest.mark.filterwarnings("ignore:.*no better than none")  # of the first ranks
def test_nystrom_gets_better_with_rank(spd, normal):
    matrix, b = spd(3, 20, 1e4), normal(4, 20)
    operator = LinearOperator(matrix.mv, symmetric=True)
    residuals = [float(Nystrom(rank=r, damping=0.01).solve(operator, b).residual_norm) for r in (2, 6, 12, 20, 50)]
    assert residuals[:4] == sorted(residuals[:4], reverse=True)
    assert residuals[-1] < 1e-9


def test_nystrom_of_the_zero_operator_is_the_damping(normal):
    b = normal(1, 4)
    found = Nystrom(rank=2, damping=0.5).solve(LinearOperator(torch.zeros_like, symmetric=True), b)
    assert torch.allclose(found.solution, 2.0 * b)


def test_nystrom_needs_damping():
    with pytest.raises(TypeError, match="damping"):
        Nystrom(rank=3)
    with pytest.raises(ValueError, match="the low-rank part alone has no inverse"):
        Nystrom(rank=3, damping=0.0)


def test_nystrom_refuses_what_is_not_semidefinite_or_not_symmetric(spd, general, normal):
    b = normal(1, 6)
    solver = Nystrom(rank=6, damping=0.1)
    indefinite = spd(1, 6, 2.0) - 0.9 * torch.eye(6, dtype=torch.float64)
    with pytest.raises(IndefiniteSystemError, match="negative eigenvalue"):
        solver.solve(LinearOperator(indefinite.mv, symmetric=True), b)
    with pytest.raises(NotSymmetricError, match="symmetric=False"):
        solver.solve(LinearOperator(indefinite.mv), b)
    with pytest.raises(NotSymmetricError, match="was promised"):
        solver.solve(LinearOperator(general(1, 6, 2.0).mv, symmetric=True), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nystrom_bears_rounding_in_a_semidefinite_matrix(dtype, normal):
    for seed in range(20):
        factor = normal(seed, 30, 4).to(dtype)
        operator = LinearOperator(lambda v, factor=factor: factor @ (factor.mT @ v), symmetric=True)
        found = Nystrom(rank=15, damping=0.1).solve(operator, torch.ones(30, dtype=dtype))
        assert found.solution.dtype == dtype
        # sqrt(eps)-sized errors at worst: |A| is about 50, over a damping of 0.1.
        assert found.residual_norm < 500 * torch.finfo(dtype).eps ** 0.5
