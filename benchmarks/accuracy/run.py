"""How much work a hypergradient of a given accuracy takes, on followers that are hard to invert.

Three followers at their optimum (a penalty for each weight over six decades; a nearly separable logistic regression; a
network at a trained point), each at a leader's value and after a small step of it. One watched solve tells after how
many iterations a method's hypergradient is right to 1e-3 and to 1e-6, against a solve to 1e-13; then it is timed with
that many, all methods in turn, medians over the rounds. Plain conjugate gradients take as many iterations whoever
writes them: other libraries are given as many, and fail where their answer is then wrong. "settled" rows stop by their
own estimate. Float64, one thread, CPU seconds. Libraries that are not installed are left out.

    python benchmarks/accuracy/run.py --rounds 3 --output docs/performance/accuracy.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path

import torch
from methods import HypergradientTolerance, Method, Ours, by_hand, hypergrad, kinds, torchopt
from problem import MOST, Problem, problems
from torch import Tensor

import bilevel as bl
from benchmarks.head import head

ERRORS = (1e-3, 1e-6)


def installed() -> dict[str, Method]:
    """Other libraries."""
    found: dict[str, Method] = {}
    for name, method in (("hypergrad", hypergrad), ("torchopt", torchopt)):
        try:
            __import__(name)
            found[name] = method
        except ImportError:
            print(f"{name} is not installed, and is left out")
    return found


Chosen = dict[tuple[str, float], tuple[Method, int]]


def chosen_iterations(problem: Problem, truth: Tensor) -> tuple[Chosen, list[dict]]:
    """By method and accuracy: what to time, with how many iterations; and what failed."""
    found: Chosen = {}
    failed: list[dict] = []

    def keep(name: str, method: Method, reached: dict[float, int]) -> None:
        for wanted in ERRORS:
            if wanted in reached:
                found[name, wanted] = (method, reached[wanted])
            else:
                failed.append({"problem": problem.name, "method": name, "wanted": wanted, "failure": f"not in {MOST}"})
        print(f"{problem.name}, {name}: {reached}", flush=True)

    for kind, preconditioner in kinds(problem).items():
        for warm in (False, True):
            if not warm and isinstance(preconditioner, bl.linear.Recycled):
                continue  # a first solve has nothing to recycle
            method = Ours(preconditioner, warm=warm)
            name = ", ".join(["ours", *(["warm"] * warm), *([kind] if kind else [])])
            reached = method.iterations(problem, truth, ERRORS, MOST)
            keep(name, method, reached)
            if not kind and not warm:
                plain = reached
                keep("by hand", by_hand, plain)
            if "diagonal" in kind:
                for wanted in ERRORS:
                    found[f"{name}, settled", wanted] = (
                        HypergradientTolerance(preconditioner, warm=warm, wanted=wanted),
                        0,
                    )
    for name, method in installed().items():
        reached = {}
        for wanted in ERRORS:
            try:
                off = error(method(problem, plain[wanted])[0], truth)
                failure = "" if off <= 1.05 * wanted else f"error {off:.1e} after as many iterations"
            except Exception as raised:
                failure = f"{type(raised).__name__}: {raised}"[:200]
            if failure:
                failed.append({"problem": problem.name, "method": name, "wanted": wanted, "failure": failure})
                break
            reached[wanted] = plain[wanted]
        for wanted, iterations in reached.items():
            found[name, wanted] = (method, iterations)
        print(f"{problem.name}, {name}: {reached}", flush=True)
    return found, failed


def error(found: Tensor, truth: Tensor) -> float:
    """Relative."""
    return float((found - truth).norm() / truth.norm())


def main() -> None:
    """Find each method's iterations, time them in turn, write JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--problem", action="append", help="one of them, or several; default all")
    options.add_argument("--output", type=Path, default=Path("accuracy.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for problem in problems(chosen.problem):
        exact = bl.ConjugateGradient(rtol=1e-13, max_steps=MOST, preconditioner=bl.linear.Diagonal(probes=50))
        truth = Ours(None, warm=False).run(problem, exact)[0]
        found, failed = chosen_iterations(problem, truth)
        rows += failed
        taken: dict[tuple[str, float], list[float]] = {key: [] for key in found}
        last: dict[tuple[str, float], tuple[float, int]] = {}
        for _ in range(chosen.rounds):
            for key, (method, iterations) in found.items():
                slope, products, seconds = method(problem, iterations)
                taken[key].append(seconds)
                last[key] = error(slope, truth), products
        for (name, wanted), (off, products) in last.items():
            rows.append(
                {"problem": problem.name, "method": name, "wanted": wanted, "error": off, "products": products}
                | {"seconds": statistics.median(taken[name, wanted]), "all seconds": taken[name, wanted]}
            )
            print(f"{problem.name}, {name}, {wanted:g}: {rows[-1]}", flush=True)
        whole = {**head("torchopt", "hypergrad"), "rounds": chosen.rounds, "rows": rows}
        chosen.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
