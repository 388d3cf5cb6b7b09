"""Responses that stand for the follower's optimum, held against followers solved anew, or against their definition."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.attack.draw import F64, Draw, named, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.play import Written, called, write
from benchmarks.attack.truth import SMOOTH, Loss, Pair, differences


def at_optimum(
    pair: Pair,
    found: Tensor,
    who: int,
    allowed: float,
    loss: Loss | None = None,
    batch: Tensor | None = None,
    told: bool = False,
    **about: Any,
) -> Outcome:
    """Judged by differences of the leader's value at the re-solved follower."""
    there = pair.optimum(pair.x0, loss=loss, batch=batch)
    if there is None:
        return Outcome(found, None, 1.0, allowed, about=about)

    def value(x: Tensor) -> Tensor | None:
        y = pair.optimum(x, there, loss, batch)
        return None if y is None else pair.F(x, y, who)

    truth, doubt = differences(value, pair.x0, pair.sx)
    return Outcome(found, truth, pair.size(pair.x0, there, truth, who), allowed, doubt, told, about)


def inner_of(draw: Draw, pair: Pair) -> tuple[str, Any]:
    """An inner solver whose steps suit the units of a pair."""
    o, rate = torch.optim, pair.rate
    kind = draw.choice(
        [
            "lbfgs",
            "lbfgs",
            "sgd",
            "nesterov",
            "adam",
            "scipy",
            "bfgs",
            "newton",
            "projected",
            "adagrad",
            "clipped",
            "wolfe",
        ]
    )
    return kind, {
        "lbfgs": partial(o.LBFGS, lr=0.7, max_iter=5, tolerance_grad=0.0, tolerance_change=0.0),
        "wolfe": partial(o.LBFGS, lr=1.0, line_search_fn="strong_wolfe"),
        "sgd": partial(o.SGD, lr=rate),
        "nesterov": partial(o.SGD, lr=rate, momentum=0.9, nesterov=True),
        "adam": partial(o.Adam, lr=0.05 * pair.sy),
        "scipy": bl.Scipy("L-BFGS-B"),
        "bfgs": bl.Scipy("BFGS"),
        "newton": bl.Scipy("Newton-CG"),
        "projected": bl.inner.ProjectedGradient(),
        "adagrad": partial(o.Adagrad, lr=0.5 * pair.sy),
        "clipped": bl.inner.TorchOptimizer(partial(o.SGD, lr=rate), clip_norm=1e3 * pair.sf / pair.sy),
    }[kind]


def linear_of(draw: Draw) -> tuple[str, Any]:
    """A linear solver that is to solve the equation, not one whose answer is a definition."""
    l, tight = bl.linear, draw.choice([1e-6, 1e-9, 1e-10])
    improved = draw.choice(
        [
            l.Diagonal(),
            l.NystromPreconditioner(rank=2),
            l.Recycled(size=4),
            l.BlockDiagonal(),
            l.LBFGSPreconditioner(),
            l.AdamPreconditioner(),
        ]
    )
    solvers = {
        "default": None,
        "cg": bl.ConjugateGradient(rtol=tight),
        "preconditioned": bl.ConjugateGradient(rtol=tight, preconditioner=improved),
        "gmres": bl.GMRES(rtol=tight),
        "dense": l.Dense(),
        "neumann": bl.Neumann(max_steps=draw.choice([50, 3000])),
        "extrapolated": l.Extrapolated(bl.ConjugateGradient(rtol=tight)),
        "settled": bl.ConjugateGradient(stopping=l.HypergradientTolerance()),
        "strict": bl.ConjugateGradient(rtol=tight, strict=True),
    }
    kind = draw.choice(list(solvers))
    return kind, solvers[kind]


def several(
    draw: Draw, response: bl.Response, written: Written, warned: list[str], most: int = 4
) -> tuple[Tensor, Tensor, Any, int]:
    """Calls while the leader comes to x0; what the last one gives and warns of."""
    pair, calls, who = written.pair, draw.choice(range(1, most + 1)), draw.randrange(len(written.leaders))
    state = response.init(written.game)
    for call in range(calls):
        warned.clear()
        found, y, state = called(written, response, state, who, pair.x0 + 0.05 * (calls - 1 - call) * pair.sx)
    return found, y, state, who


