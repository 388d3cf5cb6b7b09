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
from benchmarks.tuning.problems import Problem

Curve = list[tuple[float, float, float]]
"""Work, CPU seconds, validation loss: in order."""
PRODUCTS = 5
"""Iterations of the linear solver in each step of Implicit."""


@dataclass(frozen=True)
class Setting:
    """`inner` training steps for each step of the leader's Adam, whose rate falls from `lr` to 0 along a cosine.

    `strength` is what else a method has: Implicit's damping, Hypernetwork's scale of perturbations.
    """

    method: str
    inner: int
    lr: float
    strength: float = 0.0

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
        network = bl.Elementwise() if problem.size > 10 else bl.Linear()
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


def settings(method: str) -> list[Setting]:
    """What was tried for a method, on other seeds than those that are reported."""
    places = {
        "unrolled": [(5, 0.0), (10, 0.0)],
        "implicit": [(5, 0.1), (5, 0.3)],
        "hypernetwork": [(1, 0.5), (4, 0.5)],
    }
    return [Setting(method, inner, lr, strength) for inner, strength in places[method] for lr in (0.2, 0.4)]


def tuned(
    problem: Problem, start: Tensor, setting: Setting, *, budget: int, points: int, seed: int
) -> tuple[Curve, Tensor, str | None]:
    """The curve, the hyperparameters at the end of the budget, which includes a standard training, and what failed.

    A point of the curve is what one has who stops there: the work and the time so far *and* a standard training, whose
    validation loss is shown. No best-so-far is taken. A run that fails ends with the hyperparameters that it had.
    """
    steps = (budget - problem.steps) // setting.work
    judged = {round(steps * k / (points - 1)) for k in range(1, points)} if points > 1 else {steps}
    curve: Curve = []
    judging, failure, last = 0.0, None, start
    began = time.process_time()

    def judge(work: float, coordinates: Tensor) -> None:
        nonlocal judging
        at = time.process_time()
        loss = problem.valid_loss(problem.values(coordinates))
        after = time.process_time()
        curve.append((work + problem.steps, after - began - judging, loss))
        judging += after - at

    def watch(step: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        nonlocal last
        last = variables["hyper"]
        if step in judged:
            judge(record["work"] + step * setting.uncounted, variables["hyper"])

    if points > 1:
        judge(0, start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)  # short of convergence by intent
        try:
            bl.solve(
                problem.game(start),
                weights=setting.response(problem),
                optimizer=partial(torch.optim.Adam, lr=setting.lr),
                scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
                steps=steps,
                callbacks=[watch],
                seed=seed,
            )
        except bl.BilevelError as error:
            failure = f"{type(error).__name__}: {error}"
    return curve, problem.values(last), failure
