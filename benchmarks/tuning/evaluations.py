"""A search that takes hypergradients of compressed trainings: fewer steps at a higher rate, then one for real."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.tuning.ours import Curve
from benchmarks.tuning.problems import Problem, Weights
from benchmarks.tuning.search import searched
from bilevel.search import GradientSearch


@dataclass(frozen=True)
class Evaluations:
    """`count` trainings of `steps` steps at `speed` times the rate; then one at the last proposal, as every trial is.

    `slopes` takes hypergradients, through the last `backprop` steps: each of them costs a product more. `additive` are
    the shares of the kernel's additive part. `at_once` points are asked for together. `centre` starts in the middle of
    the box, not where the other searches do. The search goes by the logarithm of the loss, capped.
    """

    count: int
    steps: int = 100
    speed: float = 2.0
    slopes: bool = True
    backprop: int = 49
    additive: tuple[float, ...] = (1.0, 0.7, 0.2)
    radius: tuple[float, float] = (0.2, 0.1)
    at_once: int = 1
    centre: bool = True

    @property
    def work(self) -> int:
        """Steps and products of one evaluation, and the validation loss's gradient."""
        return self.steps + self.backprop + 1 if self.slopes else self.steps


CAP, SLOPE_CAP = math.log(2.0), 1.5
"""Of the logarithm of the loss and of its slope per range: the landscape has plateaus and walls."""
TENTH, TWENTIETH = "slopes, a tenth", "slopes, a twentieth"
SETTINGS = {
    TENTH: Evaluations(12),
    TWENTIETH: Evaluations(5),
    "no slopes": Evaluations(18, slopes=False),
    "no slopes, wider": Evaluations(18, slopes=False, radius=(0.4, 0.1)),
    "whole slopes": Evaluations(9, backprop=100),
    "whole slopes, a twentieth": Evaluations(4, backprop=100),
    "product kernel": Evaluations(12, additive=(0.0,)),
    "not compressed": Evaluations(6, steps=200, speed=1.0, backprop=99),
    "three at once": Evaluations(12, at_once=3),
    "random start": Evaluations(12, centre=False),
}
"""By name, those after the first two ablations of the first: each spends at most what it does, a tenth of TPE's."""
TPE_COMPRESSED = "TPE, compressed"
"""TPE on the same compressed trainings, from the centre, for the same steps."""


def quicker(problem: Problem, setting: Evaluations) -> Problem:
    """The same with compressed trainings."""
    usual = problem.optimizer
    return replace(problem, optimizer=partial(usual, lr=usual.keywords["lr"] * setting.speed), steps=setting.steps)


def compressed(problem: Problem, values: Tensor, setting: Evaluations) -> tuple[float, Tensor | None]:
    """The validation loss after a compressed training at values `[n]`, and its hypergradient in them."""
    fast = quicker(problem, setting).optimizer
    if not setting.slopes:
        return quicker(problem, setting).valid_loss(values), None
    hyper = values.clone().requires_grad_()

    def valid_loss(weights: Weights) -> Tensor:
        return problem.loss(weights, problem.digits.valid)

    def train_loss(hyper: Tensor, weights: Weights) -> Tensor:
        return problem.prepared(hyper)(weights)

    game = bl.Game(hyper=bl.Player(valid_loss, values), weights=bl.Player(train_loss, problem.start))
    response = bl.Unrolled(fast, steps=setting.steps, backprop_steps=setting.backprop)
    weights, _ = response(game, {"hyper": hyper}, response.init(game))
    loss = valid_loss(weights)
    (slope,) = torch.autograd.grad(loss, hyper)
    return float(loss.detach()), slope


def evaluated(problem: Problem, start: Tensor, setting: Evaluations, seed: int) -> tuple[Curve, Tensor, list[float]]:
    """Work and time with the loss of the one real training, its values `[n]`, and the compressed losses in order."""
    began, names = time.process_time(), [f"h{i}" for i in range(problem.size)]
    ends = list(zip(problem.low.tolist(), problem.high.tolist(), strict=True))
    first = 0.5 * (problem.low + problem.high) if setting.centre else problem.values(start)
    triples = zip(names, ends, first.tolist(), strict=True)
    search = GradientSearch(
        {name: bl.Interval(low, high, start=z) for name, (low, high), z in triples},
        evaluations=setting.count,
        radius=setting.radius,
        cap=CAP,
        slope_cap=SLOPE_CAP,
        additive=setting.additive,
    )
    state, losses = search.init(seed), list[float]()
    while len(losses) < setting.count:
        points, state = search.ask(state, min(setting.at_once, setting.count - len(losses)))
        for point in points:
            loss, slope = compressed(problem, _tensor(point, problem), setting)
            gradient = {}
            if slope is not None and math.isfinite(loss):
                # Of the logarithm, which the search goes by.
                gradient = {name: s / loss for name, s in zip(names, slope.tolist(), strict=True) if math.isfinite(s)}
            state = search.tell(state, point, math.log(loss) if math.isfinite(loss) else math.nan, gradient)
            losses.append(loss)
    (last,), _ = search.ask(state)
    values = _tensor(last, problem)
    loss = problem.valid_loss(values)
    work = setting.count * setting.work + problem.steps
    return [(work, time.process_time() - began, loss)], values, losses


def by_tpe(problem: Problem, seed: int) -> tuple[Curve, Tensor, list[float]]:
    """The same by TPE without slopes: compressed trainings from the centre, then one for real at the best."""
    setting = SETTINGS["no slopes"]
    began = time.process_time()
    _, values = searched(quicker(problem, setting), torch.zeros(problem.size), "TPE", seed, setting.count)
    loss = problem.valid_loss(values)
    return [(setting.count * setting.work + problem.steps, time.process_time() - began, loss)], values, []


def _tensor(point: dict[str, float], problem: Problem) -> Tensor:
    return torch.tensor(list(point.values()), dtype=problem.low.dtype)
