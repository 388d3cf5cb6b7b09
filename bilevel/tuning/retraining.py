"""Fresh trainings at fixed hyperparameters: what was found in a run, for models that begin anew."""

from __future__ import annotations

import copy
import io
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import nn

from bilevel.game import Game
from bilevel.inner.torch_optim import build, build_scheduler
from bilevel.randomness import random_kept
from bilevel.tree import Variables
from bilevel.tuning.tuned import Tuned


@final
@dataclass(frozen=True, eq=False)
class Retrained:
    """Fresh trainings at the hyperparameters found, and at those at the start.

    Attributes:
        found: The validation loss of each seed at the values found.
        start: The same at the start's, the same seeds.
        models: The trained models of the first, one a seed.
    """

    found: tuple[float, ...]
    start: tuple[float, ...]
    models: tuple[nn.Module, ...] = field(repr=False)

    @property
    def better(self) -> bool:
        """Whether the mean over the seeds is lower at the values found."""
        return statistics.fmean(self.found) < statistics.fmean(self.start)

    def __str__(self) -> str:
        """A table, a row a seed."""
        from rich.console import Console  # noqa: PLC0415 - only where something is printed
        from rich.table import Table  # noqa: PLC0415

        table = Table(title="Validation loss of fresh trainings")
        for column in ("seed", "at the start's values", "at those found"):
            table.add_column(column, justify="right")
        for seed, (before, after) in enumerate(zip(self.start, self.found, strict=True)):
            table.add_row(str(seed), f"{before:.4g}", f"{after:.4g}")
        table.add_row("mean", f"{statistics.fmean(self.start):.4g}", f"{statistics.fmean(self.found):.4g}")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return text.getvalue().rstrip()


def retrain(
    tuned: Tuned,
    *,
    seeds: int = 1,
    steps: int | None = None,
    make: Callable[[], nn.Module] | None = None,
    values: Mapping[str, Variables] | None = None,
) -> Retrained:
    """Train fresh models at the hyperparameters that a run of `tune` has found, and at those that it started from.

    In the run they changed while the weights were trained: a decay that is right late may be wrong for a model that
    begins. This tells what they are worth by themselves. Each seed has one initialisation, and one set of draws, for
    both. The mean validation loss over the whole of the validation data is compared.

    Args:
        tuned: What `tune` gave.
        seeds: How many.
        steps: Training steps; default: as many as in the run.
        make: Makes a fresh model; default: a copy of the given one, each of whose layers is asked to
            `reset_parameters()`.
        values: Others than those found.

    Raises:
        ValueError: For a layer with parameters of its own that cannot be reset; then give `make`.

    Costs 2 `seeds` trainings.
    """
    if seeds < 1:
        raise ValueError(f"retrain: seeds={seeds}; expected at least 1.")
    count = tuned.plan.steps if steps is None else steps
    fresh = partial(_reset, tuned.model) if make is None else make
    given = {"found": tuned.hyper if values is None else values, "start": tuned.start}
    losses: dict[str, list[float]] = {"found": [], "start": []}
    models: list[nn.Module] = []
    game = tuned.tuning.game()
    try:
        for seed in range(seeds):
            for which, at in given.items():
                with random_kept(start=seed):
                    model = _train(tuned, game, fresh(), at, count, seed)
                losses[which].append(_validate(tuned, game, model, at))
                if which == "found":
                    models.append(model)
    finally:
        game.stop_reading()
    return Retrained(tuple(losses["found"]), tuple(losses["start"]), tuple(models))


def _train(
    tuned: Tuned, game: Game, model: nn.Module, values: Mapping[str, Variables], steps: int, seed: int
) -> nn.Module:
    loss = tuned.tuning.loss_at(values)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build(tuned.optimizer, parameters, None, [n for n, p in model.named_parameters() if p.requires_grad])
    scheduler = None if tuned.scheduler is None else build_scheduler(tuned.scheduler, optimizer, None)
    model.train()
    position = game.start(tuned.tuning.follower, seed)
    for _ in range(steps):
        batch, position = game.draw(tuned.tuning.follower, position)
        optimizer.zero_grad()
        value = loss(model, batch)
        if not math.isfinite(float(value.detach())):
            break  # its validation loss will tell
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model.eval()


@torch.no_grad()
def _validate(tuned: Tuned, game: Game, model: nn.Module, values: Mapping[str, Variables]) -> float:
    """The mean of the validation loss over one pass, whose batches come to where the model is."""
    loss, leader = tuned.tuning.valid_loss_at(values), tuned.tuning.leader
    losses = [loss(model, batch) for batch in game.whole_pass(leader, game.start(leader))]
    return statistics.fmean(float(loss) for loss in losses)


def _reset(model: nn.Module) -> nn.Module:
    """A copy with fresh parameters."""
    fresh = copy.deepcopy(model)
    for path, part in fresh.named_modules():
        own = [name for name, p in part.named_parameters(recurse=False) if p.requires_grad]
        reset: Any = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        elif own:
            raise ValueError(
                f"retrain: {path or 'the model'} ({type(part).__name__}) has {own} and no reset_parameters(). Give "
                "make=, a function that makes a fresh model."
            )
        elif callable(getattr(part, "reset_running_stats", None)):
            part.reset_running_stats()
    return fresh
