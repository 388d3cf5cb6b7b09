"""How many samples and seconds until |grad h|^2 <= 1e-8: the quadratics of `benchmarks/single_loop.py`.

SABA at two sizes of a batch and of a step, on problems of seeds 0 to 9: by the library, and written by hand in plain
torch, which is what a step costs without a library; one after the other on each problem. One step reads a batch of the
follower and one of the leader, and evaluates at that point all that it needs: samples are those read of the follower's
1,024, in passes. Seconds are the processor's, without what measures. The target is looked for every 16 steps.

`--rows FOLDER` writes the problems' numbers, so that `benchmarks/samples_peer.py` can solve the same ones by the
solvers of benchmark_bilevel; `--peers FILE` puts what it wrote into the same JSON.

    python -m benchmarks.samples --rows rows --output ours.json
    python benchmarks/samples_peer.py --repository benchmark_bilevel --rows rows --output peers.json
    python -m benchmarks.samples --ours ours.json --peers peers.json --output samples.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.head import head
from benchmarks.single_loop import SGD, Problem, quadratics
from bilevel.dynamics import VarianceReduced
from bilevel.variance import SAGA, VarianceReduction

TARGET = 1e-8
EVERY = 16


Method = Callable[[Problem, int, float, int, int], tuple[Any, str]]


def methods() -> list[tuple[str, int, float, Method]]:
    """By what, batch, step of all three, and the method."""
    settings = ((64, 0.3), (32, 0.2))
    library = partial(by_library, reduction=SAGA())
    return [
        (name, batch, step, method)
        for name, method in (("bilevel", library), ("plain torch", by_hand))
        for batch, step in settings
    ]


class Watch:
    """Looks for the target every 16 steps; what it took to come there, without the looking."""

    def __init__(self, problem: Problem) -> None:
        self._exact, self._looking, self._began = problem.exact, 0.0, time.process_time()
        self.steps, self.seconds, self.value = 0, 0.0, float("inf")

    def there(self, taken: int, x: Tensor) -> bool:
        """Whether the target is reached after so many steps."""
        if taken % EVERY == 0:
            now = time.process_time()
            self.steps, self.seconds = taken, now - self._began - self._looking
            self.value = float(self._exact(x).square().sum())
            self._looking += time.process_time() - now
        return self.value <= TARGET


def by_library(
    problem: Problem, batch: int, step: float, seed: int, steps: int, reduction: VarianceReduction
) -> tuple[Watch, str]:
    """A single loop by `solve`, until the target; and what the library said if it failed."""

    def measure(taken: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        if watch.there(taken, variables["x"]):
            raise bl.errors.StopRun

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        watch, told = Watch(problem), ""
        try:
            bl.solve(
                problem.game(batch),
                y=bl.SingleLoop(partial(SGD, lr=step), variance=reduction),
                optimizer=partial(SGD, lr=step),
                dynamics=VarianceReduced(reduction),
                steps=steps,
                callbacks=[measure],
                seed=seed,
            )
        except bl.BilevelError as error:
            told = str(error).splitlines()[0]
    return watch, told


def by_hand(problem: Problem, batch: int, step: float, seed: int, steps: int) -> tuple[Watch, str]:
    """SABA in plain torch, eager, until the target: what a step costs without a library."""
    generator = torch.Generator().manual_seed(seed)
    rows, leader_rows = problem.follower_rows.split(batch), problem.leader_rows.split(batch)
    follower, leader = Table(), Table()
    x, y = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in problem.sizes)
    v, watch, places = torch.zeros_like(y), Watch(problem), list[tuple[int, int]]()
    for taken in range(1, steps + 1):
        if not places:
            orders = (torch.randperm(len(all_rows), generator=generator).tolist() for all_rows in (rows, leader_rows))
            places = list(zip(*orders, strict=True))
        i, j = places.pop()
        (slope,) = torch.autograd.grad(problem.follow(x, y, rows[i]), y, create_graph=True)
        product, mixed = torch.autograd.grad(slope, (y, x), v)
        f_x, f_y = torch.autograd.grad(problem.lead(x, y, leader_rows[j]), (x, y))
        with torch.no_grad():
            slope, product, mixed = follower.corrected(i, [slope, product, mixed])
            f_x, f_y = leader.corrected(j, [f_x, f_y])
            y -= step * slope
            v = v - step * (product + f_y)
            x -= step * (f_x + mixed)
        if watch.there(taken, x.detach()):
            break
    return watch, ""


class Table:
    """SAGA's: what each batch said last, and the mean of it."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}
        self._mean = torch.zeros(())

    def corrected(self, place: int, parts: list[Tensor]) -> tuple[Tensor, ...]:
        """What a batch says now, less what it said last, plus the mean; in the first pass as it is."""
        now, before = torch.cat(parts), self._rows.get(place)
        self._rows[place] = now
        change = now - (self._mean if before is None else before)
        found = now if before is None else change + self._mean
        self._mean = self._mean + change / len(self._rows)
        return found.split([len(part) for part in parts])


def run(name: str, problem: Problem, batch: int, step: float, seed: int, method: Method) -> dict[str, Any]:
    """One run until the target, or 4,000 batches of 64."""
    watch, told = method(problem, batch, step, seed, 4000 * 64 // batch)
    passes = watch.steps * batch / problem.samples()
    failed = told or (None if watch.value <= TARGET else "did not reach the target")
    found = {"seconds": watch.seconds, "passes": passes, "value": watch.value, "failed": failed}
    return {"by": name, "method": "SABA", "batch": batch, "step size": step, "seed": seed, **found}


def main() -> None:
    """All methods on all problems."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--rows", type=Path, help="a folder to write the problems to")
    options.add_argument("--peers", type=Path, help="what `samples_peer.py` wrote")
    options.add_argument("--ours", type=Path, help="what this program wrote before; it is not run again")
    options.add_argument("--output", type=Path, default=Path("samples.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # the first one imports a second's worth of PyTorch, which is no step's
    content: dict[str, Any] = {**head("numpy"), "target": TARGET, "rows": []}
    if chosen.ours:
        content = json.loads(chosen.ours.read_text())
    for seed in range(0 if chosen.ours else chosen.seeds):
        problem = quadratics(seed)
        if chosen.rows:
            import numpy as np

            chosen.rows.mkdir(exist_ok=True)
            both = {"leader": problem.leader_rows.numpy(), "follower": problem.follower_rows.numpy()}
            np.savez(chosen.rows / f"{seed}.npz", **both)
        for name, batch, step, method in methods():
            row = run(name, problem, batch, step, seed, method)
            content["rows"].append(row)
            told = row["failed"] or f"{row['passes']:.1f} passes, {row['seconds']:.2f} s"
            print(f"seed {seed}  {name:<11} {batch} {step}  {told}", flush=True)
            chosen.output.write_text(json.dumps(content, indent=1))
    if chosen.peers:
        peers = json.loads(chosen.peers.read_text())
        rows = content["rows"]
        solved = {
            seed for seed in (row["seed"] for row in rows) if sum(row["seed"] == seed for row in rows) == len(methods())
        }
        both = [row for row in rows + peers["rows"] if row["seed"] in solved]  # on the same problems
        content |= {"peers": peers["versions"], "rows": both}
    chosen.output.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