def implicit(draw: Draw, warned: list[str]) -> Outcome:
    """`Implicit`: inner solvers, linear solvers, tolerances, schedules of inexactness."""
    pair = Pair(draw, draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 4]), kinds=SMOOTH)
    if draw.maybe(0.12) and 1e-10 < pair.sf < 1e6 and 1e-10 < pair.sF < 1e6:
        pair.dtype = torch.float32
    (inner_kind, inner), (kind, solver) = inner_of(draw, pair), linear_of(draw)
    tolerance = draw.choice([1e-3, 1e-3, 1e-6, 1e-9, None])
    r = bl.responses
    batched = draw.maybe(0.3)
    data_kind, data = source(draw, [pair.batches[0].to(pair.dtype)]) if batched else ("none", None)
    written = write(draw, pair, data=data, leaders=draw.choice([1, 1, 2]), batched=batched)
    if draw.maybe(0.1) and pair.kind == "quad":
        inner_kind = "closed form"

        def closed(values: dict[str, Any], _: Any) -> Any:
            pull = pair.B @ pair.bend(written.x(values).double() / pair.sx) + pair.shift
            y = pair.sy * torch.linalg.solve(pair.A, pull + (pair.batches[0] if batched else 0.0))
            return written.follows.tree(y.to(pair.dtype), written.game.initial(written.follower))

        inner = bl.ClosedForm(named(written.leaders, closed))
    response = bl.Implicit(
        inner,
        steps=draw.choice([5, 50, 300]),
        tolerance=tolerance,
        linear_solver=solver,
        warm_start=draw.maybe(0.7),
        inexactness=draw.choice([None, None, r.Geometric(start=100.0, rate=0.2), r.AsLeaderMoves(start=100.0)]),
        strict=draw.maybe(0.05),
    )
    found, _, state, who = several(draw, response, written, warned, most=6)
    report = response.report(state)
    exact = tolerance is not None and tolerance < 1e-5 and pair.dtype is F64 and kind != "settled"
    # A residual of 1e-3 in the loosest direction is an error of 1e-3 times the conditioning, which Newton's step tells.
    return at_optimum(
        pair,
        found,
        who,
        0.03 if exact else 0.3,
        batch=pair.batches[0] if batched else None,
        told=report.loosened > 1.0 or (tolerance is None and float(report.stationarity) > 1e-3),
        **written.told(),
        inner=inner_kind,
        solver=repr(solver),
        response=repr(response),
        data=data_kind,
        stationarity=float(report.stationarity),
        residual=str(report.residual),
        loosened=report.loosened,
    )


def batches(draw: Draw, warned: list[str]) -> Outcome:
    """`Implicit(batches=...)`: the derivative of the mean loss over the data."""
    pair = Pair(
        draw,
        draw.choice([1, 2]),
        draw.choice([1, 2, 3]),
        kinds=["quad", "reg", "weighed", "weighed", "logistic"],
        conds=[1, 3, 10],
        units=draw.maybe(0.3),
    )
    if len(pair.batches) == 1:
        pair.batches.append(draw.normal(pair.m) * 0.2)
    data_kind, data = source(draw, pair.batches)
    rate, count = 0.9 * pair.rate / 4.0, len(pair.batches)
    kind = draw.choice(["all", "all", "fresh", "fresh", "held", "most"])
    r, l = bl.responses, bl.linear
    solver: Any = draw.choice([None, l.Dense(), bl.ConjugateGradient(rtol=1e-9), bl.GMRES(rtol=1e-9)])
    found_in = {
        "all": r.AllBatches(),
        "most": r.AllBatches(most=count, size=lambda batch: 1.0),
        "fresh": r.FreshBatches(),
        "held": r.HeldBatch(against=count - 1),
    }[kind]
    if kind == "fresh":  # means over many products: noisy, and biased where A and b are of different batches
        solver = draw.choice(
            [l.StochasticGradient(step_size=rate, max_steps=4000), bl.Neumann(max_steps=600, step_size=rate, rtol=None)]
        )
    options = bl.inner.TorchOptimizer(partial(torch.optim.SGD, lr=rate), accumulate=count)
    response = bl.Implicit(options, steps=400, tolerance=None, linear_solver=solver, batches=found_in)
    written = write(draw, pair, data=data, leaders=draw.choice([1, 2]), batched=True)
    found, _, state, who = several(draw, response, written, warned, most=2)
    allowed = {"all": 1e-3, "most": 1e-3, "fresh": 0.25, "held": 0.5}[kind]
    told = kind == "held" and response.report(state).error > 0.1
    return at_optimum(
        pair,
        found,
        who,
        allowed,
        pair.mean(pair.batches),
        told=told,
        **written.told(),
        batches=kind,
        response=repr(response),
        data=data_kind,
        count=count,
        error=response.report(state).error,
    )


