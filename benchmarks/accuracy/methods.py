"""The ways to a hypergradient at a known optimum, each given a number of iterations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from problem import MOST, Problem
from torch import Tensor

import bilevel as bl
from bilevel.linear.stopping import Stopping

Method = Callable[[Problem, int], tuple[Tensor, int, float]]
"""From a problem and a number of iterations: the second place's hypergradient, products taken, and seconds."""


@dataclass
class Oracle(Stopping):
    """In place of a `HypergradientTolerance`: notes after which iteration the true error is below each wanted."""

    truth: Tensor
    wanted: tuple[float, ...]
    rtol: float = 0.0
    reached: dict[float, int] = field(default_factory=dict)
    errors: list[tuple[int, float]] = field(default_factory=list)
    satisfied: bool = False
    error: float = 0.0

    def loosened(self, factor: float) -> Oracle:
        """It knows the truth whatever the factor."""
        return self

    def watch(self, interest: Callable[[Tensor], Tensor]) -> Oracle:
        """For one solve."""
        self._interest = interest
        self.satisfied = False
        return self

    def due(self, step: int) -> bool:
        """At each step at first, then at one in twenty."""
        return step < 40 or step % max(1, step // 20) == 0

    def look(self, step: int, solution: Tensor) -> None:
        """Compare with the truth."""
        found = -self._interest(solution)
        error = float((found - self.truth).norm() / self.truth.norm())
        self.errors.append((step, error))
        for wanted in self.wanted:
            if error <= wanted:
                self.reached.setdefault(wanted, step)
        self.satisfied = len(self.reached) == len(self.wanted)


class Ours:
    """`Implicit` at the known optimum; `warm`: after a solve at the first place to rtol 1e-6, which is not timed."""

    def __init__(self, preconditioner: bl.linear.Preconditioner | None, *, warm: bool) -> None:
        self.preconditioner, self.warm = preconditioner, warm

    def run(self, problem: Problem, solver: bl.ConjugateGradient) -> tuple[Tensor, int, float]:
        """The second place by this solver."""
        place = 0
        known = bl.ClosedForm(lambda x: problem.places[place][1])
        game = problem.game
        first = bl.ConjugateGradient(rtol=1e-6, max_steps=MOST, preconditioner=self.preconditioner)
        state = bl.Implicit(known, tolerance=None, linear_solver=first).init(game)
        for place in (0, 1) if self.warm else (1,):
            response = bl.Implicit(known, tolerance=None, linear_solver=solver if place else first)
            x = problem.places[place][0].clone().requires_grad_()
            before = response.report(state).products
            began = time.process_time()
            y, state = response(game, {"x": x}, state)
            (found,) = torch.autograd.grad(problem.lead(y), x)
            seconds = time.process_time() - began
            state = response.after_backward(state, y)
        return found, response.report(state).products - before, seconds

    def __call__(self, problem: Problem, iterations: int) -> tuple[Tensor, int, float]:
        """With so many iterations."""
        exactly = bl.ConjugateGradient(rtol=None, max_steps=iterations, preconditioner=self.preconditioner)
        return self.run(problem, exactly)

    def iterations(self, problem: Problem, truth: Tensor, wanted: tuple[float, ...], most: int) -> dict[float, int]:
        """How many each accuracy takes."""
        oracle = Oracle(truth, wanted)
        solver = bl.ConjugateGradient(
            rtol=None,
            max_steps=most,
            preconditioner=self.preconditioner,
            stopping=oracle,
        )
        self.run(problem, solver)
        return oracle.reached


class HypergradientTolerance(Ours):
    """The same, stopped by its own estimate instead of by an oracle: what a user gets who asks for this accuracy."""

    def __init__(self, preconditioner: bl.linear.Preconditioner | None, *, warm: bool, wanted: float) -> None:
        super().__init__(preconditioner, warm=warm)
        self.wanted = wanted

    def __call__(self, problem: Problem, iterations: int) -> tuple[Tensor, int, float]:
        """Whatever it takes."""
        stopping = bl.linear.HypergradientTolerance(self.wanted)
        solver = bl.ConjugateGradient(rtol=None, max_steps=MOST, preconditioner=self.preconditioner, stopping=stopping)
        return self.run(problem, solver)


def by_hand(problem: Problem, iterations: int) -> tuple[Tensor, int, float]:
    """Plain conjugate gradients from 0 on one retained graph."""
    x, y = (tensor.clone().requires_grad_() for tensor in problem.places[1])
    began = time.process_time()
    (slope,) = torch.autograd.grad(problem.follow(x, y), y, create_graph=True)
    (b,) = torch.autograd.grad(problem.lead(y), y)
    u, r = torch.zeros_like(b), b
    p, rho = r, torch.dot(r, r)
    for _ in range(iterations):
        (product,) = torch.autograd.grad(slope, y, p, retain_graph=True)
        step = rho / torch.dot(p, product)
        u, r = u + step * p, r - step * product
        rho, before = torch.dot(r, r), rho
        p = r + (rho / before) * p
    (found,) = torch.autograd.grad(slope, x, -u)
    return found, iterations, time.process_time() - began


def hypergrad(problem: Problem, iterations: int) -> tuple[Tensor, int, float]:
    """`hypergrad.conjugate_gradient`."""
    from hypergrad.approx_hypergrad import conjugate_gradient

    x, y = (tensor.clone().requires_grad_() for tensor in problem.places[1])
    began = time.process_time()
    (found,) = conjugate_gradient(
        lambda i, o: problem.follow(o[0], i[0]), lambda i, o: problem.lead(i[0]), (y,), (x,), iterations, 1.0
    )
    return found, iterations, time.process_time() - began


def torchopt(problem: Problem, iterations: int) -> tuple[Tensor, int, float]:
    """`torchopt.diff.implicit.custom_root` with its conjugate gradients."""
    import torchopt as theirs

    slope = torch.func.grad(lambda y, x: problem.follow(x, y))
    solver = theirs.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=iterations)
    solve = theirs.diff.implicit.custom_root(slope, argnums=1, solve=solver)(lambda y, x: y.detach())
    x = problem.places[1][0].clone().requires_grad_()
    began = time.process_time()
    (found,) = torch.autograd.grad(problem.lead(solve(problem.places[1][1].clone(), x)), x)
    return found, iterations, time.process_time() - began


def kinds(problem: Problem) -> dict[str, bl.linear.Preconditioner | None]:
    """Preconditioners by name."""
    return {
        "": None,
        "diagonal": bl.linear.Diagonal(),
        "blocks": bl.linear.BlockDiagonal(shapes=problem.shapes),
        "Nystroem": bl.linear.NystromPreconditioner(rank=50),
        "recycled": bl.linear.Recycled(),
        "recycled over diagonal": bl.linear.Recycled(size=40, base=bl.linear.Diagonal()),
    }
