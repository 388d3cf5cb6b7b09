"""A loop of one's own, with a schedule and clipped gradients: the two programs of `own/`, and what the second adds."""

from __future__ import annotations

import difflib
import runpy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import bilevel as bl
from benchmarks.jobs.parts import RETRAINED, TRIALS, Job, Row, advice, best_of, convolutions, digits, loss, scored
from benchmarks.jobs.tuned import random_values
from bilevel.hyper import Tuning

FOLDER = Path(__file__).resolve().parent / "own"
EPOCHS = 60
HYPER = [bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing(), bl.hyper.Rotation()]


def lines_added() -> int:
    """Lines of the second program that the first does not have, without empty ones."""
    before, after = ((FOLDER / name).read_text(encoding="utf-8").splitlines() for name in ("before.py", "after.py"))
    return sum(line.startswith("+ ") and bool(line[2:].strip()) for line in difflib.ndiff(before, after))


def program(name: str, seed: int) -> dict[str, Any]:
    """The names of one of the programs after it ran."""
    kept, sys.argv = sys.argv, [name, str(seed)]
    try:
        return runpy.run_path(str(FOLDER / name))
    finally:
        sys.argv = kept


def network() -> nn.Module:
    """That of the programs."""
    return convolutions(partial(nn.GroupNorm, 4))


def trained(training: Callable[[nn.Module, Any], Tensor], seed: int, *, split: int) -> nn.Module:
    """The loop of before.py with another loss."""
    torch.manual_seed(seed)
    model, loader = network(), DataLoader(digits(300, split)[0], batch_size=30, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            training(model, batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    return model


def default(seed: int) -> Row:
    """Her program."""
    began = time.process_time()
    return {"default": scored([program("before.py", seed)["model"]], digits(300, seed), began)}


def found(seed: int) -> Row:
    """With the library, and fresh trainings at what it found."""
    data, began = digits(300, seed), time.process_time()
    tuned = program("after.py", seed)["tuned"]
    told: Row = {"the run itself": scored([tuned.model], data, began), "hyper": tuned.numbers, "lines": lines_added()}
    for name, values in (("found", tuned.hyper), ("start", tuned.start)):
        began, at = time.process_time(), tuned.tuning.loss_at(values)
        told[name] = scored([trained(at, 100 * seed + i, split=seed) for i in range(RETRAINED)], data, began)
    return told


def checked(seed: int) -> Row:
    """The program once more: which values it advises, and what it warns of."""
    began = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bl.BilevelWarning)
        tuned = program("after.py", seed)["tuned"]
    told = [str(w.message) for w in caught if issubclass(w.category, bl.BilevelWarning)]
    return {"check": advice(tuned, began), "warnings": told}


def random(seed: int) -> Row:
    """The best of ten."""
    generator = torch.Generator().manual_seed(seed)
    tuning = Tuning(network(), loss, loss, None, None, hyper=HYPER)
    losses = [tuning.loss_at(random_values(tuning.init, generator)) for _ in range(TRIALS)]
    return {"random": best_of([partial(trained, at, split=seed) for at in losses], digits(300, seed), seed)}


JOB = Job("a loop of one's own, 300 digits", {"default": default, "found": found, "check": checked, "random": random})
