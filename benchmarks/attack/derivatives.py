"""Derivatives taken otherwise: twice, by torch.func, for several losses from one answer; residuals of one's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from benchmarks.attack.draw import F64, Draw
from benchmarks.attack.judge import Outcome
from benchmarks.attack.optima import dense_parts
from benchmarks.attack.play import write
from benchmarks.attack.truth import SMOOTH, Pair, differences

EXACT = partial(torch.optim.LBFGS, tolerance_grad=0.0, tolerance_change=0.0)


def transformed(draw: Draw, warned: list[str]) -> Outcome:
    """First derivatives by torch.func and from one answer, second derivatives by create_graph and torch.func."""
    pair = Pair(
        draw, draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), kinds=SMOOTH, conds=[1, 3, 10], units=draw.maybe(0.2)
    )
    pair.sf, pair.sF = 10.0 ** draw.uniform(-3, 3), 10.0 ** draw.uniform(-3, 3)
    written = write(draw, pair, leaders=draw.choice([1, 1, 2]))
    game, rate, steps = written.game, 0.3 * pair.rate, draw.choice([1, 3, 5])
    implicit = draw.maybe(0.5)
    solver = draw.choice([None, bl.linear.Dense(), bl.ConjugateGradient(rtol=1e-11), bl.GMRES(rtol=1e-11)])
    momentum = draw.choice([0.0, 0.6])
    response: bl.Response = bl.Implicit(EXACT, steps=40, tolerance=1e-10, linear_solver=solver)
    if not implicit:
        how = draw.choice([bl.ReverseMode(), bl.ReverseMode(), bl.Segments(count=2), bl.ForwardMode()])
        response = bl.Unrolled(partial(torch.optim.SGD, lr=rate, momentum=momentum), steps=steps, differentiation=how)
    state, who = response.init(game), draw.randrange(len(written.leaders))

    def loss(x: Tensor) -> Tensor:
        parts = zip(written.leaders, written.leads, x.split(written.sizes), strict=True)
        others = {name: lay.tree(part, game.initial(name)) for name, lay, part in parts}
        answer, _ = response(game, others, state)
        if after:  # another loss through the same answer, before
            torch.autograd.grad(
                game.loss(written.leaders[-1], {**others, written.follower: answer}), x, retain_graph=True
            )
        return game.loss(written.leaders[who], {**others, written.follower: answer})

    way = draw.choice(["shared", "func", "jacrev", "twice", "twice", "hessian", "vmap", "jvp"])
    after, x = way == "shared", pair.x0.clone().requires_grad_()
    second = way in ("twice", "hessian")
    if way == "shared":
        (found,) = torch.autograd.grad(loss(x), x)
    elif way == "func":
        found = torch.func.grad(loss)(pair.x0)
    elif way == "jacrev":
        found = torch.func.jacrev(loss)(pair.x0)
    elif way == "jvp":
        found = torch.stack([torch.func.jvp(loss, (pair.x0,), (axis,))[1] for axis in torch.eye(pair.nx, dtype=F64)])
    elif way == "vmap":
        found = torch.func.vmap(torch.func.grad(loss))(torch.stack([pair.x0, pair.x0 * 1.1]))[0]
    elif way == "hessian":
        found = torch.func.hessian(loss)(pair.x0)
    else:
        (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
        found = torch.stack([torch.autograd.grad(s, x, retain_graph=True)[0] for s in slope])
    about = written.told() | {"way": way, "response": repr(response)}

    def plain(x: Tensor) -> Tensor:
        y = pair.y0.clone().requires_grad_()
        speed = torch.zeros_like(y)
        for _ in range(steps):
            (slope,) = torch.autograd.grad(pair.f(x, y), y, create_graph=True)
            speed = momentum * speed + slope
            y = y - rate * speed
        return pair.F(x, y, who)

    def slopes(x: Tensor) -> Tensor | None:
        if not implicit:
            x = x.clone().requires_grad_()
            return torch.autograd.grad(plain(x), x)[0]
        y = pair.optimum(x)
        if y is None:
            return None
        direct, cotangent, hessian, mixed = dense_parts(pair, y, who, x)
        return direct - mixed.T @ torch.linalg.solve(hessian, cotangent)

    if slopes(pair.x0) is None:
        return Outcome(found, None, 1.0, 1e-4, about=about)
    unit = pair.sF / pair.sx
    if not second:
        truth = slopes(pair.x0)
        return Outcome(found, truth, float(truth.norm()) + unit, 1e-6, about=about)  # type: ignore[union-attr]
    columns = [
        differences(lambda x, i=i: None if (s := slopes(x)) is None else s[i], pair.x0, pair.sx) for i in range(pair.nx)
    ]
    truth, doubt = torch.stack([c for c, _ in columns]), torch.stack([d for _, d in columns])
    return Outcome(found, truth, float(truth.norm()) + unit / pair.sx, 1e-5, doubt, about=about)


def residuals(draw: Draw, warned: list[str]) -> Outcome:
    """A residual of one's own, symmetric or not: a nonlinear equation in y."""
    n, nx, symmetric = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.maybe(0.3)
    M, B, x0, scale = draw.normal(n, n) * 0.3, draw.normal(n, nx), draw.normal(nx) * 0.5, draw.odd(0.3, -10, 6)
    M = (M + M.T if symmetric else M) + 2 * torch.eye(n, dtype=F64)
    modular, weight = draw.maybe(0.3), draw.choice([0.1, 0.0])

    def equation(x: Tensor, y: Tensor) -> Tensor:
        return scale * (M @ y + weight * y**3 - B @ x.sin())

    def lead(x: Tensor, y: Any) -> Tensor:
        y = y["p"] if modular else y
        return (y - 0.4).square().sum() + x[0] * y.sum() + 0.1 * x @ x

    def follow(x: Tensor, y: Any) -> Tensor:
        return 0.5 * (y["p"] if modular else y).square().sum() * scale + 0.0 * x.sum()

    def rests(x: Tensor, y: Any) -> Any:
        return {"p": equation(x, y["p"])} if modular else equation(x, y)

    init: Any = torch.zeros(n, dtype=F64)
    if modular:
        init = nn.Module()
        init.register_parameter("p", nn.Parameter(torch.zeros(n, dtype=F64)))
    residual: Any = bl.extend.UserResidual(rests, symmetric=True) if symmetric and draw.maybe(0.5) else rests
    game = bl.Game(x=bl.Player(lead, x0), y=bl.Player(follow, init, residual=residual))
    inner = draw.choice([bl.ScipyRoot(), partial(torch.optim.SGD, lr=0.3 / scale)])
    solver = draw.choice([None, bl.linear.Dense(), bl.GMRES(rtol=1e-11)])
    response = bl.Implicit(inner, steps=500, tolerance=1e-10, linear_solver=solver)
    x = x0.clone().requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    (found,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)

    def value(x: Tensor) -> Tensor | None:
        y = torch.linalg.solve(M, B @ x.sin())
        for _ in range(100):
            jacobian = M + torch.diag(3 * weight * y**2)
            step = torch.linalg.solve(jacobian, equation(x, y) / scale)
            y = y - step
            if step.norm() < 1e-15:
                break
        return lead(x, {"p": y} if modular else y)

    truth, doubt = differences(value, x0)
    about = {"symmetric": symmetric, "scale": scale, "response": repr(response), "modular": modular}
    return Outcome(found, truth, float(truth.norm()) + 0.1, 1e-5, doubt, about=about)
