"""Systems whose conditioning is known, and operators that count their products."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, optim

import bilevel as bl
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


@pytest.fixture(scope="session")
def ridge() -> Callable[[], bl.Game]:
    """A penalty for each of 25 weights, over four decades."""
    inputs = _normal(2, 30, 25)

    def game() -> bl.Game:
        def fit(x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * ((inputs @ y - 1.0) ** 2).mean() + 0.5 * (x.exp() * y * y).sum()

        start = torch.linspace(-9.0, 0.0, 25, dtype=torch.float64)
        leader = bl.Player(lambda y: ((y - 0.3) ** 2).sum(), start)
        return bl.Game(x=leader, y=bl.Player(fit, torch.zeros(25, dtype=torch.float64)))

    return game


@pytest.fixture
def ends_where_it_did_without(tmp_path) -> Callable[..., None]:
    """That a run by one response ends where it does by another, to `atol`, and resumes from half way bit for bit."""

    def check(
        game: Callable[[], bl.Game], plain: bl.Response, response: bl.Response, *, steps: int, atol: float
    ) -> None:
        adam, file = partial(optim.Adam, lr=0.1), tmp_path / "run.pt"
        before = bl.solve(game(), y=plain, optimizer=adam, steps=steps)
        whole = bl.solve(game(), y=response, optimizer=adam, steps=steps)
        bl.solve(game(), y=response, optimizer=adam, steps=steps // 2, checkpoint=file)
        resumed = bl.solve(game(), y=response, optimizer=adam, steps=steps, checkpoint=file)
        assert torch.allclose(whole.variables["x"], before.variables["x"], atol=atol)
        assert torch.equal(whole.variables["x"], resumed.variables["x"])
        assert whole.products == resumed.products

    return check
