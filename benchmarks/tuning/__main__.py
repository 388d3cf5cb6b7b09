"""Tuning by hypergradients against black-box search: TPE, Hyperband, random, a grid. One core, one process.

    python -m benchmarks.tuning --choose --output docs/search/choice.json     # settings, on seeds that are not reported
    python -m benchmarks.tuning --output docs/search/results.json             # everything; --quick: one minute's worth
    python -m benchmarks.tuning --slopes --output docs/search/slopes.json     # `bl.search` on the ten, ten seeds

Needs Optuna (`pip install 'bilevel[benchmarks]'`). Each part is written as it finishes, as a line of a file beside the
output; the same command again goes on with the parts that are missing. Seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from benchmarks.head import head
from benchmarks.tuning.evaluations import SETTINGS, TPE_COMPRESSED, by_tpe, evaluated
from benchmarks.tuning.ours import FORGETFUL, Curve, Setting, settings, tuned
from benchmarks.tuning.problems import Problem, Weights, many, ten
from benchmarks.tuning.search import TRIALS, searched, seconds_to_suggest

PROBLEMS = {"ten": ten, "many": many}
SEARCHES, METHODS = ("TPE", "Hyperband", "random", "grid"), ("unrolled", "implicit", "hypernetwork")
LONGER, FORGETS = "unrolled, longer", "unrolled, forgetful"
"""Four times the budget of the others; and, for ten, a leader that forgets, its setting tried from more starts."""
OWN, START = "unrolled, own weights", "start"
"""A run of ours whose own weights are judged, and a training at the hyperparameters where all begin."""
SEEDS, CHOOSING = range(5), (100, 101)
STARTS = {"ten": (100, 101, 102, 103), "many": CHOOSING}
"""Where settings are tried from: ten, from each of these on either seed; many, from the seed's own."""
SLOPE_SEEDS = range(10)
"""The first five are those of the others."""
SHARE, LONG, POINTS = 20, 5, 9
"""Ours may spend a 20th of TPE's steps; all are judged after 5 times a trial's steps; a curve of ours has 9 points."""
CHOSEN = {
    ("ten", "unrolled"): Setting("unrolled", 10, 0.4),
    ("ten", "implicit"): Setting("implicit", 5, 0.2, 0.1),
    ("ten", "hypernetwork"): Setting("hypernetwork", 4, 0.2, 0.5),
    ("ten", FORGETS): Setting("unrolled", 20, 0.6, 0.0, *FORGETFUL),
    ("many", "unrolled"): Setting("unrolled", 5, 0.2),
    ("many", "implicit"): Setting("implicit", 5, 0.4, 0.1),
    ("many", "hypernetwork"): Setting("hypernetwork", 4, 0.2, 0.5),
}
"""By problem and method: the least mean validation loss of docs/search/choice.json with the usual betas, from each
seed's own start; the one that forgets, of all settings from all four starts."""


def started(problem: Problem, seed: int) -> Tensor:
    """Where everybody begins: uniform in the box; for many one decay for all, drawn so."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(10, generator=generator)
    return (place if problem.size == 10 else place[:1].expand(problem.size)).logit()


def told(problem: Problem, weights: Weights) -> dict[str, float]:
    """What weights are worth, on digits that they were not trained on."""
    with torch.no_grad():
        valid, test = (float(problem.loss(weights, part)) for part in (problem.digits.valid, problem.digits.test))
    return {"valid": valid, "test": test, "accuracy": problem.accuracy(weights, problem.digits.test)}


def worth(problem: Problem, values: Tensor, steps: int) -> dict[str, float]:
    """Hyperparameters after a training from scratch; `gradient` is the training loss's norm over that at the start."""
    weights, loss = problem.trained(values, steps), problem.prepared(values)

    def slope(at: dict[str, Tensor]) -> float:
        leaves = {name: w.detach().requires_grad_() for name, w in at.items()}
        return float(sum(g.square().sum() for g in torch.autograd.grad(loss(leaves), list(leaves.values()))).sqrt())

    return told(problem, weights) | {"gradient": slope(weights) / slope(problem.start)}


