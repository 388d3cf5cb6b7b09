"""Followers within sets, under proximal terms and under functions, held against projections and active sets by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from benchmarks.attack.draw import F64, Draw, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.play import called, write
from benchmarks.attack.truth import Pair, differences

Projection = Callable[[Tensor, float], Tensor]
"""From a point and the step's length to where it ends."""


def simplex(z: Tensor, total: float) -> Tensor:
    sorted_, _ = z.sort(descending=True)
    share = (sorted_.cumsum(0) - total) / torch.arange(1, len(z) + 1, dtype=F64)
    last = int((sorted_ > share).sum()) - 1
    return (z - share[last]).clamp(min=0)


def within(draw: Draw, pair: Pair) -> tuple[str, dict[str, Any], Projection, Tensor]:
    """A set or a term, as options of a player; its projection; a start inside."""
    c, m, scale = bl.constraints, pair.m, pair.sf
    a, matrix = draw.normal(m), draw.normal(1, m)
    inverse = torch.linalg.pinv(matrix)
    upper = torch.linspace(0.1, 0.5, m, dtype=F64)

    def elastic(z: Tensor, s: float) -> Tensor:
        return z.sign() * (z.abs() - 0.2 * scale * s).clamp(min=0) / (1 + 0.3 * scale * s)

    def group(z: Tensor, s: float) -> Tensor:
        return z * (1 - 0.4 * scale * s / z.norm().clamp(min=1e-300)).clamp(min=0)

    sets: dict[str, tuple[dict[str, Any], Projection]] = {
        "box": ({"domain": bl.Box(-0.2, 0.4)}, lambda z, s: z.clamp(-0.2, 0.4)),
        "upper": ({"domain": bl.Box(high=upper)}, lambda z, s: torch.minimum(z, upper)),
        "nonnegative": ({"domain": c.NonNegative()}, lambda z, s: z.clamp(min=0)),
        "ball": ({"domain": c.Ball(0.5)}, lambda z, s: z * (0.5 / z.norm().clamp(min=0.5))),
        "halfspace": ({"domain": c.Halfspace(a, 0.1)}, lambda z, s: z - (a @ z - 0.1).clamp(min=0) / (a @ a) * a),
        "affine": (
            {"domain": c.Affine(matrix, torch.full((1,), 0.3, dtype=F64))},
            lambda z, s: z - inverse @ (matrix @ z - 0.3),
        ),
        "simplex": ({"domain": bl.Simplex(1.0)}, lambda z, s: simplex(z, 1.0)),
        "l1": ({"prox": c.L1(0.3 * scale)}, lambda z, s: z.sign() * (z.abs() - 0.3 * scale * s).clamp(min=0)),
        "elastic net": ({"prox": c.ElasticNet(0.2 * scale, 0.3 * scale)}, elastic),
        "group lasso": ({"prox": c.GroupLasso(0.4 * scale)}, group),
    }
    kind = draw.choice(list(sets))
    options, project = sets[kind]
    start = torch.full((m,), 1.0 / m, dtype=F64) if kind == "simplex" else project(pair.y0, 0.0)
    return kind, options, project, start


