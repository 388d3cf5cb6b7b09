"""Many games at once, and tasks that share a leader, each held against itself alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.attack.draw import F64, Draw, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.play import solved, write
from benchmarks.attack.truth import Pair, differences, newton


def many(draw: Draw, warned: list[str]) -> Outcome:
    """`Games`: each game's hypergradient, in one call, is the one that it has alone."""
    pair = Pair(
        draw,
        draw.choice([1, 2]),
        draw.choice([1, 2, 3]),
        kinds=["quad", "reg", "quartic", "weighed", "logistic"],
        conds=[1, 3, 10],
        units=False,
    )
    count, batched = draw.choice([1, 2, 4]), draw.maybe(0.6)
    same = draw.maybe(0.3)
    shift = draw.normal(count, pair.m) * 0.3
    starts, ends = draw.normal(count, pair.nx) * 0.5, draw.normal(count, pair.m)
    written = write(
        draw,
        pair,
        data=[shift[0]] if batched else None,
        batched=batched,
        forms=["tensor"] if same else ["tensor", "list", "dict", "module"],
    )
    init: dict[str, Any] = {written.leaders[0]: torch.func.vmap(written.leads[0].tree)(starts)}
    if written.follows.kind == "tensor":
        init[written.follower] = ends
    else:
        ends = pair.y0.expand(count, -1)
    data = {written.follower: [shift]} if batched and not same else None
    games = bl.Games(written.game, count, init=init, data=data)
    o, rate, steps = torch.optim, 0.5 * pair.rate, draw.choice([1, 4])
    implicit = draw.maybe(0.5)
    optimizer = draw.choice(
        [partial(o.SGD, lr=rate), partial(o.SGD, lr=rate / 2, momentum=0.6), partial(o.Adam, lr=0.05)]
    )
    clip = pair.sf * 0.5 if draw.maybe(0.3) else None
    given: Any = optimizer if clip is None else bl.inner.TorchOptimizer(optimizer, clip_norm=clip)
    solver = draw.choice(
        [
            None,
            bl.linear.Dense(),
            bl.GMRES(rtol=1e-10),
            bl.ConjugateGradient(rtol=1e-10),
            bl.Neumann(max_steps=3000, rtol=1e-9),
        ]
    )
    response: bl.Response = (
        bl.Implicit(partial(o.SGD, lr=rate), steps=1500, tolerance=1e-9, linear_solver=solver)
        if implicit
        else bl.Unrolled(
            given, steps=steps, differentiation=draw.choice([bl.ReverseMode(), bl.Segments(), bl.ForwardMode()])
        )
    )
    parts = solved(games, leaders=1, **{written.follower: response})
    found = torch.cat([part.reshape(count, -1) for part in parts], 1).reshape(-1)
    truths, doubts, size = [], [], 0.0
    for i in range(count):
        batch = (shift[0 if same else i]) if batched else None

        def answer(x: Tensor, i: int = i, batch: Any = batch) -> Tensor | None:
            if implicit:
                return pair.optimum(x, ends[i], batch=batch)
            ys = [part.clone().requires_grad_() for part in ends[i].split(written.follows.sizes)]
            moves = optimizer(ys)
            for _ in range(steps):
                moves.zero_grad()
                pair.f(x, torch.cat(ys), batch).backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(ys, clip)
                moves.step()
            return torch.cat(ys).detach()

        truth, doubt = differences(
            lambda x, answer=answer: None if (y := answer(x)) is None else pair.F(x, y), starts[i]
        )
        truths.append(truth)
        doubts.append(doubt)
        there = answer(starts[i])
        size += 1.0 if there is None else pair.size(starts[i], there, truth)
    about = written.told() | {
        "count": count,
        "response": repr(response),
        "batched": batched,
        "same": same,
        "clip": clip,
    }
    return Outcome(found, torch.cat(truths), size, 1e-4, torch.cat(doubts), about=about)


def tasks(draw: Draw, warned: list[str]) -> Outcome:
    """`Tasks`: the mean over a batch of tasks, with and without a start that the leader chooses."""
    n, count = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    W, x0 = draw.normal(n, n), draw.normal(n) * 0.5
    support, query = draw.normal(count, 3, n), draw.normal(count, 3, n)
    begins, implicit = draw.maybe(0.5), draw.maybe(0.4)
    steps, o = draw.choice([1, 2, 5]), torch.optim
    pulled = draw.maybe(0.5) or not begins or implicit

    def fit(meta: Tensor, task: Tensor, batch: Tensor) -> Tensor:
        loss = ((task - batch) ** 2).mean() + 0.1 * (task**4).sum()
        return loss + ((task - W @ meta.tanh()) ** 2).sum() if pulled else loss

    def lead(task: Tensor, batch: Tensor) -> Tensor:
        return ((task - batch) ** 2).mean() + 0.3 * task.prod()

    start = {"start": lambda meta: meta * 1.0} if begins and not implicit else {}
    data = source(draw, [{"support": support, "query": query}])[1]
    if draw.maybe(0.2):
        data = [[{"support": s, "query": q} for s, q in zip(support, query, strict=True)]]
    following = fit if pulled else (lambda task, batch: fit(x0, task, batch))
    game = bl.Tasks(meta=bl.Player(lead, x0), task=bl.Player(following, torch.zeros(n, dtype=F64), **start), data=data)
    optimizer = draw.choice([partial(o.SGD, lr=0.1), partial(o.SGD, lr=0.05, momentum=0.5), partial(o.Adam, lr=0.05)])
    solver = draw.choice([None, bl.linear.Dense(), bl.ConjugateGradient(rtol=1e-10)])
    response: bl.Response = (
        bl.Implicit(partial(o.SGD, lr=0.1), steps=1000, tolerance=1e-9, linear_solver=solver)
        if implicit
        else bl.Unrolled(
            optimizer, steps=steps, differentiation=draw.choice([bl.ReverseMode(), bl.Segments(), bl.ForwardMode()])
        )
    )
    (found,) = solved(game, task=response)

    def value(x: Tensor) -> Tensor | None:
        losses = []
        for s, q in zip(support, query, strict=True):
            y: Tensor | None = (x if start else torch.zeros(n, dtype=F64)).detach().clone().requires_grad_()
            if implicit:
                y = newton(lambda y, s=s: fit(x, y, s), torch.zeros(n, dtype=F64))
            else:
                moves = optimizer([y])
                for _ in range(steps):
                    moves.zero_grad()
                    fit(x, y, s).backward()
                    moves.step()
            if y is None:
                return None
            losses.append(lead(y.detach(), q))
        return torch.stack(losses).mean()

    truth, doubt = differences(value, x0)
    about = {"count": count, "start": bool(start), "pulled": pulled, "response": repr(response)}
    return Outcome(found, truth, float(truth.norm()) + 1e-3, 1e-4, doubt, about=about)
