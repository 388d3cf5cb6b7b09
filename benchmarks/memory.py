"""Peak memory and time of one hypergradient through long unrolled runs, by storing all, by segments, in forward mode.

A network of a million weights (784-1024-256-10), 128 examples a step, SGD with momentum. Each case is a process of its
own, timed beside a plain training run of the same steps, in turns. `resident` is what its resident set grew by at most,
holes of the allocator's included; `counted` the most bytes that tensors held at one time, from another pass, not timed.
Storing all is measured at few steps: it grows in a straight line. Writes JSON.

    python benchmarks/memory.py --output memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.head import head
from bilevel.comparison.memory import peak_bytes

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Case = dict[str, Any]


def network(hidden: list[int]) -> torch.nn.Sequential:
    sizes = [784, *hidden, 10]
    layers: list[torch.nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [torch.nn.Linear(wide, narrow), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def game_of(leaders: int, hidden: list[int]) -> bl.Game:
    """One weight decay, one a layer (3), or one weight a class (10), for random images of fixed classes."""
    model = network(hidden)
    means = torch.randn(10, 784)
    labels = torch.randint(0, 10, (21, 128))
    batches = [(0.5 * means[row] + torch.randn(128, 784), row) for row in labels]

    def follow(hyper: Tensor, weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        images, classes = batch
        if leaders == 10:
            each = cross_entropy(functional_call(model, weights, (images,)), classes, reduction="none")
            return (hyper.exp()[classes] * each).mean()
        loss = cross_entropy(functional_call(model, weights, (images,)), classes)
        decayed = [w for w in weights.values() if w.ndim == 2]
        return loss + sum((hyper[i % leaders].exp() * w.square()).sum() for i, w in enumerate(decayed))

    def lead(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])

    start = torch.zeros(10) if leaders == 10 else torch.full((leaders,), -8.0)
    return bl.Game(hyper=bl.Player(lead, start, batches[20:]), weights=bl.Player(follow, model, batches[:20]))


def differentiation(case: Case) -> bl.responses.Differentiation:
    if case["how"] == "segments":
        return bl.Segments(count=case.get("count"), memory=case.get("memory"))
    return bl.ForwardMode() if case["how"] == "forward" else bl.ReverseMode()


def hypergradient(game: bl.Game, case: Case) -> Tensor:
    response = bl.Unrolled(SGD, steps=case["steps"], differentiation=differentiation(case))
    hyper = game.initial("hyper").requires_grad_()
    weights, _ = response(game, {"hyper": hyper}, response.init(game))
    batch, _ = game.draw("hyper", game.start("hyper"))
    return torch.autograd.grad(game.loss("hyper", {"hyper": hyper, "weights": weights}, batch), hyper)[0]


def trained(game: bl.Game, steps: int) -> None:
    """The floor: the same steps by torch alone."""
    weights = {name: w.requires_grad_() for name, w in game.initial("weights").items()}
    optimizer, hyper, place = SGD(list(weights.values())), game.initial("hyper"), game.start("weights")
    for _ in range(steps):
        batch, place = game.draw("weights", place)
        optimizer.zero_grad()
        game.loss("weights", {"hyper": hyper, "weights": weights}, batch).backward()
        optimizer.step()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measured(case: Case) -> dict[str, Any]:
    """One case, in this process: rounds of it and of the plain run in turns, then its tensors counted."""
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    game = game_of(case["leaders"], case["hidden"])
    trained(game, 3)
    plain: list[tuple[float, float]] = []
    taken: list[tuple[float, float]] = []
    before, slope = resident(), []
    if case["how"] == "plain":
        plain.append(timed(lambda: trained(game, case["steps"])))
        return {"resident": resident() - before, "wall": plain[0][0], "cpu": plain[0][1]}
    taken.append(timed(lambda: slope.append(hypergradient(game, case))))
    grown = resident() - before
    plain.append(timed(lambda: trained(game, case["steps"])))
    for _ in range(case["rounds"] - 1):
        taken.append(timed(lambda: hypergradient(game, case)))
        plain.append(timed(lambda: trained(game, case["steps"])))
    wall, cpu = (statistics.median(t[i] for t in taken) for i in (0, 1))
    ratio = statistics.median(t[1] / p[1] for t, p in zip(taken, plain, strict=True))
    counted = peak_bytes(lambda: hypergradient(game, case), torch.device("cpu")) if case["counted"] else None
    return {
        "resident": grown,
        "counted": counted,
        "wall": wall,
        "cpu": cpu,
        "plain_runs": ratio,
        "slope": slope[0].tolist(),
    }


def resident() -> int:
    """The most that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cases(quick: bool) -> list[Case]:
    few = [5, 10] if quick else [25, 50, 100]
    long = 40 if quick else 1000
    hidden = [64] if quick else [1024, 256]
    common: Case = {"leaders": 3, "hidden": hidden, "rounds": 1, "counted": True}
    found = [{**common, "how": "plain", "steps": long}]
    found += [{**common, "how": "all", "steps": k, "rounds": 2} for k in few]
    found += [{**common, "how": "segments", "steps": few[-1], "rounds": 2, "count": c} for c in (2, 5, None)]
    found += [{**common, "how": "segments", "steps": long}]
    budget = 12_000_000 if quick else 1_000_000_000
    found += [{**common, "how": "segments", "steps": long, "memory": budget, "counted": False}]
    for wide in [hidden] if quick else [hidden, [1260]]:
        for leaders in (1, 3, 10):
            found.append({**common, "how": "forward", "steps": few[-1] // 2, "leaders": leaders, "hidden": wide})
    found.append({**common, "how": "forward", "steps": few[-1]})
    return found


def main() -> None:
    """Run every case in a process of its own and write what it took."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path("memory.json"))
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--quick", action="store_true", help="a small network: under a minute")
    options.add_argument("--case", type=json.loads, help="one case, as JSON: its row is printed")
    chosen = options.parse_args()
    if chosen.case is not None:
        print(json.dumps(measured(chosen.case)))
        return
    torch.set_num_threads(chosen.threads)
    rows = []
    for case in cases(chosen.quick):
        told = json.dumps({**case, "threads": chosen.threads})
        done = subprocess.run(
            [sys.executable, __file__, "--case", told],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(chosen.threads)},
        )
        rows.append({**case, **json.loads(done.stdout)})
        print({k: v for k, v in rows[-1].items() if k != "slope"}, flush=True)
        # After each case: some take minutes.
        chosen.output.write_text(json.dumps({**head(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
