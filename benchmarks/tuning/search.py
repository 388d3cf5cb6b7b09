"""The searches that see a training as a black box: TPE, Hyperband, random, a grid."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.tuning.ours import Curve
from benchmarks.tuning.problems import SIDE, Problem

TRIALS = 100
GRID_TEN, GRID_MANY = 6, 20
"""Points on each of the two axes of the grid for ten; points of the one axis for many."""
RUNG, REDUCTION = 20, 3
"""Hyperband stops trials after 20, 60, 180 steps, and keeps a third each time."""
Best = tuple[Curve, Tensor]


def searched(problem: Problem, start: Tensor, method: str, seed: int, trials: int = TRIALS) -> Best:
    """The least validation loss so far over work and seconds, and the hyperparameters that gave it."""
    if method in ("TPE", "Hyperband"):
        return _optuna(problem, start, seed, trials, pruned=method == "Hyperband")
    candidates = _grid(problem) if method == "grid" else _random(problem, start, seed, trials)
    run = _Run(problem)
    for values in itertools.islice(candidates, trials):
        run.tell(values, problem.valid_loss(values), problem.steps)
    return run.curve, run.best


class _Run:
    """What a search has spent and found."""

    def __init__(self, problem: Problem) -> None:
        self.began, self.work = time.process_time(), 0
        self.curve: Curve = []
        self.best, self.least = problem.low, float("inf")

    def tell(self, values: Tensor, loss: float, steps: int) -> None:
        """A trial's end; a loss of infinity is of one that was stopped."""
        self.work += steps
        if loss < self.least:
            self.best, self.least = values, loss
        if self.least < float("inf"):
            self.curve.append((self.work, time.process_time() - self.began, self.least))


def _random(problem: Problem, start: Tensor, seed: int, trials: int) -> Iterator[Tensor]:
    """Uniform in the box, each hyperparameter by itself; the first is where everybody starts."""
    generator = torch.Generator().manual_seed(seed + 1000)
    yield problem.values(start)
    for _ in range(trials - 1):
        yield problem.low + (problem.high - problem.low) * torch.rand(problem.size, generator=generator)


def _grid(problem: Problem) -> Iterator[Tensor]:
    """Ten: one place in the boxes of the four decays, one in those of the six others. Many: one decay for all."""
    width = problem.high - problem.low
    if problem.size > 10:
        for place in torch.linspace(0, 1, GRID_MANY):
            yield problem.low + width * place
        return
    places = (torch.arange(GRID_TEN) + 0.5) / GRID_TEN
    for decay in places:
        for other in places:
            yield problem.low + width * torch.cat([decay.expand(4), other.expand(6)])


def spread(problem: Problem) -> Callable[[Tensor], Tensor]:
    """From what TPE chooses, ten numbers, to hyperparameters: themselves, or one decay for each class's weights."""
    if problem.size > 10:
        return lambda ten: torch.cat([ten.repeat_interleave(SIDE * SIDE), ten])
    return lambda ten: ten


def _optuna(problem: Problem, start: Tensor, seed: int, trials: int, *, pruned: bool) -> Best:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    whole, run = spread(problem), _Run(problem)
    pruner = (
        optuna.pruners.HyperbandPruner(min_resource=RUNG, max_resource=problem.steps, reduction_factor=REDUCTION)
        if pruned
        else optuna.pruners.NopPruner()
    )
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner, study_name=f"{seed}")
    study.enqueue_trial({str(i): float(v) for i, v in enumerate(problem.values(start)[:10])})

    def objective(trial: optuna.Trial) -> float:
        bounds = zip(problem.low[:10].tolist(), problem.high[:10].tolist(), strict=True)
        values = whole(torch.tensor([trial.suggest_float(str(i), *bound) for i, bound in enumerate(bounds)]))
        if not pruned:
            loss = problem.valid_loss(values)
            run.tell(values, loss, problem.steps)
            return loss
        for step, weights in enumerate(problem.training(values), 1):
            if step % RUNG:
                continue
            with torch.no_grad():
                loss = float(problem.loss(weights, problem.digits.valid))
            if step >= problem.steps:
                break
            trial.report(loss, step)
            if trial.should_prune():
                run.tell(values, float("inf"), step)
                raise optuna.TrialPruned
        run.tell(values, loss, problem.steps)
        return loss

    study.optimize(objective, n_trials=trials)
    return run.curve, run.best


def seconds_to_suggest(count: int) -> float:
    """CPU seconds that TPE takes to suggest `count` hyperparameters once its ten random trials are over."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    took = 0.0
    for number in range(11):
        trial = study.ask()
        began = time.process_time()
        for i in range(count):
            trial.suggest_float(str(i), 0.0, 1.0)
        took = time.process_time() - began
        study.tell(trial, float(number))
    return took
