"""A batch of tasks in one vmapped pass, against the loop over its tasks.

The hypergradient of one batch of sine curves, network 1-40-40-1, ten points each: MAML with 1 and 5 inner steps,
Meta-SGD, and iMAML (10 steps, 5 of GMRES). The loops are the library's, over the same tasks as games of
their own, and for MAML plain torch, where a pass by `torch.func.vmap` is written by hand too. They are interleaved on
one thread; seconds are the processor's, ratios are medians over the rounds. Every round also compares the
hypergradients. Writes JSON.

    python benchmarks/tasks.py --output tasks.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import bilevel as bl
from benchmarks.head import head
from bilevel.tree import leaves, map_leaves
from games.meta.methods import Method, maml, maml_by_hand, meta_sgd
from games.meta.sinusoids import drawn, network

RATE = 0.01


def main() -> None:
    """Run the rounds and write what they took."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--counts", type=int, nargs="+", default=[5, 25, 100])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("tasks.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = [
        measured(name, make, count, chosen.rounds, chosen.seed)
        for name, make in METHODS.items()
        for count in chosen.counts
    ]
    settings = {"rounds": chosen.rounds, "dtype": "float64"}
    chosen.output.write_text(json.dumps({**head(seed=chosen.seed), "settings": settings, "results": rows}, indent=2))


def measured(name: str, make: Callable[[Any], Method], count: int, rounds: int, seed: int) -> dict[str, Any]:
    """One row: seconds of each way, their ratios, and how far the hypergradients are apart."""
    batch = drawn(count, 10, 10, torch.Generator().manual_seed(seed))
    game, response = make([batch])
    ways = {"at once": at_once(game, response, batch), "loop": loop(game, response, batch)}
    steps = {"MAML, 1 step": 1, "MAML, 5 steps": 5}.get(name)
    if steps is not None:
        ways["plain torch"] = by_hand(batch, steps)
        ways["vmap by hand"] = vmap_by_hand(batch, steps)
    found = {way: run() for way, run in ways.items()}  # torch imports what vmap needs on its first use
    apart = {way: distance(found["at once"], slopes) for way, slopes in found.items() if way != "at once"}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            began = time.process_time()
            for _ in range(repeats := 4 if way in ("at once", "vmap by hand") else 1):
                run()
            taken[way].append((time.process_time() - began) / repeats)
    ratios = {
        way: statistics.median(one / fast for one, fast in zip(taken[way], taken["at once"], strict=True))
        for way in apart
    }
    row = {
        "method": name,
        "tasks": count,
        "seconds": {way: statistics.median(values) for way, values in taken.items()},
        "ratios": ratios,
        "largest relative difference": apart,
    }
    print(row)
    return row


def at_once(game: bl.Tasks, response: bl.Response, batch: Any) -> Callable[[], list[Tensor]]:
    """The hypergradient of the whole batch by one pass."""
    stack = game.together(batch)
    state = response.init(stack)

    def run() -> list[Tensor]:
        return slopes(stack, response, state, batch["support"], batch["query"])

    return run


def loop(game: bl.Tasks, response: bl.Response, batch: Any) -> Callable[[], list[Tensor]]:
    """The mean of the tasks' hypergradients, one after the other."""
    stack = game.together(batch)
    singles = []
    for index in range(stack.count):
        one = stack.game(index)
        parts = [tuple(t[index] for t in batch[part]) for part in ("support", "query")]
        singles.append((one, response.init(one), *parts))

    def run() -> list[Tensor]:
        each = [slopes(one, response, state, support, query) for one, state, support, query in singles]
        return [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]

    return run


def slopes(game: bl.Game, response: bl.Response, state: Any, support: Any, query: Any) -> list[Tensor]:
    """The hypergradient of one game."""
    meta = map_leaves(lambda t: t.requires_grad_(), game.initial("meta"))
    weights, _ = response(game, {"meta": meta}, state, support)
    loss = game.loss("meta", {"meta": meta, "task": weights}, query)
    return list(torch.autograd.grad(loss, leaves(meta)))


def by_hand(batch: Any, steps: int) -> Callable[[], list[Tensor]]:
    """MAML in plain torch, task after task."""
    net = network(0)
    meta = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}

    def run() -> list[Tensor]:
        loss = maml_by_hand(net, mse_loss, batch, meta, rate=RATE, steps=steps).mean()
        return list(torch.autograd.grad(loss, list(meta.values())))

    return run


def vmap_by_hand(batch: Any, steps: int) -> Callable[[], list[Tensor]]:
    """MAML in plain torch, all tasks at once: what PyTorch itself needs for one pass."""
    net = network(0)
    meta = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}

    def one(meta: dict[str, Tensor], support: Any, query: Any) -> Tensor:
        def own(here: dict[str, Tensor]) -> Tensor:
            return mse_loss(torch.func.functional_call(net, here, support[0]), support[1])

        here = meta
        for _ in range(steps):
            slopes = torch.func.grad(own)(here)
            here = {name: p - RATE * slopes[name] for name, p in here.items()}
        return mse_loss(torch.func.functional_call(net, here, query[0]), query[1])

    def run() -> list[Tensor]:
        loss = torch.func.vmap(one, in_dims=(None, 0, 0))(meta, batch["support"], batch["query"]).mean()
        return list(torch.autograd.grad(loss, list(meta.values())))

    return run


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of two hypergradients, relative to the larger one's size."""
    size = max(float(slope.abs().max()) for slope in others)
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True)) / size


def imaml(data: Any) -> Method:
    """Each task stays near the leader."""

    def near(meta: Any, task: Any, batch: Any) -> Tensor:
        apart = [(w - v).square().sum() for w, v in zip(task.values(), meta.values(), strict=True)]
        return mse_loss(task(batch[0]), batch[1]) + 5 * torch.stack(apart).sum()

    def judge(task: Any, batch: Any) -> Tensor:
        return mse_loss(task(batch[0]), batch[1])

    net = network(0)
    game = bl.Tasks(meta=bl.Player(judge, net), task=bl.Player(near, net, start=lambda meta: meta), data=data)
    solver = bl.GMRES(max_steps=5, rtol=None)  # ReLU networks are not convex, 5 |w - v|^2 or not
    return game, bl.Implicit(partial(torch.optim.SGD, lr=RATE), steps=10, tolerance=None, linear_solver=solver)


METHODS: dict[str, Callable[[Any], Method]] = {
    "MAML, 1 step": lambda data: maml(network(0), mse_loss, data, rate=RATE, steps=1),
    "MAML, 5 steps": lambda data: maml(network(0), mse_loss, data, rate=RATE, steps=5),
    "Meta-SGD, 1 step": lambda data: meta_sgd(network(0), mse_loss, data, rate=(0.005, 0.1), steps=1),
    "iMAML": imaml,
}


if __name__ == "__main__":
    main()
