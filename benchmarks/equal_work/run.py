"""What the library costs on top of hand-written torch at equal work, beside other libraries.

One hypergradient by K unrolled steps of SGD with momentum, by K iterations of conjugate gradients, and by K terms of
the Neumann series, for followers of 7,850, a million and ten million weights. All methods take turns within a round;
ratios to the floor are medians over rounds of the ratio within a round. Peak memory is counted, in a pass of its own:
the bytes of all tensors alive at one time, without those that live before (JAX's are not seen). Float32, one thread.

    python benchmarks/equal_work/run.py --output docs/performance/equal_work.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from ours_and_hand import Run, hand, ours
from peers import flat, peers
from problem import Problem, problems

from benchmarks.head import head
from bilevel.comparison.memory import peak_bytes

KINDS = ("unroll", "cg", "neumann")


def row(problem: Problem, kind: str, *, rounds: int) -> list[dict[str, object]]:
    """Every method on one problem by one kind of derivative."""
    runs: dict[str, Run] = {"hand-written": hand(problem, kind)}
    if kind == "neumann":
        runs["bilevel, default step size"] = ours(problem, kind, defaults=True)
    runs["bilevel"] = ours(problem, kind)
    if kind != "unroll":
        runs["hand-written, residual measured"] = hand(problem, kind, measured=True)
    failures: dict[str, str] = {}
    for name, peer in peers().items():
        try:
            made = peer(problem, kind)
            if made is not None:
                made()
                runs[name] = made
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:200]
    truth = flat(runs["hand-written"]())
    off = {name: float((flat(run()) - truth).norm() / truth.norm()) for name, run in runs.items()}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    told: list[dict[str, object]] = []
    for name, run in runs.items():
        ratios = [mine / floor for mine, floor in zip(cpu[name], cpu["hand-written"], strict=True)]
        told.append(
            {
                "problem": problem.name,
                "kind": kind,
                "method": name,
                "work": getattr(problem, kind),
                "difference": off[name],
                "seconds": statistics.median(wall[name]),
                "cpu seconds": statistics.median(cpu[name]),
                "ratio": statistics.median(ratios),
                "least ratio": min(cpu[name]) / min(cpu["hand-written"]),
                "peak bytes": None if name == "jaxopt" else peak_bytes(run, torch.device("cpu")),
            }
        )
        print(f"{problem.name}, {kind}, {name}: {told[-1]}", flush=True)
    told += [{"problem": problem.name, "kind": kind, "method": name, "failure": f} for name, f in failures.items()]
    return told


def main() -> None:
    """Run the rounds and write what they took."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--problem", action="append", help="7,850 weights, 1M weights or 10M weights; default all")
    options.add_argument("--kind", action="append", choices=KINDS)
    options.add_argument("--output", type=Path, default=Path("equal_work.json"))
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")
    rows = []
    for problem in problems(chosen.problem):
        for kind in chosen.kind or KINDS:
            rows += row(problem, kind, rounds=chosen.rounds)
            whole = {
                **head("torchopt", "higher", "hypergrad", "boat-torch", "jaxopt"),
                "rounds": chosen.rounds,
                "rows": rows,
            }
            chosen.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
