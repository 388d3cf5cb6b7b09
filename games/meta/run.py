"""The runs of `bilevel meta`: each learns by one method, and is judged on tasks that it never saw."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, mse_loss

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Result
from games.meta import few_shot, sinusoids
from games.meta.methods import OUTER, Method, falling, maml, maml_by_hand, meta_sgd

RATE, RATES = 0.01, (0.005, 0.1)
"""The inner learning rate of MAML, and where those of Meta-SGD begin, as in the paper."""
BY_HAND = "MAML by hand"
SINUSOID = ("MAML", "Meta-SGD", BY_HAND)
DIGITS = ("from scratch", "MAML", "Meta-SGD")
_POINTS = 100  # of a curve


def sinusoid(
    source: DigitSource, *, method: str, shots: int, steps: int, tasks: int, held_out: int, seed: int
) -> Result:
    """Learn sine curves from `shots` examples, one inner step; the loss on new curves, of 100 examples each."""
    net = sinusoids.network(seed)
    data = sinusoids.Sinusoids(shots, shots, tasks)
    trial = sinusoids.drawn(held_out, shots, 100, torch.Generator().manual_seed(10_000 + seed))
    began = time.perf_counter()
    if method == BY_HAND:
        found, losses = _by_hand(net, data, trial, steps=steps, seed=seed)
    else:
        game, response = _method(method, net, mse_loss, data, seed, RATE, RATES, 1)
        solution = bl.solve(game, task=response, optimizer=OUTER, scheduler=falling(steps), steps=steps, seed=seed)
        losses = [record["meta"] for record in solution.history]
        found = game.adapted(solution.variables, trial, task=response).losses["meta"]
    seconds = time.perf_counter() - began
    return {**_summary(found), "curve": _curve(losses), "steps": steps, "training_seconds": seconds}


def _by_hand(
    net: torch.nn.Module, data: sinusoids.Sinusoids, trial: Any, *, steps: int, seed: int
) -> tuple[Tensor, list[float]]:
    """MAML in plain torch, on the batches that the game sees."""
    game, _ = maml(net, mse_loss, data, rate=RATE, steps=1)
    place = game.start_of_tasks(seed)
    meta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    optimizer = OUTER(list(meta.values()))
    scheduler = falling(steps)(optimizer)
    losses = []
    for _ in range(steps):
        batch, place = game.draw_tasks(place)
        loss = maml_by_hand(net, mse_loss, batch, meta, rate=RATE, steps=1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return maml_by_hand(net, mse_loss, trial, meta, rate=RATE, steps=1).detach(), losses


def digits(source: DigitSource, *, method: str, steps: int, tasks: int, held_out: int, seed: int) -> Result:
    """Learn to tell five turned digits apart from one example each, five inner steps; accuracy on other digits."""
    net = few_shot.network(seed)
    learned, other = few_shot.classes(source)
    data = few_shot.FewShot(learned, 5, tasks)
    trial = few_shot.FewShot(other, 5, held_out).drawn(torch.Generator().manual_seed(10_000 + seed))
    began = time.perf_counter()
    game, response = _method(method, net, cross_entropy, data, seed, 0.1, (0.05, 0.15), 5)
    variables, losses = {name: game.initial(name) for name in game.names}, []
    if method != "from scratch":
        solution = bl.solve(game, task=response, optimizer=OUTER, scheduler=falling(steps), steps=steps, seed=seed)
        variables, losses = dict(solution.variables), [record["meta"] for record in solution.history]
    adapted = game.adapted(variables, trial, task=response)
    images, labels = trial["query"]
    scores = vmap(partial(functional_call, net))(adapted.variables, images)
    correct = (scores.argmax(-1) == labels).float().mean(1)
    seconds = time.perf_counter() - began
    return {**_summary(correct), "curve": _curve(losses), "steps": steps, "training_seconds": seconds}


def _method(
    method: str,
    net: torch.nn.Module,
    loss: Any,
    data: Any,
    seed: int,
    rate: float,
    rates: tuple[float, float],
    steps: int,
) -> Method:
    if method == "Meta-SGD":
        return meta_sgd(net, loss, data, rate=rates, steps=steps, seed=seed)
    return maml(net, loss, data, rate=rate, steps=steps)


def _summary(values: Tensor) -> Result:
    """The mean over tasks, and half of its 95 % interval."""
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return {"mean": float(values.mean()), "half_width": half, "held_out": len(values)}


def _curve(losses: list[float]) -> Result:
    """Means over stretches of the run, as many as a curve has points."""
    width = max(1, len(losses) // _POINTS)
    stretches = [losses[start : start + width] for start in range(0, len(losses), width)]
    return {"step": [width * (i + 1) for i in range(len(stretches))], "loss": [sum(s) / len(s) for s in stretches]}
