"""Rules of play that see both losses: F2SA, F2SA-2, BOME and V-PBGD, held against their definitions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.attack.draw import Draw, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.play import solved, write
from benchmarks.attack.truth import Pair


def value_function(draw: Draw, warned: list[str]) -> Outcome:
    """F2SA, F2SA-2, BOME and V-PBGD, whose direction is a definition."""
    pair = Pair(
        draw,
        draw.choice([1, 2]),
        draw.choice([1, 2, 3]),
        kinds=["quad", "reg", "logistic", "softmax"],
        conds=[1, 3],
        units=False,
    )
    pair.sF = pair.sf * draw.choice([1.0, 1.0, 0.01, 10.0])
    d, kind, rate = bl.dynamics, draw.choice(["f2sa2", "f2sa", "bome", "vpbgd"]), 0.3 * pair.rate
    nu, factor = draw.choice([0.1, 0.01, 1e-3]), draw.choice([1.0, 10.0, 100.0])
    eta, few, ramp, calls = (
        draw.choice([0.5, 0.1]),
        draw.choice([1, 5, 20]),
        draw.choice([0, 4]),
        draw.choice([1, 2, 3]),
    )
    nu = nu * pair.sf / pair.sF
    method = {
        "f2sa2": d.F2SA2(nudge=nu, steps=600, rejoin=draw.maybe(0.3)),
        "f2sa": d.F2SA(start=factor, growth=0.5, steps=600),
        "bome": d.BOME(eta=eta, steps=few),
        "vpbgd": d.VPBGD(multiplier=factor, ramp=ramp, steps=few),
    }[kind]
    # Both losses count in what the points settle on: a curvature of pair.sF / lambda beside the follower's own.
    settle = (
        rate if kind in ("bome", "vpbgd") else 1.0 / (1.0 / rate + {"f2sa2": nu, "f2sa": 1.0 / factor}[kind] * pair.sF)
    )
    batched = draw.maybe(0.3)
    data_kind, data = source(draw, pair.batches[:1]) if batched else ("none", None)
    batch = pair.batches[0] if batched else None
    written = write(draw, pair, data=data, batched=batched)
    rule = bl.ValueFunction(partial(torch.optim.SGD, lr=settle), method)
    parts = solved(written.game, dynamics=rule, steps=calls)
    found = torch.cat([part.reshape(-1) for part in parts])

    def slopes(loss: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = pair.x0.clone().requires_grad_(), y.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(x, y), [x, y], materialize_grads=True)

    def lower(x: Tensor, y: Tensor) -> Tensor:
        return pair.f(x, y, batch)

    def settled(weight: float) -> Tensor:
        y = pair.optimum(pair.x0, loss=lambda x, y, _: lower(x, y) + weight * pair.F(x, y))
        return torch.full_like(pair.y0, float("nan")) if y is None else y

    def descend(y: Tensor, count: int) -> Tensor:
        for _ in range(count):
            y = y - settle * slopes(lower, y)[1]
        return y

    if kind == "f2sa2":
        up, down = settled(nu), settled(-nu)
        above = slopes(lambda x, y: lower(x, y) + nu * pair.F(x, y), up)[0]
        below = slopes(lambda x, y: lower(x, y) - nu * pair.F(x, y), down)[0]
        truth = (above - below) / (2 * nu)
    elif kind == "f2sa":
        factor = factor + 0.5 * (calls - 1)
        pushed, alone = settled(1.0 / factor), settled(0.0)
        truth = slopes(pair.F, pushed)[0] + factor * (slopes(lower, pushed)[0] - slopes(lower, alone)[0])
    else:
        near, lead, gap = (
            descend(pair.y0, few * (calls if kind == "vpbgd" else 1)),
            slopes(pair.F, pair.y0),
            slopes(lower, pair.y0),
        )
        gaps = torch.cat([gap[0] - slopes(lower, near)[0], gap[1]])
        leads = torch.cat(lead)
        weight = factor * (min((calls - 1) / ramp, 1.0) if ramp else 1.0)
        if kind == "bome":
            size = gaps @ gaps
            weight = max(float((eta * size - leads @ gaps) / size), 0.0)
        truth = leads + weight * gaps
        in_order = written.follows.kind not in ("dict", "tied")  # leaves of a tree are sorted by name
        if not in_order or written.leads[0].kind == "dict":
            truth, found = truth.sort().values, found.sort().values
    size = float(truth.norm()) + 1e-3 * float(slopes(pair.F, pair.y0)[0].norm()) + 1e-300
    about = written.told() | {"rule": repr(rule), "calls": calls, "data": data_kind}
    return Outcome(found, truth, size, 1e-3 if kind in ("f2sa", "f2sa2") else 1e-6, about=about)
