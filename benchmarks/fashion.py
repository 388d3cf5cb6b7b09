"""One run of `bl.tune` on Fashion-MNIST beside TPE, Hyperband and ASHA: a network with BatchNorm, six strengths.

5,000 images, 1,000 for validation, the 10,000 test images; two convolutions; decay, dropout, smoothing, shift, rotation
and noise, all within the same ranges, and all begin with tune's start. The searches choose Adam's learning rate too
(1e-4 to 1e-2); one run keeps the usual 1e-3. Each may train for fifty whole trainings' steps, and is looked at twice:
when it has spent what the one run has, and at its end. Losses are of two fresh trainings each. Writes JSON; the same
command goes on with the parts that are missing.

    python -m benchmarks.fashion --data FOLDER --output docs/tuning/fashion.json

FOLDER has the four IDX files (Debian's package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from benchmarks.head import head
from benchmarks.jobs.parts import CHECK, RETRAINED, Parts, Row, advice, convolutions, loss, score, scored
from bilevel.files import write_whole
from bilevel.hyper import Tuning
from games.experiments.data import idx_digits

TRIALS, BATCH, STEPS, RATE = 50, 100, 1000, 1e-3
RATES = (1e-4, 1e-2)
RUNGS, REDUCTION = 20, 3
"""Hyperband and ASHA look after 20, 60 and 180 steps, and keep a third each time."""
MAKE = partial(convolutions, nn.BatchNorm2d)
HYPER = [
    bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing(),
    bl.hyper.Shift(), bl.hyper.Rotation(), bl.hyper.Noise(),
]  # fmt: skip
Loss = Callable[[nn.Module, Any], Tensor]
Point = tuple[Loss, float]
"""A training loss at fixed strengths, and a learning rate."""


def images(folder: Path, seed: int) -> Parts:
    """Drawn from the train files; the test images are all of the t10k files."""
    found = idx_digits(folder, train=5000, valid=1000, seed=seed)
    parts = (found.train, found.valid, found.test)
    return tuple(TensorDataset(part.images.reshape(-1, 1, 28, 28), part.labels) for part in parts)  # type: ignore[return-value]


def training(point: Point, data: TensorDataset, seed: int) -> Iterator[nn.Module]:
    """A fresh model, step by step."""
    at, rate = point
    torch.manual_seed(seed)
    model, done = MAKE(), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    while done < STEPS:
        for batch in DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True):
            model.train()
            optimizer.zero_grad()
            at(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            yield model
            if done == STEPS:
                return


def fresh(point: Point, data: Parts, seed: int, began: float) -> Row:
    """Losses of some fresh trainings."""
    models = []
    for number in range(RETRAINED):
        *_, model = training(point, data[0], 100 * seed + number)
        models.append(model.eval())
    return scored(models, data, began)


def run(data: Parts, seed: int, check: float) -> tuple[bl.tuning.Tuned, list[str]]:
    """`tune` with its defaults, and the library's warnings."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bl.BilevelWarning)
        tuned = bl.tune(
            MAKE(),
            loss,
            loss,
            DataLoader(data[0], batch_size=BATCH, shuffle=True, drop_last=True),
            DataLoader(data[1], batch_size=500),
            hyper=HYPER,
            optimizer=partial(torch.optim.Adam, lr=RATE),
            steps=STEPS,
            seed=seed,
            check=check,
        )
    return tuned, [str(w.message) for w in caught if issubclass(w.category, bl.BilevelWarning)]


def one_run(data: Parts, seed: int) -> Row:
    """One run: its own model, fresh trainings at the values found and at the start's."""
    began = time.process_time()
    tuned, _ = run(data, seed, check=0.0)
    row: Row = {"one run": {**scored([tuned.model], data, began), "steps": tuned.history[-1]["gradients"]}}
    row["one run"]["hyper"] = tuned.numbers
    for name, values in (("found", tuned.hyper), ("start", tuned.start)):
        row[name] = fresh((tuned.tuning.loss_at(values), RATE), data, seed, time.process_time())
    row["default"] = fresh((loss, RATE), data, seed, time.process_time())
    return row


