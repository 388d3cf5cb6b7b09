"""Games of more than two players: levels, several leaders and followers, followers who move at the same time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.attack.draw import F64, Draw, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.play import solved
from benchmarks.attack.truth import differences, newton


def exact_lbfgs() -> Any:
    """The inner solver of followers that are to be at their optimum."""
    return partial(torch.optim.LBFGS, tolerance_grad=0.0, tolerance_change=0.0)


def levels(draw: Draw, warned: list[str]) -> Outcome:
    """Three levels by `solve`: x, then y who anticipates z."""
    n, steps = draw.choice([1, 2]), draw.choice([3, 40])
    Bz, Cz, By, target = draw.normal(n, n), draw.normal(n, n) * 0.5, draw.normal(n, n), draw.normal(n)
    x0, rest = draw.normal(n), torch.zeros(n, dtype=F64)

    def lowest(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return 0.5 * z @ z - z @ (Bz @ x.sin() + Cz @ y)

    def middle(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (1 + 0.3 * z[0] ** 2) * y @ y - y @ (By @ x) + 0.5 * (z - 0.3).square().sum()

    def top(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return (y - target).square().sum() + 0.5 * (z * y).sum() + 0.1 * x @ x

    z_kind, y_kind = (
        draw.choice(["implicit", "implicit", "unrolled", "gmres"]),
        draw.choice(["implicit", "unrolled", "dense"]),
    )
    of_z: bl.Response = bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=steps, warm_start=False)
    if z_kind != "unrolled":
        solver = bl.GMRES(rtol=1e-12) if z_kind == "gmres" else bl.ConjugateGradient(rtol=1e-12)
        of_z = bl.Implicit(exact_lbfgs(), steps=20, tolerance=1e-9, linear_solver=solver)
    of_y: bl.Response = bl.Unrolled(partial(torch.optim.SGD, lr=0.2), steps=5, warm_start=False)
    if y_kind != "unrolled":
        solver = bl.linear.Dense() if y_kind == "dense" else bl.ConjugateGradient(rtol=1e-11)
        of_y = bl.Implicit(exact_lbfgs(), steps=30, tolerance=1e-9, linear_solver=solver)
    game = bl.Game(x=bl.Player(top, x0), y=bl.Player(middle, rest), z=bl.Player(lowest, rest))
    (found,) = solved(game, y=of_y, z=of_z)

    def of(x: Tensor, y: Tensor) -> Tensor:
        return (Bz @ x.sin() + Cz @ y) * (1 - 0.5**steps if z_kind == "unrolled" else 1.0)

    def answer(x: Tensor) -> Tensor | None:
        if y_kind != "unrolled":
            return newton(lambda y: middle(x, y, of(x, y)), rest)
        y = rest
        for _ in range(5):
            at = y.clone().requires_grad_()
            y = y - 0.2 * torch.autograd.grad(middle(x, at, of(x, at)), at)[0]
        return y

    truth, doubt = differences(lambda x: None if (y := answer(x)) is None else top(x, y, of(x, y)), x0)
    return Outcome(
        found, truth, float(truth.norm()) + 0.2 * float(x0.norm()), 1e-3, doubt, about={"z": z_kind, "y": y_kind}
    )


def crowd(draw: Draw, warned: list[str]) -> Outcome:
    """Several leaders and several followers who see each other in order of play."""
    leaders, followers = draw.choice([1, 2, 3]), draw.choice([2, 3])
    L, Fs = [f"a{i}" for i in range(leaders)], [f"z{i}" for i in range(followers)]
    pull = {f: draw.normal(leaders) for f in Fs}
    seen = {f: draw.normal(followers) * 0.4 for f in Fs}
    bend, kinds = draw.choice([torch.sin, torch.tanh]), [draw.choice(["implicit", "unrolled"]) for _ in Fs]
    scale = draw.odd(0.2, -10, 6)

    def loss_of(i: int) -> Any:
        def follow(own: Tensor, xs: list[Tensor], before: list[Tensor]) -> Tensor:
            drawn = sum(p * bend(x) for p, x in zip(pull[Fs[i]], xs, strict=True))
            drawn = drawn + sum(c * y for c, y in zip(seen[Fs[i]], before, strict=False))
            return scale * (0.5 * own * own + 0.1 * own**4 - own * drawn)

        return follow

    def lead(i: int, xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        return (
            sum(((y - 0.5 * i - 0.3) ** 2 for y in ys), torch.zeros((), dtype=F64)) + ys[-1] * xs[i] + 0.1 * xs[i] ** 2
        )

    players: dict[str, Any] = {}
    for i, name in enumerate(L):
        body = f"def loss({', '.join(L + Fs)}): return lead_({i}, [{', '.join(L)}], [{', '.join(Fs)}])"
        scope: dict[str, Any] = {"lead_": lead}
        exec(body, scope)
        players[name] = bl.Player(scope["loss"], init=draw.normal(1)[0] * 0.5)
    for i, name in enumerate(Fs):
        body = (
            f"def loss({', '.join(L + Fs[: i + 1])}): return follow_({name}, [{', '.join(L)}], [{', '.join(Fs[:i])}])"
        )
        scope = {"follow_": loss_of(i)}
        exec(body, scope)
        players[name] = bl.Player(scope["loss"], init=torch.zeros((), dtype=F64))
    responses = {
        name: bl.Implicit(exact_lbfgs(), steps=30, tolerance=1e-9, linear_solver=bl.ConjugateGradient(rtol=1e-11))
        if kind == "implicit"
        else bl.Unrolled(partial(torch.optim.SGD, lr=0.3 / scale), steps=4)
        for name, kind in zip(Fs, kinds, strict=True)
    }
    found = torch.stack(solved(bl.Game(**players), **responses))
    begun = torch.stack([players[name].init for name in L])

    known: dict[tuple[float, ...], list[Tensor] | None] = {}

    def answers(xs: Tensor) -> list[Tensor] | None:
        key = tuple(xs.tolist())  # each leader's differences ask for the same ones
        if key not in known:
            known[key] = fresh(xs)
        return known[key]

    def fresh(xs: Tensor) -> list[Tensor] | None:
        ys: list[Tensor] = []
        for i, kind in enumerate(kinds):
            own = loss_of(i)
            if kind == "implicit":
                y = newton(lambda q, own=own: own(q[0], list(xs), ys), torch.zeros(1, dtype=F64))
                if y is None:
                    return None
                ys.append(y[0])
                continue
            y = torch.zeros((), dtype=F64)
            for _ in range(4):
                at = y.clone().requires_grad_()
                y = y - 0.3 / scale * torch.autograd.grad(own(at, list(xs), ys), at)[0]
            ys.append(y)
        return ys

    own = [
        differences(lambda xs, i=i: None if (ys := answers(xs)) is None else lead(i, list(xs), ys), begun)
        for i in range(leaders)
    ]
    truth = torch.stack([slopes[i] for i, (slopes, _) in enumerate(own)])
    doubt = torch.stack([apart[i] for i, (_, apart) in enumerate(own)])
    return Outcome(
        found, truth, float(truth.norm()) + 0.1, 1e-4, doubt, about={"kinds": kinds, "leaders": leaders, "scale": scale}
    )


def joined(draw: Draw, warned: list[str]) -> Outcome:
    """Followers who move at the same time, with constraints of their own and shared ones."""
    members = draw.choice([2, 2, 3])
    names = ["a", "b", "c"][:members]
    M = torch.eye(members, dtype=F64) + draw.normal(members, members) * 0.25 * (1 - torch.eye(members, dtype=F64))
    pulls, x0, cap = draw.normal(members), draw.normal(1), 0.1
    kind, scale = draw.choice(["free", "free", "own", "shared", "box"]), draw.odd(0.2, -8, 6)
    batched = draw.maybe(0.3)
    shift = draw.normal(1) * 0.2 if batched else torch.zeros(1, dtype=F64)

    def pull(i: int, x: Tensor) -> Tensor:
        return (x if i % 2 else x.sin()) * pulls[i]

    def loss_of(i: int) -> Any:
        def follow(x: Tensor, ys: list[Tensor], batch: Any) -> Tensor:
            cross = sum((M[i, j] * ys[j] for j in range(members) if j != i), torch.zeros(1, dtype=F64))
            return scale * (
                0.5 * ys[i] @ ys[i] + ys[i] @ cross - ys[i] @ (pull(i, x) + (0.0 if batch is None else batch))
            )

        return follow

    def lead(x: Tensor, ys: list[Tensor]) -> Tensor:
        return (ys[0] - 1).square().sum() + (ys[0] * ys[-1]).sum() + 0.1 * x @ x

    def written(body: Any, first: str, ending: str, extra: str = "") -> Any:
        scope: dict[str, Any] = {"body_": body}
        exec(f"def loss({first}{', '.join(names)}{extra}): return body_({ending})", scope)
        return scope["loss"]

    ys = f"[{', '.join(names)}]"
    shared = written(lambda ys: sum(ys) - cap, "", ys)
    options: list[dict[str, Any]] = [{} for _ in names]
    if kind == "shared":
        options = [{"inequality": shared} for _ in names]
    if kind == "own":
        options[0] = {"inequality": lambda a: a - cap}
    if kind == "box":
        options[0] = {"domain": bl.Box(-cap, cap)}
    zero = torch.zeros(1, dtype=F64)
    players = {"x": bl.Player(written(lead, "x, ", f"x, {ys}"), x0)}
    for i, name in enumerate(names):
        data = source(draw, [shift])[1] if batched else None
        loss = written(loss_of(i), "x, ", f"x, {ys}, {'batch' if batched else 'None'}", ", batch" if batched else "")
        players[name] = bl.Player(loss, zero, data, **options[i])
    game = bl.Game(**players).joined(firms=tuple(names))
    solver = draw.choice([None, bl.linear.Dense(), bl.GMRES(rtol=1e-11)])
    inner: Any = (
        bl.ScipyRoot() if kind in ("own", "shared") or draw.maybe(0.5) else partial(torch.optim.SGD, lr=0.4 / scale)
    )
    response: bl.Response = bl.Implicit(inner, steps=500, tolerance=1e-10, linear_solver=solver)
    steps = 0
    if kind in ("free", "box") and draw.maybe(0.4):
        steps = draw.choice([2, 5])
        response = bl.Unrolled(partial(torch.optim.SGD, lr=0.4 / scale), steps=steps)
    (found,) = solved(game, firms=response)

    def answer(x: Tensor) -> Tensor:
        q = torch.cat([pull(i, x) + shift for i in range(members)])
        if steps:
            y = torch.zeros(members, dtype=F64)
            for _ in range(steps):
                y = y - 0.4 * (M @ y - q)
                y = torch.cat([y[:1].clamp(-cap, cap), y[1:]]) if kind == "box" else y
            return y
        y = torch.linalg.solve(M, q)
        bound = cap if kind == "own" else float(y[0].clamp(-cap, cap))
        if (kind == "own" and y[0] > cap) or (kind == "box" and abs(y[0]) > cap):
            rest = torch.linalg.solve(M[1:, 1:], q[1:] - M[1:, 0] * bound)
            y = torch.cat([torch.full((1,), bound, dtype=F64), rest])
        if kind == "shared" and y.sum() > cap:
            whole = torch.ones(members + 1, members + 1, dtype=F64)
            whole[:members, :members], whole[-1, -1] = M, 0.0
            y = torch.linalg.solve(whole, torch.cat([q, torch.tensor([cap], dtype=F64)]))[:members]
        return y

    truth, doubt = differences(lambda x: lead(x, list(answer(x).split(1))), x0, 0.01)
    about = {"kind": kind, "members": members, "response": repr(response), "scale": scale, "batched": batched}
    return Outcome(found, truth, float(truth.norm()) + 0.2 * float(x0.abs()), 1e-3, doubt, about=about)
