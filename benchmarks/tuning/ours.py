"""Tuning by hypergradients: `bl.solve` with one of three responses, judged as the trials of a search are."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.tuning.problems import Problem, Weights

Curve = list[tuple[float, float, float]]
"""Work, CPU seconds, validation loss: in order."""
PRODUCTS = 5
"""Iterations of the linear solver in each step of Implicit."""
FORGETFUL = (0.0, 0.5)
"""Betas of a leader that turns when its hypergradient does: what early ones were is soon forgotten."""


@dataclass(frozen=True)
class Setting:
    """`inner` training steps for each step of the leader's Adam, whose rate falls from `lr` to 0 along a cosine.

    `strength` is what else a method has: Implicit's damping, Hypernetwork's scale of perturbations. `momentum` and
    `memory` are the betas of the leader's Adam.
    """

    method: str
    inner: int
    lr: float
    strength: float = 0.0
    momentum: float = 0.9
    memory: float = 0.999

    def response(self, problem: Problem) -> bl.Response:
        """The response; its optimiser is that of the trials."""
        if self.method == "unrolled":
            return bl.Unrolled(problem.optimizer, steps=self.inner)
        if self.method == "implicit":
            # A network that is still training has negative curvature, of which conjugate gradients say so and stop.
            kind = bl.GMRES if problem.size == 10 else bl.ConjugateGradient
            solver = kind(max_steps=PRODUCTS, rtol=None, damping=self.strength)
            return bl.Implicit(problem.optimizer, steps=self.inner, tolerance=None, linear_solver=solver)
        # With a decay for each weight, each weight answers its own; with ten for a network, every weight answers all.
        network = bl.networks.Elementwise() if problem.size > 10 else bl.networks.Linear()
        return bl.Hypernetwork(
            problem.optimizer, scale=self.strength, network=network, steps=self.inner, tolerance=None
        )

    @property
    def uncounted(self) -> int:
        """What a leader's step costs beyond its count: for Implicit the gradient's graph and the mixed product."""
        return 2 if self.method == "implicit" else 0

    @property
    def work(self) -> int:
        """Gradients and products of a leader's step, as planned; one is the validation loss's gradient."""
        # Implicit: the gradient at the end; a product each for its warm start and its true residual.
        own = {
            "unrolled": 2 * self.inner,
            "implicit": self.inner + 1 + PRODUCTS + 2,
            "hypernetwork": 2 * self.inner + 3,
        }
        return own[self.method] + self.uncounted + 1


def settings(problem: str, method: str) -> list[Setting]:
    """What was tried for a problem and a method, on other seeds than those that are reported."""
    places = {
        "unrolled": [(5, 0.0), (10, 0.0)],
        "implicit": [(5, 0.1), (5, 0.3)],
        "hypernetwork": [(1, 0.5), (4, 0.5)],
    }
    tried = [Setting(method, inner, lr, strength) for inner, strength in places[method] for lr in (0.2, 0.4)]
    if problem == "many":
        return tried
    if method != "unrolled":
        inner, strength = {"implicit": (5, 0.1), "hypernetwork": (4, 0.5)}[method]
        return tried + [Setting(method, inner, lr, strength, *FORGETFUL) for lr in (0.2, 0.4)]
    # Fewer steps of the leader are longer ones.
    horizons = [(10, 0.4), (20, 0.6), (40, 1.0)]
    tried += [Setting(method, *horizon) for horizon in horizons[1:]]
    tried += [Setting(method, 10, 0.4, 0.0, 0.5, 0.9)]
    return tried + [Setting(method, *horizon, 0.0, *FORGETFUL) for horizon in horizons]


@dataclass(frozen=True)
class Tuned:
    """What a run of ours leaves: a curve, hyperparameters, the run's own weights and what these cost, what failed.

    A point of the curve is what one has who stops there: the work and the time so far *and* a standard training, whose
    validation loss is shown. No best-so-far is taken. A run that fails ends with the hyperparameters that it had.
    """

    curve: Curve
    values: Tensor
    weights: Weights
    work: float
    failure: str | None


def tuned(problem: Problem, start: Tensor, setting: Setting, *, budget: int, points: int, seed: int) -> Tuned:
    """Hyperparameters from `start` for a budget of steps, to which the curve adds those of a standard training."""
    steps = budget // setting.work
    judged = {round(steps * k / (points - 1)) for k in range(1, points)} if points > 1 else {steps}
    curve: Curve = []
    judging, failure, spent = 0.0, None, 0.0
    last: Mapping[str, Any] = {"hyper": start, "weights": problem.start}
    began = time.process_time()

    def judge(work: float, coordinates: Tensor) -> None:
        nonlocal judging
        at = time.process_time()
        loss = problem.valid_loss(problem.values(coordinates))
        after = time.process_time()
        curve.append((work + problem.steps, after - began - judging, loss))
        judging += after - at

    def watch(step: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        nonlocal last, spent
        last, spent = variables, record["work"] + step * setting.uncounted
        if step in judged:
            judge(spent, variables["hyper"])

    if points > 1:
        judge(0, start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)  # short of convergence by intent
        try:
            bl.solve(
                problem.game(start),
                weights=setting.response(problem),
                optimizer=partial(torch.optim.Adam, lr=setting.lr, betas=(setting.momentum, setting.memory)),
                scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
                steps=steps,
                callbacks=[watch],
                seed=seed,
            )
        except bl.BilevelError as error:
            failure = f"{type(error).__name__}: {error}"
    return Tuned(curve, problem.values(last["hyper"]), dict(last["weights"]), spent, failure)
