"""Runs of the decay game: one for each response, and what its decay is worth once training has converged.

Nothing here prints; a progress bar is a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from games.experiments.data import Digits
from games.problems.decay import START, Score, decay_game, score, train, uniform

Callback = Callable[[int, Mapping[str, float], Mapping[str, Any]], object]


@dataclass(frozen=True)
class Method:
    """A response to the decay, and the learning rate of the leader's Adam."""

    response: bl.Response
    learning_rate: float


def methods() -> dict[str, Method]:
    """The three responses by name, each with settings that suit a softmax classifier on a few hundred digits."""
    return {
        "unrolled": Method(bl.Unrolled(partial(torch.optim.SGD, lr=0.1, momentum=0.9), steps=50), 0.05),
        "implicit": Method(
            bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, linear_solver=bl.ConjugateGradient(rtol=1e-3)), 0.05
        ),
        "hypernetwork": Method(
            # Each weight answers its own decay alone: 7,850 slopes instead of 7,850 squared.
            bl.Hypernetwork(
                partial(torch.optim.Adam, lr=3e-3), scale=1.0, network=bl.networks.Elementwise(), warmup=300, steps=20
            ),
            0.03,
        ),
    }


@dataclass(frozen=True, eq=False)
class Trained:
    """A classifier trained to convergence at a fixed decay: validation and test score, and the gradient left."""

    valid: Score
    test: Score
    gradient_norm: float


@dataclass(frozen=True, eq=False)
class Tuned:
    """One method's run: its solution, the decay it learned, and the classifier retrained to convergence there."""

    method: Method
    solution: bl.Solution
    decay: Mapping[str, Tensor]
    after: Trained


def trained(digits: Digits, decay: Mapping[str, Tensor], *, seed: int = 0) -> Trained:
    """Train to convergence at a decay and score; validation and test losses have no penalty in them."""
    fit = train(digits, decay, seed=seed)
    return Trained(score(fit.weights, digits.valid), score(fit.weights, digits.test), fit.gradient_norm)


def baseline(digits: Digits, *, seed: int = 0) -> Trained:
    """The classifier before tuning: trained to convergence with every log decay at its start."""
    return trained(digits, uniform(digits, START), seed=seed)


def tune(
    digits: Digits,
    method: Method,
    *,
    steps: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Tuned:
    """Tune one log decay a weight by one method, then train to convergence at the decay it learned.

    `checkpoint` is a file of `Store.checkpoint` for this run's `identity`, written every tenth step, at the end and
    when interrupted; one that is there is continued, bit for bit. Raises `ValueError` for steps below 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1.")
    solution = bl.solve(
        decay_game(digits, seed=seed),
        weights=method.response,
        optimizer=partial(torch.optim.Adam, lr=method.learning_rate),
        steps=steps,
        seed=seed,
        checkpoint=checkpoint,
        callbacks=callbacks,
    )
    decay = solution.variables["decay"]
    return Tuned(method, solution, decay, trained(digits, decay, seed=seed))


def identity(digits: Digits, method: Method, seed: int) -> dict[str, Any]:
    """What makes a run this run and no other; its number of steps does not."""
    return {
        "data": digits.fingerprint,
        "train": len(digits.train),
        "valid": len(digits.valid),
        "seed": seed,
        "response": repr(method.response),
        "learning_rate": method.learning_rate,
    }
