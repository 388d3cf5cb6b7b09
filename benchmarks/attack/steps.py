"""Responses that take steps, held against the same steps by torch.optim alone, differenced."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import bilevel as bl
from benchmarks.attack.draw import F64, Draw, source
from benchmarks.attack.judge import Outcome
from benchmarks.attack.play import called, write
from benchmarks.attack.truth import SMOOTH, Pair, differences

OPTIMIZERS = (
    "sgd",
    "sgd",
    "momentum",
    "nesterov",
    "adam",
    "adamw",
    "amsgrad",
    "rmsprop",
    "centered",
    "adagrad",
    "nadam",
    "radam",
    "adamax",
    "adadelta",
    "asgd",
    "decay",
    "dampening",
    "maximize",
    "unstable",
    "tensor rate",
)


def optimizer_of(draw: Draw, pair: Pair) -> tuple[str, Callable[..., Any]]:
    """A torch.optim factory whose steps suit the units of a pair."""
    o, rate = torch.optim, draw.choice([0.5, 0.2, 0.05]) * pair.rate
    move, kind = draw.choice([0.1, 0.03, 0.01]) * pair.sy, draw.choice(OPTIMIZERS)
    return kind, {
        "sgd": partial(o.SGD, lr=rate),
        "momentum": partial(o.SGD, lr=rate * 0.5, momentum=0.7),
        "nesterov": partial(o.SGD, lr=rate * 0.5, momentum=0.7, nesterov=True),
        "adam": partial(o.Adam, lr=move),
        "adamw": partial(o.AdamW, lr=move, weight_decay=0.05),
        "amsgrad": partial(o.Adam, lr=move, amsgrad=True, betas=(0.8, 0.95)),
        "rmsprop": partial(o.RMSprop, lr=move),
        "centered": partial(o.RMSprop, lr=move * 0.3, centered=True, momentum=0.4),
        "adagrad": partial(o.Adagrad, lr=move, lr_decay=0.01),
        "nadam": partial(o.NAdam, lr=move),
        "radam": partial(o.RAdam, lr=move),
        "adamax": partial(o.Adamax, lr=move),
        "adadelta": partial(o.Adadelta, lr=1.0),
        "asgd": partial(o.ASGD, lr=rate, t0=3),
        "decay": partial(o.SGD, lr=rate, weight_decay=0.1 / pair.rate),
        "dampening": partial(o.SGD, lr=rate, momentum=0.6, dampening=0.3),
        "maximize": partial(o.SGD, lr=rate * 0.1, maximize=True),
        "unstable": partial(o.SGD, lr=8 * rate),
        "tensor rate": lambda params: o.SGD(params, lr=torch.tensor(rate, dtype=F64)),
    }[kind]


def schedule_of(draw: Draw) -> Any:
    """Often none."""
    s = lr_scheduler
    return draw.choice(
        [
            None,
            None,
            None,
            None,
            partial(s.CosineAnnealingLR, T_max=7),
            partial(s.StepLR, step_size=2, gamma=0.5),
            partial(s.ExponentialLR, gamma=0.9),
            partial(s.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
            partial(s.LinearLR, total_iters=4),
            partial(s.MultiStepLR, milestones=[1, 3], gamma=0.3),
            partial(s.PolynomialLR, total_iters=6),
            partial(s.CosineAnnealingWarmRestarts, T_0=3),
        ]
    )


class Trial:
    """The same steps by torch.optim: `y(x)` after `calls` calls, of which only the last `free` steps see x move."""

    def __init__(
        self,
        pair: Pair,
        sizes: list[int],
        factory: Any,
        *,
        steps: int,
        calls: int,
        free: int,
        warm: bool,
        batches: list[Tensor] | None = None,
        accumulate: int = 1,
        schedule: Any = None,
        clip: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.__dict__.update(locals())

    def y(self, x: Tensor, before: int = 0) -> Tensor:
        """The answer, or where it was `before` steps earlier."""
        s: Any = self
        parameters = [part.clone().requires_grad_() for part in s.pair.y0.split(s.sizes)]
        optimizer, place = s.factory(parameters), 0
        schedule = s.schedule(optimizer) if s.schedule else None
        for call in range(s.calls):
            if not s.warm and call < s.calls - 1:
                place += s.steps * s.accumulate
                continue
            for step in range(s.steps):
                last = call == s.calls - 1
                if last and step == s.steps - before:
                    break
                there = x if last and step >= s.steps - s.free else s.pair.x0
                total = [torch.zeros_like(p) for p in parameters]
                for _ in range(s.accumulate):
                    batch = s.batches[place % len(s.batches)] if s.batches else None
                    loss = s.pair.f(there, torch.cat(parameters), batch)
                    total = [a + b for a, b in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
                    place += 1
                for parameter, slope in zip(parameters, total, strict=True):
                    parameter.grad = slope / s.accumulate
                if s.clip_value is not None:
                    nn.utils.clip_grad_value_(parameters, s.clip_value)
                if s.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, s.clip)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
        return torch.cat([p.detach() for p in parameters])


def stepped(draw: Draw, last_step: bool) -> Outcome:
    pair = Pair(draw, draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 4]), **({"kinds": SMOOTH} if last_step else {}))
    if draw.maybe(0.12) and 1e-10 < pair.sf < 1e6 and 1e-10 < pair.sF < 1e6:
        pair.dtype = torch.float32
    kind, factory = optimizer_of(draw, pair)
    steps, calls, warm = draw.choice([1, 2, 3, 5, 8, 12]), draw.choice([1, 2, 3]), draw.maybe(0.7)
    accumulate = 1 if last_step else draw.choice([1, 1, 1, 2, 3])
    unit = pair.sf / pair.sy
    clip = draw.choice([None, None, None, 0.3 * unit, 3.0 * unit])
    clip_value, schedule = draw.choice([None, None, None, 0.2 * unit]), schedule_of(draw)
    batched = draw.maybe(0.5)
    batches = list(pair.batches) if batched else None
    data_kind, data = (
        source(draw, [b.to(pair.dtype) for b in pair.batches], workers=True) if batched else ("none", None)
    )
    plain = clip is None and clip_value is None and schedule is None and accumulate == 1
    options = bl.inner.TorchOptimizer(
        factory, clip_norm=clip, clip_value=clip_value, scheduler=schedule, accumulate=accumulate
    )
    how = draw.choice(
        [
            bl.ReverseMode(),
            bl.ReverseMode(),
            bl.ForwardMode(),
            bl.Segments(),
            bl.Segments(count=2),
            bl.Segments(count=50),
            bl.Segments(memory=10_000_000),
        ]
    )
    back = draw.choice([None, None, None, max(1, steps // 2)])
    fitted = draw.maybe(0.3) and kind == "sgd" and plain
    response: bl.Response
    if last_step:
        response, warm = bl.responses.LastStep(factory if plain else options, steps=steps, fitted=fitted), True
    else:
        response = bl.Unrolled(
            factory if plain else options, steps=steps, backprop_steps=back, warm_start=warm, differentiation=how
        )
    written = write(draw, pair, data=data, leaders=draw.choice([1, 1, 1, 2, 3]), batched=batched)
    who = draw.randrange(len(written.leaders))
    state = response.init(written.game)
    for _ in range(calls):
        found, y, state = called(written, response, state, who)
    free = 1 if last_step else back or steps
    trial = Trial(
        pair,
        written.follows.sizes,
        factory,
        steps=steps,
        calls=calls,
        free=free,
        warm=warm,
        batches=batches,
        accumulate=accumulate,
        schedule=schedule,
        clip=clip,
        clip_value=clip_value,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth, doubt = differences(lambda x: pair.F(x, trial.y(x), who), pair.x0, pair.sx)
        there = trial.y(pair.x0)
        before = trial.y(pair.x0, 1)
    size = pair.size(pair.x0, there, truth, who)
    about = written.told() | {
        "optimizer": kind,
        "steps": steps,
        "calls": calls,
        "warm": warm,
        "clip": clip,
        "how": str(how),
        "schedule": str(schedule),
        "data": data_kind,
        "back": back,
        "accumulate": accumulate,
        "value off": float((y - there).norm() / (there.norm() + 1e-300)),
        "fitted": fitted,
        "clip_value": clip_value,
    }
    single = pair.dtype is torch.float32
    allowed = (3e-2 if single else 1e-3) if last_step else (3e-2 if single else 2e-5)
    if last_step and fitted:
        truth = _fitted(pair, before, there, truth, who, trial)
    if about["value off"] > (1e-2 if single else 1e-9) and kind != "unstable":
        about["VALUE"] = "wrong"
        found = found * float("nan")
    return Outcome(found, truth, size, allowed, doubt, about=about)


def _fitted(pair: Pair, before: Tensor, there: Tensor, truth: Tensor, who: int, trial: Trial) -> Tensor:
    """The indirect part scaled so that least is left of the adjoint's equation; SGD, whose w is along the cotangent."""
    s: Any = trial
    x, y = pair.x0.clone().requires_grad_(), there.clone().requires_grad_()
    direct, cotangent = torch.autograd.grad(pair.F(x, y, who), [x, y])
    place = s.calls * s.steps * s.accumulate - 1
    batch = s.batches[place % len(s.batches)] if s.batches else None
    hessian = torch.autograd.functional.hessian(lambda q: pair.f(pair.x0, q, batch), before)
    rate = s.factory.keywords["lr"]
    moved = -rate * hessian @ cotangent
    return direct + (truth - direct) * (-(cotangent @ moved) / (moved @ moved))


def unrolled(draw: Draw, warned: list[str]) -> Outcome:
    """`Unrolled` with every optimiser, option and way of differentiating."""
    return stepped(draw, last_step=False)


def last_step(draw: Draw, warned: list[str]) -> Outcome:
    """`LastStep`: all steps but the last held."""
    return stepped(draw, last_step=True)
