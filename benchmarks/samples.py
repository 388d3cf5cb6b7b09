"""How many samples and seconds until |grad h|^2 <= 1e-8: the quadratics of `benchmarks/single_loop.py`.

The library's variance-reduced single loops at several sizes of a batch and of a step, on problems of seeds 0 to 9. One
step reads a batch of the follower and one of the leader, and evaluates at that point all that it needs: samples are
those read of the follower's 1,024, in passes. Seconds are the processor's, of `solve` without what measures. The
target is looked for every 16 steps.

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
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from benchmarks.head import head
from benchmarks.single_loop import SGD, Problem, quadratics
from bilevel.dynamics import VarianceReduced
from bilevel.variance import SAGA, VarianceReduction

TARGET = 1e-8
EVERY = 16


def methods() -> list[tuple[str, int, float, VarianceReduction]]:
    """Name, batch, step of all three, and what puts batches together."""
    return [("SABA", batch, step, SAGA()) for batch, step in ((64, 0.3), (32, 0.2))]


def run(
    problem: Problem, name: str, batch: int, step: float, reduction: VarianceReduction, seed: int
) -> dict[str, Any]:
    """One run until the target, or 4,000 batches of 64."""
    steps, value, measuring = 4000 * 64 // batch, float("inf"), 0.0
    last: dict[str, float] = {}

    def measure(taken: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        nonlocal value, measuring
        if taken % EVERY == 0:
            now = time.process_time()
            last.update(step=taken, seconds=now - began - measuring)
            value = float(problem.exact(variables["x"]).square().sum())
            if value <= TARGET:
                raise bl.errors.StopRun
            measuring += time.process_time() - now

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        began = time.process_time()
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
            failed = None if value <= TARGET else "did not reach the target"
        except bl.BilevelError as error:
            failed = str(error).splitlines()[0]
    passes = last.get("step", 0) * batch / problem.samples()
    found = {"seconds": last.get("seconds"), "passes": passes, "value": value, "failed": failed}
    return {"by": "bilevel", "method": name, "batch": batch, "step size": step, "seed": seed, **found}


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
        for name, batch, step, reduction in methods():
            row = run(problem, name, batch, step, reduction, seed)
            content["rows"].append(row)
            told = row["failed"] or f"{row['passes']:.1f} passes, {row['seconds']:.2f} s"
            print(f"seed {seed}  {name} {batch} {step}  {told}", flush=True)
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