def dense_parts(
    pair: Pair, y: Tensor, who: int, at: Tensor | None = None, batch: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F_x, F_y, f_yy and f_yx at x0, or another x, and y."""
    x0 = pair.x0 if at is None else at
    x, there = x0.clone().requires_grad_(), y.clone().requires_grad_()
    direct, cotangent = torch.autograd.grad(pair.F(x, there, who), [x, there])

    def slope(x: Tensor) -> Tensor:
        at = y.clone().requires_grad_()
        return torch.autograd.grad(pair.f(x, at, batch), at, create_graph=True)[0]

    hessian = torch.autograd.functional.hessian(lambda q: pair.f(x0, q, batch), y)
    return direct, cotangent, hessian, torch.autograd.functional.jacobian(slope, x0)


def damped(draw: Draw, warned: list[str]) -> Outcome:
    """Linear solvers whose answer is a definition, damped or truncated; warnings are theirs to give."""
    pair = Pair(draw, draw.choice([1, 2]), draw.choice([2, 3, 4]), kinds=SMOOTH, conds=[1, 5, 30])
    l, curvature = bl.linear, pair.sf / pair.sy**2
    damping, step, terms = draw.choice([0.01, 0.3, 3.0]) * curvature, 0.3 * pair.rate, draw.choice([1, 3, 10])
    kind = draw.choice(["identity", "scaled", "neumann", "cg", "nystrom", "gmres", "dense", "sgd", "damped series"])
    solver = {
        "identity": l.Identity(),
        "scaled": l.Identity(scale=0.7 / curvature),
        "neumann": bl.Neumann(max_steps=terms, step_size=step, rtol=None),
        "damped series": bl.Neumann(
            max_steps=terms, step_size=0.3 / (1 / pair.rate + damping), rtol=None, damping=damping
        ),
        "cg": bl.ConjugateGradient(rtol=1e-10, damping=damping),
        "nystrom": bl.Nystrom(rank=pair.m, damping=damping),
        "gmres": bl.GMRES(rtol=1e-10, damping=damping),
        "dense": l.Dense(damping=damping),
        "sgd": l.StochasticGradient(step_size=step, max_steps=terms, averaged=0.0),
    }[kind]
    written = write(draw, pair, leaders=draw.choice([1, 2]))
    lbfgs = partial(torch.optim.LBFGS, lr=0.7, tolerance_grad=0.0, tolerance_change=0.0)
    response = bl.Implicit(lbfgs, steps=40, tolerance=1e-9, linear_solver=solver)
    who = draw.randrange(len(written.leaders))
    found, _, _ = called(written, response, response.init(written.game), who)
    about = written.told() | {"solver": repr(solver)}
    there = pair.optimum(pair.x0)
    if there is None:
        return Outcome(found, None, 1.0, 1e-4, about=about)
    direct, cotangent, hessian, mixed = dense_parts(pair, there, who)
    eye = torch.eye(pair.m, dtype=F64)
    if kind in ("identity", "scaled"):
        u = solver.scale * cotangent
    elif kind in ("neumann", "damped series", "sgd"):
        u = torch.zeros_like(cotangent)
        matrix = hessian + (damping if kind == "damped series" else 0.0) * eye
        for _ in range(terms if kind == "sgd" else terms + 1):
            u = u + solver.step_size * (cotangent - matrix @ u)
        if kind == "neumann" and terms:  # terms of the series: with or without the zeroth
            one_less = torch.zeros_like(cotangent)
            for _ in range(terms):
                one_less = one_less + step * (cotangent - matrix @ one_less)
            near = (found - (direct - mixed.T @ one_less)).norm() < (found - (direct - mixed.T @ u)).norm()
            u = one_less if near else u
    else:
        u = torch.linalg.solve(hessian + damping * eye, cotangent)
    truth = direct - mixed.T @ u
    exact = mixed.T @ torch.linalg.solve(hessian, cotangent)
    size = float(direct.norm() + exact.norm()) + 1e-300
    allowed = 1e-4 if kind != "damped series" else 0.05
    return Outcome(found, truth, size, allowed, about=about)