def projected(draw: Draw, warned: list[str]) -> Outcome:
    """Sets and proximal terms: projected steps unrolled, and optima."""
    pair = Pair(
        draw,
        draw.choice([1, 2]),
        draw.choice([2, 3, 4]),
        kinds=["quad", "reg", "logistic", "weighed"],
        conds=[1, 3, 10],
        units=False,
    )
    kind, options, project, pair.y0 = within(draw, pair)
    rate = 0.5 * pair.rate
    unroll, steps = draw.maybe(0.4), draw.choice([3, 8])
    batched = draw.maybe(0.3)
    batch = pair.batches[0] if batched else None
    data_kind, data = source(draw, pair.batches[:1]) if batched else ("none", None)
    form = ["tensor", "list", "dict"] if kind in ("box", "nonnegative", "ball", "l1", "elastic net") else ["tensor"]
    form += ["module", "frozen"] if kind in ("box", "nonnegative", "l1") else []
    written = write(draw, pair, data=data, batched=batched, leaders=draw.choice([1, 2]), forms=form, **options)
    sgd = partial(torch.optim.SGD, lr=rate)
    response: bl.Response
    if unroll:
        how = draw.choice([bl.ReverseMode(), bl.Segments(), bl.Segments(count=2), bl.ForwardMode()])
        response = bl.Unrolled(sgd, steps=steps, differentiation=how)
    else:
        inner = draw.choice([bl.inner.ProjectedGradient(), sgd, partial(sgd, momentum=0.5)])
        solver = draw.choice([None, bl.linear.Dense(), bl.GMRES(rtol=1e-10)])
        response = bl.Implicit(inner, steps=3000, tolerance=1e-9, linear_solver=solver)
    who = draw.randrange(len(written.leaders))
    found, y, _ = called(written, response, response.init(written.game), who)

    def answer(x: Tensor) -> Tensor:
        y = pair.y0
        for _ in range(steps if unroll else 20000):
            at = y.clone().requires_grad_()
            (slope,) = torch.autograd.grad(pair.f(x, at, batch), at)
            after = project(y - rate * slope, rate)
            if not unroll and float((after - y).norm()) < 1e-15:
                break
            y = after
        return y

    truth, doubt = differences(lambda x: pair.F(x, answer(x), who), pair.x0, 0.01)
    about = written.told() | {"set": kind, "response": repr(response), "data": data_kind, "y": y.tolist()}
    return Outcome(found, truth, pair.size(pair.x0, y, truth, who), 1e-4 if unroll else 1e-3, doubt, about=about)


def bounds_that_move(draw: Draw, warned: list[str]) -> Outcome:
    """Bounds and weights that are functions of the leader; one unknown in closed form."""
    kind, x0 = draw.choice(["box", "l1", "ball", "module box"]), draw.normal(1) * 0.3
    target, w = draw.normal(2) * 2, draw.normal(1) * 0.5
    c, e = bl.constraints, torch.exp

    def follow(x: Tensor, y: Any) -> Tensor:
        y = y["p"] if kind == "module box" else y
        return 0.5 * (y - target - x * w).square().sum()

    def lead(x: Tensor, y: Any) -> Tensor:
        y = y["p"] if kind == "module box" else y
        return (y - 0.3).square().sum() + y.prod() + 0.1 * x.square().sum()

    options = {
        "box": {"domain": bl.Box(lambda x: -e(x), lambda x: 1.0 + x * 0)},
        "module box": {"domain": bl.Box(lambda x: -e(x), lambda x: 1.0 + x * 0)},
        "l1": {"prox": c.L1(lambda x: 0.5 * e(x))},
        "ball": {"domain": c.Ball(lambda x: e(x)[0])},
    }[kind]

    def answer(x: Tensor) -> Tensor:
        free = target + x * w
        if kind in ("box", "module box"):
            return torch.maximum(torch.minimum(free, 1.0 + x * 0), -e(x))
        if kind == "l1":
            return free.sign() * (free.abs() - 0.5 * e(x)).clamp(min=0)
        return free * (e(x) / torch.maximum(free.norm(), e(x)))

    init: Any = torch.zeros(2, dtype=F64)
    if kind == "module box":
        init = nn.Module()
        init.register_parameter("p", nn.Parameter(torch.zeros(2, dtype=F64)))
    game = bl.Game(x=bl.Player(lead, x0), y=bl.Player(follow, init, **options))
    solver = draw.choice([None, bl.linear.Dense(), bl.GMRES(rtol=1e-10)])
    response = draw.choice(
        [
            bl.Implicit(bl.inner.ProjectedGradient(), steps=500, tolerance=1e-10, linear_solver=solver),
            bl.Implicit(partial(torch.optim.SGD, lr=0.5), steps=500, tolerance=1e-10, linear_solver=solver),
            bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=80),
        ]
    )
    x = x0.clone().requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    (found,) = torch.autograd.grad(lead(x, y), x)

    def value(x: Tensor) -> Tensor:
        y: Any = answer(x)
        return lead(x, {"p": y} if kind == "module box" else y)

    truth, doubt = differences(value, x0, 0.01)
    return Outcome(
        found, truth, float(truth.norm()) + 0.1, 1e-4, doubt, about={"kind": kind, "response": repr(response)}
    )


