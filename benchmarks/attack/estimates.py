"""Responses that estimate the optimum's derivative: nudges, a single loop, a learned map, the Gauss-Newton matrix."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.attack.draw import F64, Draw, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.optima import at_optimum, dense_parts, inner_of, several
from benchmarks.attack.play import called, write
from benchmarks.attack.truth import SMOOTH, Pair, differences, newton


def nudged(draw: Draw, warned: list[str]) -> Outcome:
    """`Nudged`: its report tells its error."""
    pair = Pair(draw, draw.choice([1, 2]), draw.choice([1, 2, 4]), kinds=SMOOTH)
    kind, inner = inner_of(draw, pair)
    response = bl.Nudged(
        inner,
        steps=draw.choice([50, 300]),
        nudge=draw.choice([None, None, 1e-2, 1e-3]),
        two_sided=draw.maybe(0.8),
        tolerance=draw.choice([1e-3, 1e-6, 1e-8, None]),
        warm_start=draw.maybe(0.7),
    )
    written = write(draw, pair, leaders=draw.choice([1, 2]))
    found, _, state, who = several(draw, response, written, warned)
    error = float(response.report(state).error)
    told = error > 0.1
    return at_optimum(
        pair, found, who, 0.3, told=told, **written.told(), inner=kind, response=repr(response), error=error
    )


def single_loop(draw: Draw, warned: list[str]) -> Outcome:
    """`SingleLoop`: the same loop written out; with SAGA or SARAH, the optimum after many calls."""
    pair = Pair(draw, draw.choice([1, 2]), draw.choice([1, 2, 4]), kinds=SMOOTH, conds=[1, 3, 10])
    o, rate = torch.optim, draw.choice([0.9, 0.3, 0.1]) * pair.rate / 2
    kind = draw.choice(["sgd", "sgd", "momentum", "adam", "clipped"])
    factory = {
        "sgd": partial(o.SGD, lr=rate),
        "momentum": partial(o.SGD, lr=rate * 0.3, momentum=0.7),
        "adam": partial(o.Adam, lr=0.02 * pair.sy),
        "clipped": partial(o.SGD, lr=rate),
    }[kind]
    clip = pair.sf / pair.sy if kind == "clipped" else None
    adjoint = None if kind in ("sgd", "momentum") else partial(o.SGD, lr=rate)
    batched = draw.maybe(0.6)
    data_kind, data = source(draw, pair.batches) if batched else ("none", None)
    variance = draw.choice([None, None, bl.variance.SAGA(), bl.variance.SARAH(5)]) if batched else None
    given: Any = factory if clip is None else bl.inner.TorchOptimizer(factory, clip_norm=clip)
    response = bl.SingleLoop(given, adjoint=adjoint, variance=variance)
    written = write(draw, pair, data=data, leaders=draw.choice([1, 1, 2]), batched=batched)
    who = draw.randrange(len(written.leaders))
    calls = draw.choice([1, 2, 5, 20]) if variance is None else 250
    state = response.init(written.game)
    for _ in range(calls):
        found, _, state = called(written, response, state, who)
    about = written.told() | {
        "response": repr(response),
        "calls": calls,
        "data": data_kind,
        "kind": kind,
        "residual": str(response.report(state).residual),
    }
    if variance is not None:
        slow = rate * pair.sf / pair.sy**2 / pair.cond * calls < 5
        return at_optimum(
            pair,
            found,
            who,
            0.2,
            pair.mean(pair.batches),
            told=slow or float(response.report(state).stationarity) > 0.1,
            **about,
        )
    y, v = pair.y0.clone().requires_grad_(), torch.zeros_like(pair.y0).requires_grad_()
    y_parts, v_parts = [y], [v]
    moves_y, moves_v = factory(y_parts), (adjoint or factory)(v_parts)
    x = pair.x0.clone().requires_grad_()
    for call in range(calls):
        batch = pair.batches[call % len(pair.batches)] if batched else None
        (own,) = torch.autograd.grad(pair.f(x, y, batch), y, create_graph=True)
        product, indirect = torch.autograd.grad(own, [y, x], v.detach(), allow_unused=True, materialize_grads=True)
        direct, cotangent = torch.autograd.grad(pair.F(x, y, who), [x, y])
        truth = direct + indirect
        y.grad, v.grad = own.detach(), product + cotangent
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([y], clip)
        moves_y.step()
        moves_v.step()
    size = float(direct.norm() + indirect.norm()) + 1e-300
    return Outcome(found, truth, size, 1e-7, about=about)


def learned(draw: Draw, warned: list[str]) -> Outcome:
    """`Hypernetwork` with every network: a Jacobian wrong by nearly its whole size only with a warning."""
    pair = Pair(
        draw,
        draw.choice([1, 2]),
        draw.choice([1, 2, 4]),
        kinds=["quad", "quad", "reg", "logistic", "weighed"],
        conds=[1, 3, 10],
    )
    n, r = bl.networks, bl.responses
    network = draw.choice(
        [
            n.Linear(),
            n.LowRank(2),
            n.MLP((8,)),
            n.Elementwise(),
            n.RowScaled(),
            n.RowColumnScaled(),
            n.SelfTuning(),
            n.LowRankLayers(1),
        ]
    )
    move = draw.choice([0.03, 0.01])
    factory = draw.choice([partial(torch.optim.Adam, lr=move * pair.sy), partial(torch.optim.SGD, lr=0.3 * pair.rate)])
    schedule = draw.choice([None, None, partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.99)])
    batched = draw.maybe(0.3)
    data_kind, data = source(draw, pair.batches[:1]) if batched else ("none", None)
    response = bl.Hypernetwork(
        factory,
        network=network,
        scale=draw.choice([0.1, 0.3]) * pair.sx,
        steps=draw.choice([1, 20, 150]),
        warmup=draw.choice([0, 200, 600]),
        scheduler=schedule,
        sampler=r.Perturbations(count=draw.choice([1, 1, 4])),
        examine_every=draw.choice([1, 1, 3]),
        memory=draw.choice([r.Memory(), r.Memory(in_place=True)]),
    )
    written = write(draw, pair, data=data, leaders=draw.choice([1, 2]), batched=batched)
    calls, who = draw.choice([1, 3]), draw.randrange(len(written.leaders))
    state = response.init(written.game)
    for call in range(calls):
        if (call + 1) % response.examine_every == 0 or response.examine_every == 1:
            warned.clear()
        found, _, state = called(written, response, state, who)
    report, batch = response.report(state), pair.batches[0] if batched else None
    outcome = at_optimum(
        pair,
        found,
        who,
        0.8,
        batch=batch,
        told=float(report.residual) > 0.5,
        **written.told(),
        response=repr(response),
        calls=calls,
        data=data_kind,
        residual=str(report.residual),
        stationarity=float(report.stationarity),
    )
    there = pair.optimum(pair.x0, batch=batch)
    if there is None:
        return outcome
    # It estimates the Jacobian: where the cotangent is nearly orthogonal to that, the hypergradient says little.
    direct, cotangent, hessian, mixed = dense_parts(pair, there, who, batch=batch)
    size = float(direct.norm() + cotangent.norm() * torch.linalg.solve(hessian, mixed).norm()) + 1e-300
    return replace(outcome, size=size)


def gauss_newton(draw: Draw, warned: list[str]) -> Outcome:
    """`Implicit(curvature=GaussNewton(...))`: exact for linear outputs, else told; wrong parts are refused."""
    m, rows = draw.choice([2, 3]), 6
    inputs, targets, x0 = draw.normal(rows, m), draw.normal(rows), draw.normal(1) * 0.5
    linear, wrong, loss_kind = draw.maybe(0.6), draw.maybe(0.1), draw.choice(["squares", "logistic"])
    bend = (lambda z: z) if linear else torch.tanh

    def outputs(y: Tensor, batch: Any) -> Tensor:
        return bend(batch[0] @ y)

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        if loss_kind == "squares":
            return (outputs - batch[1]).square().mean()
        return torch.nn.functional.softplus(-outputs * batch[1].sign()).mean()

    def rest(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * x.exp().sum() * y.square().sum() * (0.4 if wrong else 1.0)

    def follow(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return loss(outputs(y, batch), batch) + 0.5 * x.exp().sum() * y.square().sum()

    def lead(x: Tensor, y: Tensor) -> Tensor:
        return (y - 1).square().sum() + 0.1 * x.square().sum()

    kind, data = source(draw, [(inputs, targets)])
    game = bl.Game(x=bl.Player(lead, x0), y=bl.Player(follow, torch.zeros(m, dtype=F64), data))
    response = bl.Implicit(
        partial(torch.optim.LBFGS, tolerance_grad=0.0, tolerance_change=0.0),
        steps=60,
        tolerance=1e-9,
        linear_solver=draw.choice([bl.ConjugateGradient(rtol=1e-10), bl.linear.Dense()]),
        curvature=bl.responses.GaussNewton(
            outputs=outputs, loss=loss, rest=rest, bias=0.0 if linear else math.nan, measure=not linear
        ),
    )
    x = x0.clone().requires_grad_()
    y, state = response(game, {"x": x}, response.init(game))
    (found,) = torch.autograd.grad(lead(x, y), x)
    error = float(response.report(response.after_backward(state, y)).error)
    batch, about = (
        (inputs, targets),
        {"linear": linear, "wrong": wrong, "loss": loss_kind, "error": error, "data": kind},
    )
    there = newton(lambda q: follow(x0, q, batch), torch.zeros(m, dtype=F64))
    if there is None:
        return Outcome(found, None, 1.0, 1e-4, about=about)

    def value(x: Tensor) -> Tensor | None:
        q = newton(lambda q: follow(x, q, batch), there)
        return None if q is None else lead(x, q)

    truth, doubt = differences(value, x0)
    size = float(truth.norm() + (truth - 0.2 * x0).norm())
    return Outcome(found, truth, size, 1e-4 if linear else max(0.05, 1.5 * error), doubt, about=about)
