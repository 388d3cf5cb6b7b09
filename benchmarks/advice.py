"""Which check tells what a fresh training is worth: after runs of `bl.tune`, and at which cost.

Each job is tuned once a split. Then fresh models are trained at the values found, at the start's and with nothing
tuned, three initialisations each, and validated after an eighth, a quarter, a half and all of the steps. Other checks
beside these: to train on from the run's own weights, and fewer steps at a rate that is as many times larger. Each
initialisation is once the check, and the other two are the truth. Writes JSON after each run; the same command goes on.

    python -m benchmarks.advice --fashion FOLDER --output docs/tuning/advice.json

FOLDER has the four IDX files of Fashion-MNIST; without it that job is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from benchmarks import fashion
from benchmarks.head import head
from benchmarks.jobs import loop
from benchmarks.jobs.parts import Parts, digits, loss, score
from benchmarks.jobs.tuned import AUGMENTATION, TRAININGS, Training
from bilevel.files import write_whole
from games.experiments.data import scikit_digits

SEEDS, MARKS, FAST = 3, (0.125, 0.25, 0.5, 1.0), (2, 4, 8)
SCHEDULED = "a loop of one's own, 300 digits"
Loss = Callable[[nn.Module, Any], Tensor]


def small_digits(seed: int) -> Parts:
    """Scikit-learn's, of 8 x 8 pixels."""
    found = scikit_digits(train=300, valid=500, test=997, seed=seed)
    parts = (found.train, found.valid, found.test)
    return tuple(TensorDataset(part.images.reshape(-1, 1, 8, 8), part.labels) for part in parts)  # type: ignore[return-value]


def small_network() -> nn.Module:
    """Two convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def jobs(folder: Path | None) -> dict[str, Training]:
    """By name."""
    found = {"augmentation, 300 digits of 8 x 8": Training(small_network, small_digits, AUGMENTATION, 30, 600)}
    if folder is not None:
        found["Fashion-MNIST"] = Training(
            fashion.MAKE, partial(fashion.images, folder), fashion.HYPER, fashion.BATCH, fashion.STEPS, fashion.RATE
        )
    found |= TRAININGS
    return found | {SCHEDULED: Training(loop.network, partial(digits, 300), loop.HYPER, 30, 600, 3e-3)}


def validated(
    job: Training,
    model: nn.Module,
    at: Loss,
    data: Parts,
    seed: int,
    marks: Sequence[int],
    *,
    rate: float,
    clipped: bool,
) -> tuple[list[float], float]:
    """The validation loss after each mark's steps, and the test loss at the last. The same draws for the same seed."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    scheduler = CosineAnnealingLR(optimizer, marks[-1]) if clipped else None
    order = torch.Generator().manual_seed(seed)
    done, losses = 0, []
    while done < marks[-1]:
        for batch in DataLoader(data[0], batch_size=job.batch, shuffle=True, generator=order):
            model.train()
            optimizer.zero_grad()
            at(model, batch).backward()  # type: ignore[no-untyped-call]
            if scheduler is not None:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            done += 1
            if done in marks:
                losses.append(score(model, data[1]))
            if done == marks[-1]:
                break
    return losses, score(model, data[2])


def measured(name: str, job: Training, split: int) -> dict[str, Any]:
    """One run of `tune`, and what each check and each truth sees of it."""
    train, valid, test = data = job.data(split)
    torch.manual_seed(split)
    model, clipped = job.make(), name == SCHEDULED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        tuned = bl.tune(
            model, loss, loss, DataLoader(train, batch_size=job.batch, shuffle=True), DataLoader(valid, batch_size=500),
            hyper=job.hyper, optimizer=job.optimizer, steps=job.steps, seed=split, check=0.0,
            scheduler=partial(CosineAnnealingLR, T_max=job.steps) if clipped else None,
            clip_norm=1.0 if clipped else None,
        )  # fmt: skip
    losses = {"found": tuned.tuning.loss_at(tuned.hyper), "start": tuned.tuning.loss_at(tuned.start), "plain": loss}
    row: dict[str, Any] = {"job": name, "split": split, "hyper": tuned.numbers}
    row |= {"run": score(tuned.model, test)}
    row |= {
        key: {which: [] for which in losses} for key in ("curve", "test", "on", *(f"fast {times}" for times in FAST))
    }
    marks = [round(share * job.steps) for share in MARKS]
    for seed in range(SEEDS):
        for which, at in losses.items():
            run = partial(validated, job, at=at, seed=100 * split + seed, rate=job.rate, clipped=clipped)

            def fresh() -> nn.Module:
                torch.manual_seed(100 * split + seed)  # noqa: B023 - called in this pass
                return job.make()

            curve, tested = run(model=fresh(), data=data, marks=marks)
            row["curve"][which].append(curve)
            row["test"][which].append(tested)
            row["on"][which] += run(model=copy.deepcopy(tuned.model), data=data, marks=marks[:1])[0]
            for times in FAST:
                fewer = [round(job.steps / times)]
                row[f"fast {times}"][which] += run(model=fresh(), data=data, marks=fewer, rate=times * job.rate)[0]
    return row


def main() -> None:
    """Measure all, and write after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    for split in range(options.splits):
        for name, job in jobs(options.fashion).items():
            if options.only and not any(part in name for part in options.only):
                continue
            if any((row["job"], row["split"]) == (name, split) for row in rows):
                continue
            rows.append(measured(name, job, split))
            write_whole(
                options.output, (json.dumps({**head(), "marks": MARKS, "rows": rows}, indent=1) + "\n").encode()
            )
            told = {which: sum(losses) / len(losses) for which, losses in rows[-1]["test"].items()}
            print(name, split, rows[-1]["run"], told, flush=True)


if __name__ == "__main__":
    main()
