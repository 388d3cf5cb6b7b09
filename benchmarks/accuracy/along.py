"""How much work a hypergradient of a given accuracy takes along a leader's run, where solves know the ones before.

The three followers of run.py, at their optima at the places that Adam with steps of 0.05 takes the leader through. A
watched run tells how many iterations each solve takes to 1e-3 and to 1e-6, against solves to 1e-13; each run goes on
from its own, inexact solutions. Then it is timed with that many, all methods in turn, medians over the rounds. By hand:
plain conjugate gradients from 0, at the last place. "one iteration" rows are what a hypergradient costs that hardly
iterates at all: no way of iterating less is faster than that. Float64, one thread, CPU seconds.

    python benchmarks/accuracy/along.py --output docs/performance/along.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from methods import Oracle, Ours, by_hand, kinds
from problem import MOST, Problem, optimum, problems
from torch import Tensor

import bilevel as bl
from benchmarks.head import head

ERRORS = (1e-3, 1e-6)
Solver = Callable[[bl.ConjugateGradient], bl.linear.LinearSolver]


@dataclass(frozen=True)
class Method:
    """A preconditioner, and where solves start."""

    preconditioner: bl.linear.Preconditioner | None
    start: Solver = lambda solver: solver

    def solver(self, **options: object) -> bl.linear.LinearSolver:
        """With these options of the conjugate gradients."""
        return self.start(bl.ConjugateGradient(rtol=None, preconditioner=self.preconditioner, **options))  # type: ignore[arg-type]


def along(problem: Problem, steps: int) -> tuple[Problem, list[Tensor]]:
    """The problem at the places of Adam's run, and the hypergradients there."""
    x, y = (tensor.clone() for tensor in problem.places[0])
    x.requires_grad_()
    adam = torch.optim.Adam([x], lr=0.05)
    exact = Method(bl.linear.Diagonal(probes=50)).solver(max_steps=MOST)
    exact = replace(exact, rtol=1e-13)
    places, truths = [], []
    for _ in range(steps):
        places.append((x.detach().clone(), y))
        here = replace(problem, places=tuple(places[-1:]))
        truths.append(run(here, [exact])[0].slopes)
        x.grad = truths[-1].clone()
        adam.step()
        y = optimum(problem.follow, x.detach(), y)
    return replace(problem, places=tuple(places)), truths


@dataclass(frozen=True)
class Step:
    """One hypergradient `[m]`."""

    slopes: Tensor
    products: int
    seconds: float


def run(problem: Problem, solvers: Sequence[bl.linear.LinearSolver]) -> list[Step]:
    """A hypergradient at each place by each place's solver, from what the one before left."""
    place = 0
    known = bl.ClosedForm(lambda x: problem.places[place][1])
    state = bl.Implicit(known, tolerance=None, linear_solver=solvers[0]).init(problem.game)
    steps = []
    for place, solver in enumerate(solvers):
        response = bl.Implicit(known, tolerance=None, linear_solver=solver)
        x = problem.places[place][0].clone().requires_grad_()
        before = response.report(state).products
        began = time.process_time()
        y, state = response(problem.game, {"x": x}, state)
        (found,) = torch.autograd.grad(problem.lead(y), x)
        seconds = time.process_time() - began
        state = response.after_backward(state, y)
        steps.append(Step(found, response.report(state).products - before, seconds))
    return steps


def iterations(problem: Problem, method: Method, truths: list[Tensor], wanted: float) -> list[int]:
    """How many each place takes."""
    oracles = [Oracle(truth, (wanted,)) for truth in truths]
    run(problem, [method.solver(max_steps=MOST, stopping=oracle) for oracle in oracles])
    return [oracle.reached[wanted] for oracle in oracles]


def methods(problem: Problem) -> dict[str, Method]:
    """By name; where scales differ, only those that see to that."""
    chosen = {name: kind for name, kind in kinds(problem).items() if not isinstance(kind, bl.linear.Recycled)}
    if problem.name == "penalties over six decades":
        chosen = {"diagonal": chosen["diagonal"]}
    else:
        del chosen["diagonal"]
    found = {}
    for name, kind in chosen.items():
        found[", ".join(["ours, warm", *([name] if name else [])])] = Method(kind)
        found[", ".join(["ours, extrapolated", *([name] if name else [])])] = Method(kind, bl.linear.Extrapolated)
    return found


def main() -> None:
    """Make the runs, find each method's iterations, time them in turn, write JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--problem", action="append", help="one of them, or several; default all")
    options.add_argument("--quick", action="store_true", help="one problem, one round, four steps")
    options.add_argument("--output", type=Path, default=Path("along.json"))
    chosen = options.parse_args()
    if chosen.quick:
        chosen.problem, chosen.rounds, chosen.steps = ["nearly separable"], 1, 4
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for whole in problems(chosen.problem):
        problem, truths = along(whole, chosen.steps)
        last = replace(problem, places=(problem.places[-1],) * 2)
        counts: dict[tuple[str, float], list[int]] = {}
        plain = Ours(None, warm=False).iterations(last, truths[-1], ERRORS, MOST)
        for name, method in methods(problem).items():
            for wanted in ERRORS:
                counts[name, wanted] = iterations(problem, method, truths, wanted)
                print(f"{problem.name}, {name}, {wanted:g}: {counts[name, wanted]}", flush=True)
        cold = Ours(None, warm=False)
        taken: dict[tuple[str, float], list[list[Step]]] = {}
        for _ in range(chosen.rounds):
            for wanted in ERRORS:
                single = {
                    "by hand": by_hand(last, plain[wanted]),
                    "by hand, one iteration": by_hand(last, 1),
                    "ours, one iteration": cold(last, 1),
                }
                for name, found in single.items():
                    taken.setdefault((name, wanted), []).append([Step(*found)])
                for name, method in methods(problem).items():
                    each = [method.solver(max_steps=count) for count in counts[name, wanted]]
                    taken.setdefault((name, wanted), []).append(run(problem, each))
        for (name, wanted), rounds in taken.items():
            true = truths[-len(rounds[0]) :]
            errors = [float((s.slopes - t).norm() / t.norm()) for s, t in zip(rounds[0], true, strict=True)]
            seconds = [statistics.median(step.seconds for step in place) for place in zip(*rounds, strict=True)]
            rows.append(
                {"problem": problem.name, "method": name, "wanted": wanted, "errors": errors}
                | {"products": [step.products for step in rounds[0]], "seconds": seconds}
            )
            print(rows[-1], flush=True)
        report = {**head(), "rounds": chosen.rounds, "steps": chosen.steps, "rows": rows}
        chosen.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
