"""Extreme eigenvalues against dense ones, and their bounds."""

import math

import pytest
import torch

from bilevel.errors import NonFiniteError, NotSymmetricError
from bilevel.linear import LinearOperator
from bilevel.linear.lanczos import extreme_eigenvalues

D = torch.float64


def symmetric(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=D))
    matrix = q @ torch.diag(torch.tensor(values, dtype=D)) @ q.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [-1.0, 0.0, 3.0], [1.0, 1.0, 5.0, 5.0], [0.0, 0.0]])
def test_as_many_steps_as_unknowns_are_exact_also_with_multiple_eigenvalues(values):
    matrix = symmetric(values)
    found = extreme_eigenvalues(LinearOperator(matrix.mv, symmetric=True), matrix[0], steps=30)
    assert found.exact and found.products == len(values)
    assert found.smallest == pytest.approx(min(values), abs=1e-13)
    assert found.largest == pytest.approx(max(values), abs=1e-13)
    assert found.lower <= min(values) <= max(values) <= found.upper


def test_the_bounds_hold_for_every_start_and_rayleigh_quotients_lie_inside():
    values = torch.linspace(0.1, 1.0, 400, dtype=D).tolist()
    matrix = symmetric(values)
    for seed in range(40):
        found = extreme_eigenvalues(LinearOperator(matrix.mv, symmetric=True), matrix[0], steps=20, seed=seed)
        assert not found.exact and found.products == 20
        assert found.lower <= 0.1 <= found.smallest + 1e-12
        assert found.largest - 1e-12 <= 1.0 <= found.upper


def test_more_steps_miss_less():
    diagonal = torch.logspace(-4, 0, 2000, dtype=D)
    operator = LinearOperator(lambda v: diagonal * v, symmetric=True)
    few, many = (extreme_eigenvalues(operator, diagonal, steps=k) for k in (15, 60))
    assert many.smallest < few.smallest and many.lower > few.lower


def test_too_few_steps_promise_nothing():
    diagonal = torch.linspace(1, 2, 100, dtype=D)
    found = extreme_eigenvalues(LinearOperator(lambda v: diagonal * v, symmetric=True), diagonal, steps=2)
    assert found.lower == -math.inf


def test_refusals():
    vector = torch.ones(3, dtype=D)
    with pytest.raises(NotSymmetricError, match="symmetric=False"):
        extreme_eigenvalues(LinearOperator(lambda v: v), vector)
    with pytest.raises(NonFiniteError, match="product 1"):
        extreme_eigenvalues(LinearOperator(lambda v: v * math.nan, symmetric=True), vector)
