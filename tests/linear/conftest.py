"""Systems whose conditioning is known, and operators that count their products."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bilevel.linear import LinearOperator

Matrix = Callable[..., Tensor]


class Counted:
    """A matrix that counts how often it is multiplied."""

    def __init__(self, matrix: Tensor, symmetric: bool) -> None:
        self.matrix = matrix
        self.calls = 0
        self.operator = LinearOperator(self._matvec, symmetric)

    def _matvec(self, vector: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ vector


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="session")
def counted() -> type[Counted]:
    return Counted


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    return _normal


@pytest.fixture(scope="session")
def spd() -> Matrix:
    """Symmetric, eigenvalues spread by logarithm over [1/condition, 1] in a random basis."""

    def draw(seed: int, n: int, condition: float) -> Tensor:
        basis = torch.linalg.qr(_normal(seed, n, n)).Q
        exponents = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
        matrix = basis * condition**-exponents @ basis.mT
        return 0.5 * (matrix + matrix.mT)

    return draw


@pytest.fixture(scope="session")
def general() -> Matrix:
    """Not symmetric, singular values spread by logarithm over [1/condition, 1] between two random bases."""

    def draw(seed: int, n: int, condition: float) -> Tensor:
        left, right = torch.linalg.qr(_normal(seed, n, n)).Q, torch.linalg.qr(_normal(seed + 1, n, n)).Q
        exponents = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
        return left * condition**-exponents @ right

    return draw
