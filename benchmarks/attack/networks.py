"""Modules with buffers, dropout, shared and frozen parameters; inner hyperparameters; variables in a range."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import bilevel as bl
from benchmarks.attack.draw import F64, Draw, named, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.play import solved
from benchmarks.attack.truth import SMOOTH, Pair, differences


class Tied(nn.Module):
    """Two layers with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def network(draw: Draw) -> tuple[str, nn.Module]:
    """A small one, float64."""
    kind = draw.choice(
        [
            "plain",
            "batch norm",
            "cumulative",
            "tied",
            "layer norm",
            "group norm",
            "untracked",
            "weight norm",
            "dropout",
            "prelu",
            "conv",
            "gru",
            "attention",
        ]
    )
    middle: dict[str, Any] = {
        "plain": nn.Identity,
        "batch norm": lambda: nn.BatchNorm1d(3),
        "cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
        "layer norm": lambda: nn.LayerNorm(3),
        "group norm": lambda: nn.GroupNorm(1, 3),
        "untracked": lambda: nn.BatchNorm1d(3, track_running_stats=False),
        "dropout": lambda: nn.Dropout(0.3),
        "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        "prelu": lambda: nn.PReLU(),
    }
    if kind == "tied":
        return kind, Tied().double()
    if kind == "conv":
        conv = nn.Sequential(
            nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)
        )
        return kind, conv.double()
    if kind == "gru":
        return kind, Recurrent().double()
    if kind == "attention":
        return kind, Attending().double()
    return kind, nn.Sequential(nn.Linear(3, 3), middle[kind](), nn.Tanh(), nn.Linear(3, 1)).double()