def functions(draw: Draw, warned: list[str]) -> Outcome:
    """Linear inequalities and equalities over a quadratic loss, with and without a batch; all active sets are tried."""
    m, nx, k = draw.choice([2, 3]), draw.choice([1, 2]), draw.choice([1, 2, 3])
    pair = Pair(draw, nx, m, kinds=["quad"], conds=[1, 5], units=False)
    G, d, E = draw.normal(k, m), draw.normal(k).abs() * 0.3, draw.normal(k, nx) * 0.2
    equal, batched, listed = draw.maybe(0.3), draw.maybe(0.4), draw.maybe(0.3)
    h, he, size = draw.normal(1, m), draw.normal(1, nx) * 0.3, draw.odd(0.2, -4, 4)
    limit = torch.rand(k, generator=torch.Generator().manual_seed(draw.randrange(2**31)), dtype=F64) * 0.2
    batch = (pair.batches[0], limit) if batched else None
    pair.y0 = torch.zeros(m, dtype=F64)

    def rows(x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        return size * (G @ y - d - E @ x - (0.0 if batch is None else batch[1]))

    def plain(x: Tensor, y: Tensor) -> Any:
        return [rows(x, y)[:1], {"rest": rows(x, y)[1:]}] if listed and k > 1 else rows(x, y)

    def by_batch(x: Tensor, y: Tensor, batch: Any) -> Any:
        return {"caps": rows(x, y, batch)} if listed else rows(x, y, batch)

    def follow(x: Tensor, y: Tensor, batch: Any = None) -> Tensor:
        return pair.f(x, y, None if batch is None else batch[0])

    constraints: dict[str, Any] = {"inequality": by_batch if batched else plain}
    if equal:
        constraints["equality"] = lambda x, y: h @ y - he @ x
    data_kind, data = source(draw, [batch]) if batched else ("none", None)
    loss = (lambda x, y, batch: follow(x, y, batch)) if batched else (lambda x, y: follow(x, y))
    game = bl.Game(x=bl.Player(lambda x, y: pair.F(x, y), pair.x0), y=bl.Player(loss, pair.y0, data, **constraints))
    inner = draw.choice([bl.Scipy("SLSQP"), bl.Scipy("trust-constr"), bl.inner.ProxQP()])
    solver = draw.choice([None, bl.GMRES(rtol=1e-9), bl.linear.Dense()])
    response = bl.Implicit(inner, steps=1000, linear_solver=solver)

    def answer(x: Tensor) -> Tensor | None:
        pull = pair.B @ pair.bend(x) + pair.shift + (0.0 if batch is None else batch[0])
        for active in itertools.chain.from_iterable(itertools.combinations(range(k), s) for s in range(k + 1)):
            chosen = list(active)
            right = d + E @ x + (0.0 if batch is None else batch[1])
            lines, values = [G[chosen]], [right[chosen]]
            if equal:
                lines, values = [*lines, h], [*values, he @ x]
            A, b = torch.cat(lines), torch.cat(values)
            whole = torch.zeros(m + len(b), m + len(b), dtype=F64)
            whole[:m, :m], whole[:m, m:], whole[m:, :m] = pair.A, A.T, A
            if torch.linalg.matrix_rank(whole) < len(whole):
                continue
            found = torch.linalg.solve(whole, torch.cat([pull, b]))
            y, multipliers = found[:m], found[m : m + len(chosen)]
            if bool((G @ y - right <= 1e-9).all()) and bool((multipliers >= -1e-9).all()):
                return y
        return None

    x = pair.x0.clone().requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    (found,) = torch.autograd.grad(pair.F(x, y), x)
    truth, doubt = differences(lambda x: None if (q := answer(x)) is None else pair.F(x, q), pair.x0, 0.01)
    about = pair.told() | {
        "inner": repr(inner),
        "solver": repr(solver),
        "equal": equal,
        "data": data_kind,
        "unit": size,
    }
    return Outcome(found, truth, pair.size(pair.x0, y, truth), 1e-3, doubt, about=about)