def improvements(curve: Curve) -> Curve:
    """The points at which a falling curve falls, and its last."""
    kept = [point for i, point in enumerate(curve) if i == 0 or point[2] < curve[i - 1][2] or i == len(curve) - 1]
    return [(work, round(seconds, 3), round(loss, 5)) for work, seconds, loss in kept]


def part(problem: Problem, method: str, seed: int, trials: int) -> dict[str, Any]:
    """One method on one problem and seed: its curve, and what it found is worth."""
    start = started(problem, seed)
    found: dict[str, Any] = {"failure": None}
    budget = problem.steps * max(trials // SHARE, 3) * (4 if method == LONGER else 1)
    if method == START:
        values = problem.values(start)
    elif method in SEARCHES:
        curve, values = searched(problem, start, method, seed, trials)
        found["curve"] = improvements(curve)
    else:
        setting = CHOSEN.get((problem.name, FORGETS if method == OWN else method), CHOSEN[problem.name, "unrolled"])
        if method == OWN:
            ours = tuned(problem, start, setting, budget=budget, points=1, seed=seed)
            found |= {"work": ours.work, "own": told(problem, ours.weights)}
        else:
            ours = tuned(problem, start, setting, budget=budget - problem.steps, points=POINTS, seed=seed)
            found["curve"] = [(work, round(seconds, 3), round(loss, 5)) for work, seconds, loss in ours.curve]
        values, found["failure"] = ours.values, ours.failure
    found["standard"] = worth(problem, values, problem.steps)
    found["converged"] = worth(problem, values, LONG * problem.steps)
    if problem.size == 10:
        found["values"] = values.tolist()
    elif method in ("grid", "unrolled"):
        # The rival of validation data that teach decays: the same data as training data. A penalty is a prior, whose
        # part in a mean over more digits is smaller.
        both = many(seed, both=True)
        more = len(both.digits.train) / len(problem.digits.train)
        found["both"] = worth(both, values - math.log(more), LONG * problem.steps)
    return found


def by_slopes(problem: Problem, method: str, seed: int, trials: int) -> dict[str, Any]:
    """One way of searching by whole hypergradients, or an ablation of it, on one seed; TPE's 100 trials beside it."""
    start, losses = started(problem, seed), list[float]()
    if method == "TPE":
        curve, values = searched(problem, start, method, seed, trials)
    elif method == TPE_COMPRESSED:
        curve, values, losses = by_tpe(problem, seed)
    else:
        curve, values, losses = evaluated(problem, start, SETTINGS[method], seed)
    return {
        "curve": improvements(curve),
        "standard": told(problem, problem.trained(values)),
        "values": values.tolist(),
        "compressed": [round(loss, 5) for loss in losses],
    }


def choose(problem: Problem, method: str, number: int, start: int, seed: int) -> dict[str, Any]:
    """One setting from one start on one seed: the validation loss at the end of the budget."""
    budget = problem.steps * TRIALS // SHARE - problem.steps
    setting = settings(problem.name, method)[number]
    work, _, loss = tuned(problem, started(problem, start), setting, budget=budget, points=1, seed=seed).curve[-1]
    return {"setting": asdict(setting), "valid": loss, "work": work}


def main() -> None:
    """Run what is missing and write it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("tuning.json"))
    options.add_argument("--seeds", type=int, default=None, help="how many of the five, or the ten")
    options.add_argument("--quick", action="store_true", help="one seed, six trials")
    options.add_argument("--choose", action="store_true", help="try the settings of our methods on seeds of their own")
    options.add_argument("--slopes", action="store_true", help="bl.search on the ten, its ablations and TPE")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # Optuna's, of its own insides
    trials = 6 if chosen.quick else TRIALS
    names: list[tuple[str, ...]] = []
    seeds = (CHOOSING if chosen.choose else SLOPE_SEEDS if chosen.slopes else SEEDS)[
        : 1 if chosen.quick else chosen.seeds
    ]
    for seed in seeds:
        if chosen.slopes:
            names += [("ten", method, str(seed)) for method in (*SETTINGS, TPE_COMPRESSED)]
            if seed not in SEEDS:  # of the others docs/search/results.json has it
                names.append(("ten", "TPE", str(seed)))
            continue
        for problem in PROBLEMS:
            if chosen.choose:
                names += [
                    (problem, method, str(i), str(start), str(seed))
                    for method in METHODS
                    for i in range(len(settings(problem, method)))
                    for start in STARTS[problem]
                    if start == seed or problem == "ten"
                ]
            else:
                ours = (*METHODS, LONGER, FORGETS) if problem == "ten" else (*METHODS, LONGER)
                names += [(problem, method, str(seed)) for method in (*ours, *SEARCHES, OWN, START)]

    def work(name: tuple[str, ...], problem: Problem) -> dict[str, Any]:
        if chosen.choose:
            return choose(problem, name[1], int(name[2]), int(name[3]), int(name[4]))
        if chosen.slopes:
            return by_slopes(problem, name[1], int(name[2]), trials)
        return part(problem, name[1], int(name[2]), trials)

    results = run(names, work, chosen.output.with_suffix(".jsonl"))
    written: dict[str, Any] = {**head("optuna", "numpy"), "trials": trials, "results": results}
    if chosen.slopes:
        written["settings"] = {name: asdict(setting) for name, setting in SETTINGS.items()}
    elif not chosen.choose:
        written["settings"] = {" ".join(key): asdict(setting) for key, setting in CHOSEN.items()}
        written["seconds to suggest"] = {str(n): seconds_to_suggest(n) for n in (10, 785 if chosen.quick else 7850)}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def run(
    names: list[tuple[str, ...]], work: Callable[[tuple[str, ...], Problem], dict[str, Any]], lines: Path
) -> dict[str, Any]:
    """The results by name, in the order of names; those that are in the file of lines are not made again."""
    lines.parent.mkdir(parents=True, exist_ok=True)
    kept = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
    found = {entry["name"]: entry["result"] for entry in kept}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    problems: dict[tuple[str, str], Problem] = {}
    with Progress(*columns, TimeRemainingColumn()) as bar, lines.open("a", encoding="utf-8") as file:
        task = bar.add_task("", total=len(names))
        for name in names:
            key, seed = " ".join(name), name[-1]
            bar.update(task, description=key)
            if key not in found:
                if (name[0], seed) not in problems:
                    problems = {(name[0], seed): PROBLEMS[name[0]](int(seed))}
                    # Nobody pays for what torch does only once in a process.
                    problems[name[0], seed].valid_loss(problems[name[0], seed].low, steps=2)
                found[key] = work(name, problems[name[0], seed])
                file.write(json.dumps({"name": key, "result": found[key]}) + "\n")
                file.flush()
            bar.advance(task)
    return {key: found[key] for key in (" ".join(name) for name in names)}


def best(results: dict[str, Any]) -> dict[tuple[str, str], Setting]:
    """The setting of least mean validation loss, for each problem and method of a file of choices."""

    def least(problem: str, method: str, counts: Callable[[Setting, str, str], bool]) -> Setting:
        tried = settings(problem, method)
        losses: list[list[float]] = [[] for _ in tried]
        for key, result in results.items():
            problem_, method_, number, start, seed = key.split(" ")
            if (problem_, method_) == (problem, method) and counts(tried[int(number)], start, seed):
                losses[int(number)].append(result["valid"])
        means = [statistics.fmean(of) if of else math.inf for of in losses]
        return tried[means.index(min(means))]

    usual = Setting("", 1, 1.0).memory
    found = {
        (problem, method): least(problem, method, lambda s, start, seed: s.memory == usual and start == seed)
        for problem in PROBLEMS
        for method in METHODS
    }
    return found | {("ten", FORGETS): least("ten", "unrolled", lambda s, start, seed: True)}


if __name__ == "__main__":
    main()
