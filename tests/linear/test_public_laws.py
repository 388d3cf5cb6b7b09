"""`check_linear_solver` and `check_preconditioner` pass what is right, and catch what is not."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bilevel.extend import LinearSolver, Preconditioner, gaussian
from bilevel.linear import (
    GMRES,
    BlockDiagonal,
    ConjugateGradient,
    Dense,
    Diagonal,
    Extrapolated,
    Identity,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    Recycled,
)
from bilevel.testing import check_linear_solver, check_preconditioner


@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradient(rtol=1e-9),
        GMRES(),
        GMRES(restart=3, max_steps=2000),
        Dense(),
        Neumann(max_steps=3000, step_size=0.5),
        Identity(scale=0.5),
        Nystrom(rank=2, damping=0.5),
        Extrapolated(ConjugateGradient(rtol=1e-9)),
    ],
    ids=repr,
)
def test_right_solvers_pass(solver):
    check_linear_solver(solver, general=isinstance(solver, GMRES | Dense))


@pytest.mark.parametrize(
    "preconditioner", [Diagonal(), BlockDiagonal(), NystromPreconditioner(rank=3), Recycled(size=3)], ids=repr
)
def test_right_preconditioners_pass(preconditioner):
    check_preconditioner(preconditioner)


@dataclass(frozen=True, kw_only=True)
class Changed(LinearSolver):
    """The right solution, changed."""

    change: Callable[..., Tensor]

    def iterate(self, system):
        found = Dense().iterate(replace(system))
        changed = self.change(found.solution)
        return system.with_residual(changed, found.residual, found.residual_norm)


@dataclass(frozen=True)
class Map(Preconditioner):
    change: Callable[..., Tensor]

    def prepare(self, operator, memory):
        return self.change, memory


class Forgets(Preconditioner):
    """Its memory cannot be saved."""

    def prepare(self, operator, memory):
        return (lambda r: 2.0 * r), {"kept": self}


@dataclass(frozen=True)
class Random(Preconditioner):
    def prepare(self, operator, memory):
        scale = 1.0 + torch.rand(())
        return (lambda r: scale * r), memory


def test_wrong_solvers_are_caught():
    with pytest.raises(AssertionError, match=r"leaves a residual of .*, and does not warn.\nA = "):
        check_linear_solver(Changed(change=lambda u: 1.1 * u))
    with pytest.raises(AssertionError, match="gives another solution from the same memory"):
        check_linear_solver(Changed(change=lambda u: u + 1e-12 * torch.rand_like(u)))
    with pytest.raises(TypeError, match="check_linear_solver was given 3"):
        check_linear_solver(3)


@pytest.mark.parametrize(
    ("preconditioner", "text"),
    [
        (Map(lambda r: r * r.abs()), r"M\^-1 is not linear"),
        (Map(lambda r: r.cumsum(0)), r"M\^-1 is not symmetric"),
        (Map(lambda r: -r), r"M\^-1 has the eigenvalue -1"),
        (Random(), r"M\^-1 is another one from the same memory"),
        (Forgets(), "the memory of prepare does not go through torch.save"),
    ],
    ids=["not linear", "not symmetric", "negative", "random", "memory"],
)
def test_wrong_preconditioners_are_caught(preconditioner, text):
    with pytest.raises(AssertionError, match=text):
        check_preconditioner(preconditioner)


def test_random_numbers_come_from_a_seed():
    class Seeded(Preconditioner):
        def prepare(self, operator, memory):
            n = sum(torch.Size(shape).numel() for shape in operator.shapes)
            scales = 1.0 + gaussian((n,), torch.ones(n, dtype=torch.float64), 0).abs()
            return (lambda r: r / scales), memory

    check_preconditioner(Seeded())