class Recurrent(nn.Module):
    """A GRU over three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(1, 2, batch_first=True), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.last(self.gru(x[..., None])[0][:, -1])


class Attending(nn.Module):
    """A layer of attention over three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(1, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        tokens = self.embed(x[..., None])
        return self.last(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def modules(draw: Draw, warned: list[str]) -> Outcome:
    """A trained module: the same training by torch; where running statistics move, its value alone."""
    torch.manual_seed(draw.randrange(2**31))
    kind, model = network(draw)
    frozen = draw.maybe(0.2)
    if frozen:
        next(iter(model.parameters())).requires_grad_(False)
    data = [(torch.randn(5, 3, dtype=F64), torch.randn(5, 1, dtype=F64)) for _ in range(draw.choice([1, 2, 3]))]
    valid, x0 = (torch.randn(6, 3, dtype=F64), torch.randn(6, 1, dtype=F64)), torch.randn(1, dtype=F64) - 1
    name, (data_kind, given) = draw.choice(["decay", "weight_decay", "x"]), source(draw, data)

    def size(weights: Any) -> Tensor:
        return sum((p.square().sum() for p in weights.values()), torch.zeros((), dtype=F64))

    def train(values: dict[str, Any], batch: Any) -> Tensor:
        return mse_loss(values["w"](batch[0]), batch[1]) + values[name].exp().sum() * size(values["w"])

    def judged(values: dict[str, Any], _: Any) -> Tensor:
        return mse_loss(values["w"](valid[0]), valid[1])

    game = bl.Game(
        **{
            name: bl.Player(named(["w"], judged), x0),
            "w": bl.Player(named([name, "w"], train, batch=True), model, given),
        }
    )
    steps, calls, o = draw.choice([1, 3, 6]), draw.choice([1, 2]), torch.optim
    factory = draw.choice(
        [
            partial(o.SGD, lr=0.1),
            partial(o.SGD, lr=0.05, momentum=0.8),
            partial(o.Adam, lr=0.03),
            partial(o.AdamW, lr=0.03),
        ]
    )
    how = draw.choice([bl.ReverseMode(), bl.ForwardMode(), bl.Segments(), bl.Segments(count=3)])
    response = bl.Unrolled(factory, steps=steps, differentiation=how)
    state = response.init(game)
    for _ in range(calls):
        before = state
        x = x0.clone().requires_grad_()
        y, state = response(game, {name: x}, state)
        buffers = {"w": state["buffers"]} if state["buffers"] else None
        (found,) = torch.autograd.grad(game.evaluate(name, {name: x, "w": y}, None, buffers)[0], x)
    about = {
        "network": kind,
        "steps": steps,
        "calls": calls,
        "how": repr(how),
        "optimizer": str(factory),
        "frozen": frozen,
        "data": data_kind,
    }

    def run(x: Tensor, hold: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        trained = copy.deepcopy(model).train()
        parameters, place = [p for p in trained.parameters() if p.requires_grad], 0
        optimizer = factory(parameters)
        for call in range(calls):
            decay = (x if call == calls - 1 else x0).exp().sum()
            for _ in range(steps):
                inputs, targets = data[place % len(data)]
                place += 1
                optimizer.zero_grad()
                (mse_loss(trained(inputs), targets) + decay * size(dict(enumerate(parameters)))).backward()
                optimizer.step()
        after = {key: buffer.clone() for key, buffer in trained.named_buffers()}
        with torch.no_grad():
            for key, buffer in trained.named_buffers():
                buffer.copy_((hold or after)[key])
            trained.eval()
            return mse_loss(trained(valid[0]), valid[1]), after

    def again(x: Tensor) -> Tensor:  # dropout's masks are the library's own: its value, differenced
        y, _ = response(game, {name: x}, before)
        return game.loss(name, {name: x, "w": y}).detach()

    held = run(x0)[1]
    moves = kind in ("batch norm", "cumulative")  # whose statistics move with the weights: the value alone is compared
    truth, doubt = differences(again if kind == "dropout" else lambda x: run(x, held)[0], x0)
    if moves:
        value = game.evaluate(name, {name: x, "w": y}, None, buffers)[0].detach()
        return Outcome(value.reshape(1), run(x0)[0].reshape(1), float(value), 1e-8, about=about)
    return Outcome(found, truth, float(truth.norm()) + 1e-12, 1e-4, doubt, about=about)


def inner_options(draw: Draw, warned: list[str]) -> Outcome:
    """Hyperparameters of the inner optimiser, clipping and rates, beside a plain leader."""
    pair = Pair(draw, draw.choice([1, 2]), draw.choice([1, 2, 3]), units=draw.maybe(0.3))
    o, e, steps = torch.optim, math.exp, draw.choice([1, 3, 6])
    base, move = math.log(0.3 * pair.rate), math.log(0.05 * pair.sy)
    unit, decay = pair.sf / pair.sy * 0.5, pair.sf / pair.sy**2
    kind = draw.choice(["rate", "decay", "momentum", "clip", "clip value", "rates", "adam", "betas", "eps"])
    torch_ = bl.inner.TorchOptimizer
    plain = partial(o.SGD, lr=e(base))
    given: Any = {
        "rate": lambda params, lam: o.SGD(params, lr=(lam + base).exp()),
        "decay": lambda params, lam: o.SGD(params, lr=e(base), weight_decay=lam.exp() * decay),
        "momentum": lambda params, lam: o.SGD(params, lr=e(base), momentum=lam.sigmoid()),
        "adam": lambda params, lam: o.Adam(params, lr=(lam + move).exp()),
        "betas": lambda params, lam: o.Adam(params, lr=e(move), betas=(lam.sigmoid(), torch.tensor(0.9, dtype=F64))),
        "eps": lambda params, lam: o.Adagrad(params, lr=(lam + move).exp(), lr_decay=0.05),
        "clip": torch_(plain, clip_norm=lambda lam: lam.exp() * unit),
        "clip value": torch_(plain, clip_value=lambda lam: lam.exp() * unit),
        "rates": torch_(plain, rates=lambda lam: e(base) * (lam * torch.arange(1, steps + 1, dtype=F64)).exp()),
    }[kind]
    how = draw.choice([bl.ReverseMode(), bl.ForwardMode(), bl.Segments(), bl.Segments(count=2)])
    response = bl.Unrolled(given, steps=steps, differentiation=how)
    l0 = torch.tensor(-0.4, dtype=F64)
    game = bl.Game(
        lam=bl.Player(lambda y, x: pair.F(x, y), l0, optimizer_hyper=True),
        x=bl.Player(lambda x, y: pair.F(x, y), pair.x0),
        y=bl.Player(lambda x, y: pair.f(x, y), pair.y0),
    )
    x, lam = pair.x0.clone().requires_grad_(), l0.clone().requires_grad_()
    y, _ = response(game, {"lam": lam, "x": x}, response.init(game))
    of_lam, of_x = torch.autograd.grad(pair.F(x, y), [lam, x])

    def value(z: Tensor) -> Tensor:
        l, x, y = float(z[0]), z[1:] * pair.sx, pair.y0.clone().requires_grad_()
        half = 1 / (1 + e(-l))
        moves: torch.optim.Optimizer = {
            "rate": lambda: o.SGD([y], lr=e(l + base)),
            "decay": lambda: o.SGD([y], lr=e(base), weight_decay=e(l) * decay),
            "momentum": lambda: o.SGD([y], lr=e(base), momentum=half),
            "adam": lambda: o.Adam([y], lr=e(l + move)),
            "betas": lambda: o.Adam([y], lr=e(move), betas=(half, 0.9)),
            "eps": lambda: o.Adagrad([y], lr=e(l + move), lr_decay=0.05),
        }.get(kind, lambda: plain([y]))()
        for step in range(steps):
            (y.grad,) = torch.autograd.grad(pair.f(x, y), y)
            if kind == "clip":
                nn.utils.clip_grad_norm_([y], e(l) * unit)
            if kind == "clip value":
                nn.utils.clip_grad_value_([y], e(l) * unit)
            if kind == "rates":
                moves.param_groups[0]["lr"] = e(base) * e(l * (step + 1))
            moves.step()
        return pair.F(x, y.detach())

    truth, doubt = differences(value, torch.cat([l0.reshape(1), pair.x0 / pair.sx]))
    found = torch.cat([of_lam.reshape(1), of_x * pair.sx])
    size = float(truth[:1].norm()) + pair.size(pair.x0, y, truth[1:] / pair.sx) * pair.sx
    about = pair.told() | {"option": kind, "how": repr(how), "steps": steps}
    return Outcome(found, truth, size, 1e-5, doubt, about=about)


def ranges(draw: Draw, warned: list[str]) -> Outcome:
    """Leaders in a range, through `solve`: the gradient of the free coordinate."""
    pair = Pair(draw, 2, draw.choice([1, 2, 3]), kinds=SMOOTH, conds=[1, 3, 10, 100], units=False)
    kind = draw.choice(["log", "unit", "interval", "positive"])
    low, high = math.log(1e-4), 0.0
    points = {"log": [0.01, 0.3], "unit": [0.2, 0.7], "interval": [-0.5, 1.0], "positive": [0.5, 2.0]}
    x0 = torch.tensor(points[kind], dtype=F64)
    init = {
        "log": lambda: bl.Log(1e-4, 1.0, start=x0),
        "unit": lambda: bl.Unit(start=x0),
        "interval": lambda: bl.Interval(-1.0, 2.0, start=x0),
        "positive": lambda: bl.Positive(start=x0),
    }[kind]()
    pair.x0, rate, steps, unroll = x0, 0.3 * pair.rate, draw.choice([2, 6]), draw.maybe(0.5)
    response: bl.Response = bl.Unrolled(partial(torch.optim.SGD, lr=rate), steps=steps, warm_start=draw.maybe(0.5))
    if not unroll:
        lbfgs = partial(torch.optim.LBFGS, tolerance_grad=0.0, tolerance_change=0.0)
        response = bl.Implicit(lbfgs, steps=40, tolerance=1e-9, linear_solver=bl.ConjugateGradient(rtol=1e-10))
    game = bl.Game(x=bl.Player(lambda x, y: pair.F(x, y), init), y=bl.Player(lambda x, y: pair.f(x, y), pair.y0))
    found = torch.cat([part.reshape(-1) for part in solved(game, y=response)])
    natural = {
        "log": lambda u: (low + (high - low) * u.sigmoid()).exp(),
        "unit": lambda u: u.sigmoid(),
        "interval": lambda u: -1 + 3 * u.sigmoid(),
        "positive": lambda u: u.exp(),
    }[kind]
    u0 = {
        "log": lambda: ((x0.log() - low) / (high - low)).logit(),
        "unit": x0.logit,
        "interval": lambda: ((x0 + 1) / 3).logit(),
        "positive": x0.log,
    }[kind]()
    there = None if unroll else pair.optimum(x0)
    about = pair.told() | {"range": kind, "response": repr(response)}
    if not unroll and there is None:
        return Outcome(found, None, 1.0, 1e-3, about=about)

    def value(u: Tensor) -> Tensor | None:
        x, y = natural(u), pair.y0
        if not unroll:
            y = pair.optimum(x, there)
            return None if y is None else pair.F(x, y)
        for _ in range(steps):
            at = y.clone().requires_grad_()
            y = y - rate * torch.autograd.grad(pair.f(x, at), at)[0]
        return pair.F(x, y)

    truth, doubt = differences(value, u0)
    return Outcome(found, truth, float(truth.norm()) + 1e-3 * pair.sF, 1e-3, doubt, about=about)
