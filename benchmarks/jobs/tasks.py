"""Sine curves from ten points each: where a network starts, and how fast it adapts, beside training on all together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import bilevel as bl
from benchmarks.jobs.parts import TRIALS, Job, Row

STEPS, TASKS = 1000, 25
Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """1-40-40-1."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def curves(count: int) -> dict[str, Batch]:
    """Twenty points of each, ten to adapt to and ten to be judged by."""
    height, phase = 0.1 + 4.9 * torch.rand(count, 1, 1), torch.pi * torch.rand(count, 1, 1)
    inputs = 10.0 * torch.rand(count, 20, 1) - 5.0
    targets = height * torch.sin(inputs + phase)
    return {"support": (inputs[:, :10], targets[:, :10]), "query": (inputs[:, 10:], targets[:, 10:])}


def loss(task: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Of one task."""
    return mse_loss(task(batch[0]), batch[1])


def judged(model: nn.Module, rate: float, drawn: dict[str, Batch]) -> float:
    """The mean loss of curves after one step of gradient descent on each, in plain PyTorch."""
    losses = []
    for rows in zip(*drawn["support"], *drawn["query"], strict=True):
        own = copy.deepcopy(model)
        slopes = torch.autograd.grad(loss(own, (rows[0], rows[1])), list(own.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(own.parameters(), slopes, strict=True):
                parameter -= rate * slope
            losses.append(float(loss(own, (rows[2], rows[3]))))
    return sum(losses) / len(losses)


def _row(model: nn.Module, rate: float, seed: int, began: float) -> Row:
    torch.manual_seed(10_000 + seed)
    valid, test = judged(model, rate, curves(200)), judged(model, rate, curves(1000))
    return {"valid": valid, "test": test, "seconds": time.process_time() - began}


def together(rate: float, seed: int) -> nn.Module:
    """One network for all curves, by Adam."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(STEPS):
        drawn = curves(TASKS)
        optimizer.zero_grad()
        (0.5 * loss(model, drawn["support"]) + 0.5 * loss(model, drawn["query"])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def default(seed: int) -> Row:
    """Trained on all, then one step."""
    began = time.process_time()
    return {"default": _row(together(1e-3, seed), 0.01, seed, began)}


def found(seed: int) -> Row:
    """The start that one step makes the most of."""
    began = time.process_time()
    torch.manual_seed(seed)
    net = network()

    def loader() -> Iterator[dict[str, Batch]]:
        return (curves(TASKS) for _ in range(STEPS))

    # --- what somebody adds
    tasks = bl.Tasks(
        meta=bl.Player(loss, init=net),
        task=bl.Player(loss, init=net, start=lambda meta: meta),
        data=loader,
    )
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.01), steps=1)
    solution = bl.solve(tasks, task=response, optimizer=partial(torch.optim.Adam, lr=1e-3), steps=STEPS)
    solution.load_into(net, "meta")
    # ---
    row = _row(net, 0.01, seed, began)
    return {"the run itself": row, "found": row, "hyper": {}, "warnings": []}


def random(seed: int) -> Row:
    """Rates of training and of the step drawn evenly in their logarithms; the best on 200 curves."""
    began, generator, rows = time.process_time(), torch.Generator().manual_seed(seed), []
    for _ in range(TRIALS):
        one, other = torch.rand(2, generator=generator).tolist()
        rows.append(_row(together(10.0 ** (2.0 * one - 4.0), seed), 10.0 ** (2.0 * other - 3.0), seed, began))
    return {"random": min(rows, key=lambda row: row["valid"]) | {"seconds": time.process_time() - began}}


JOB = Job("tasks, sine curves", {"default": default, "found": found, "random": random})
