"""The library, and the floor: the same derivative in plain torch, with nothing checked and nothing told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from problem import Leaves, Problem
from torch import Tensor

import bilevel as bl

NEUMANN_STEP = 0.05
Run = Callable[[], Leaves]


def ours(problem: Problem, kind: str, *, defaults: bool = False) -> Run:
    """A response called as a layer, and plain autograd through it.

    `defaults`: the series' step size is not given; it comes from an eigenvalue that an earlier solve has estimated.
    """
    # The answer is the start itself: what is timed is the derivative at a point, as in the loops by hand.
    still = bl.ClosedForm(lambda: problem.weights)
    sgd = partial(torch.optim.SGD, lr=problem.lr, momentum=problem.momentum)
    solvers: dict[str, bl.linear.LinearSolver] = {
        "cg": bl.ConjugateGradient(max_steps=problem.cg, rtol=None),
        "neumann": bl.Neumann(max_steps=problem.neumann, step_size=NEUMANN_STEP, power_steps=0, rtol=None),
    }
    if defaults:
        solvers["neumann"] = bl.Neumann(max_steps=problem.neumann, rtol=None)
    response: bl.Response = (
        bl.Unrolled(sgd, steps=problem.unroll)
        if kind == "unroll"
        else bl.Implicit(still, tolerance=None, linear_solver=solvers[kind])
    )
    game = problem.game()
    state = response.init(game)
    decays = tuple(d.clone().requires_grad_() for d in problem.decays)

    if defaults and kind == "neumann":
        weights, state = response(game, {"decays": decays}, state)
        torch.autograd.grad(problem.lead(weights), decays)
        state = response.after_backward(state, weights)
        # What was learned of A is kept. A warm start is not: the loop by hand starts from zero too.
        state = state | {"linear": state["linear"] | {"adjoint": state["linear"]["adjoint"][:0]}}

    def run() -> Leaves:
        weights, _ = response(game, {"decays": decays}, state)
        return torch.autograd.grad(problem.lead(weights), decays)

    return run


def hand(problem: Problem, kind: str, *, measured: bool = False) -> Run:
    """The floor; `measured`: with one more product, for the residual that is left, as the library has it."""
    decays = tuple(d.clone().requires_grad_() for d in problem.decays)

    def unroll() -> Leaves:
        weights = [w.clone().requires_grad_() for w in problem.weights]
        velocity = [torch.zeros_like(w) for w in weights]
        for _ in range(problem.unroll):
            slopes = torch.autograd.grad(problem.follow(decays, tuple(weights)), weights, create_graph=True)
            velocity = [problem.momentum * v + g for v, g in zip(velocity, slopes, strict=True)]
            weights = [w - problem.lr * v for w, v in zip(weights, velocity, strict=True)]
        return torch.autograd.grad(problem.lead(tuple(weights)), decays)

    def implicit() -> Leaves:
        weights = tuple(w.clone().requires_grad_() for w in problem.weights)
        slopes = torch.autograd.grad(problem.follow(decays, weights), weights, create_graph=True)
        b = torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem.lead(weights), weights)])
        sizes = [w.numel() for w in weights]

        def split(v: Tensor) -> list[Tensor]:
            return [part.view_as(w) for part, w in zip(v.split(sizes), weights, strict=True)]

        def product(v: Tensor) -> Tensor:
            rows = torch.autograd.grad(slopes, weights, split(v), retain_graph=True)
            return torch.cat([row.reshape(-1) for row in rows])

        u = _cg(product, b, problem.cg) if kind == "cg" else _neumann(product, b, problem.neumann)
        if measured:
            float((b - product(u)).norm() / b.norm())
        return tuple(-g for g in torch.autograd.grad(slopes, decays, split(u)))

    return unroll if kind == "unroll" else implicit


def _cg(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    u, r = torch.zeros_like(b), b.clone()
    p, rho = r.clone(), r @ r
    for _ in range(steps):
        ap = product(p)
        a = rho / (p @ ap)
        u, r = u + a * p, r - a * ap
        rho, old = r @ r, rho
        p = r + (rho / old) * p
    return u


def _neumann(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    term, total = b, b
    for _ in range(steps):
        term = term - NEUMANN_STEP * product(term)
        total = total + term
    return NEUMANN_STEP * total