def checked(data: Parts, seed: int) -> Row:
    """The same run once more, with its check."""
    began = time.process_time()
    tuned, told = run(data, seed, check=CHECK)
    return {"check": {**advice(tuned, began), "warnings": told}}


def search(method: str, data: Parts, seed: int, budget: int) -> Row:
    """The best when `budget` steps were spent, and when fifty trainings' were."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    samplers, pruners = optuna.samplers, optuna.pruners
    sampler, pruner = {
        "TPE": (samplers.TPESampler(seed=seed), pruners.NopPruner()),
        "Hyperband": (samplers.TPESampler(seed=seed), pruners.HyperbandPruner(RUNGS, STEPS, REDUCTION)),
        "ASHA": (samplers.RandomSampler(seed=seed), pruners.SuccessiveHalvingPruner(RUNGS, REDUCTION)),
    }[method]
    batch = [tuple(part[:BATCH] for part in data[0].tensors)]
    tuning = Tuning(MAKE(), loss, loss, batch, batch, hyper=HYPER)
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name=f"{method} {seed}")
    shares = {
        f"{name}.{i}": float(leaf.inverse(leaf.tensor()).sigmoid())  # a share of its range, as tune counts it
        for name, declared in tuning.init.items()
        for i, leaf in enumerate(bl.tree.leaves(declared))
    }
    study.enqueue_trial({**shares, "rate": RATE})
    spent, best, curve, began = 0, math.inf, [], time.process_time()
    row: Row = {}

    def point(parameters: dict[str, float]) -> Point:
        values, place = {}, iter([parameters[name] for name in shares])
        for name, declared in tuning.init.items():
            values[name] = bl.tree.map_leaves(lambda leaf: leaf.natural(torch.tensor(next(place)).logit()), declared)
        return tuning.loss_at(values), parameters["rate"]

    while spent < TRIALS * STEPS:
        trial = study.ask()
        parameters = {name: trial.suggest_float(name, 1e-4, 1.0 - 1e-4) for name in shares}
        parameters["rate"] = trial.suggest_float("rate", *RATES, log=True)
        steps, state = 0, None
        for model in training(point(parameters), data[0], 100 * seed + 50):
            steps += 1
            if method != "TPE" and steps in (RUNGS, RUNGS * REDUCTION, RUNGS * REDUCTION**2):
                trial.report(score(model, data[1]), steps)
                if trial.should_prune():
                    state = optuna.trial.TrialState.PRUNED
                    break
        value = score(model, data[1])
        if spent <= budget < spent + steps and curve:  # this one would end after the budget
            row[f"{method}, the steps of one run"] = dict(curve[-1])
        spent += steps
        study.tell(trial, None if state else value, state=state)
        if state is None and value < best:
            best = value
            curve.append({"parameters": parameters, "at": spent, "trials": trial.number + 1, "value": value})
    row[method] = {**curve[-1], "trials": trial.number + 1, "steps": spent}
    row[method]["curve"] = [(found["at"], found["value"]) for found in curve]
    seconds = time.process_time() - began
    for found in row.values():
        found |= fresh(point(found["parameters"]), data, seed, time.process_time())
    row[method]["search seconds"] = seconds
    return row


def main() -> None:
    """Measure all, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    if options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    for seed in range(options.seeds):
        data = images(options.data, seed)
        row = next((row for row in rows if row["seed"] == seed), None)
        if row is None:
            row = {"seed": seed}
            rows.append(row)
        for name in ("one run", "check", "TPE", "Hyperband", "ASHA"):
            if name not in row:
                ours = {"one run": one_run, "check": checked}
                found = ours[name] if name in ours else partial(search, name, budget=row["one run"]["steps"])
                row |= found(data, seed)
                document = {**head("optuna"), "trials": TRIALS, "steps": STEPS, "rows": rows}
                write_whole(options.output, (json.dumps(document, indent=1) + "\n").encode())
                print(seed, {k: v.get("test") for k, v in row.items() if isinstance(v, dict)}, flush=True)


if __name__ == "__main__":
    main()
