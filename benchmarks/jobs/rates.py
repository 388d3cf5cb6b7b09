"""A learning rate and its schedule: ten rates, each for a tenth of the training, through all of its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import bilevel as bl
from benchmarks.jobs.parts import RETRAINED, TRIALS, Job, Parts, Row, best_of, digits, loss, scored

STEPS, PIECES, BATCH = 200, 10, 50
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def data(seed: int) -> Parts:
    """300 digits."""
    return digits(300, seed)


def network() -> nn.Module:
    """784-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def trained(rates: Sequence[float], seed: int, split: int) -> nn.Module:
    """A fresh network, a rate a step."""
    torch.manual_seed(seed)
    model, (train, _, _) = network(), data(split)
    optimizer, done = SGD(model.parameters()), 0
    while done < STEPS:
        for batch in DataLoader(train, batch_size=BATCH, shuffle=True):
            optimizer.param_groups[0]["lr"] = rates[done]
            optimizer.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done == STEPS:
                break
    return model


def default(seed: int) -> Row:
    """The rate that the optimiser was given."""
    began = time.process_time()
    models = [trained([0.01] * STEPS, 100 * seed + i, seed) for i in range(RETRAINED)]
    return {"default": scored(models, data(seed), began)}


def schedule(log_rates: Tensor) -> Tensor:
    """A rate a step from one a piece."""
    return log_rates.exp().repeat_interleave(STEPS // PIECES)


def found(seed: int) -> Row:
    """Thirty steps of the rates, each through a whole training."""
    (train, valid, _), began = (parts := data(seed)), time.process_time()
    torch.manual_seed(seed)
    start = torch.full((PIECES,), math.log(0.01))
    # --- what somebody adds
    game = bl.Game(
        log_rates=bl.Player(loss, start, data=DataLoader(valid, 1000), optimizer_hyper=True),
        weights=bl.Player(loss, network(), data=DataLoader(train, BATCH, shuffle=True)),
    )
    optimizer = bl.inner.TorchOptimizer(SGD, rates=schedule)
    response = bl.Unrolled(optimizer, steps=STEPS, warm_start=False)
    solution = bl.solve(game, weights=response, optimizer=partial(torch.optim.Adam, lr=0.2), steps=30, seed=seed)
    # ---
    rates = schedule(solution.variables["log_rates"].detach()).tolist()
    told: Row = {"hyper": {str(piece): rates[piece * STEPS // PIECES] for piece in range(PIECES)}, "warnings": []}
    model = network()
    solution.load_into(model, "weights")
    told["the run itself"] = scored([model], parts, began)
    began = time.process_time()
    return told | {"found": scored([trained(rates, 100 * seed + i, seed) for i in range(RETRAINED)], parts, began)}


def random(seed: int) -> Row:
    """A rate evenly in its logarithm from 1e-3 to 1, held or falling as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    trials = []
    for _ in range(TRIALS):
        share, falls = torch.rand(2, generator=generator).tolist()
        rate = 10.0 ** (3.0 * share - 3.0)
        rates = [rate * (0.5 + 0.5 * math.cos(math.pi * t / STEPS) if falls < 0.5 else 1.0) for t in range(STEPS)]
        trials.append(partial(trained, rates, split=seed))
    return {"random": best_of(trials, data(seed), seed)}


JOB = Job("learning rate and schedule, 300 digits", {"default": default, "found": found, "random": random})
