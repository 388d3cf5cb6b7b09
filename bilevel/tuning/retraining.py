"""Fresh trainings at fixed hyperparameters: what was found in a run, for models that begin anew."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from bilevel._printed import printed
from bilevel.errors import CheckpointError
from bilevel.game import Game
from bilevel.inner.torch_optim import build, build_scheduler
from bilevel.randomness import random_kept
from bilevel.solving.checkpoint import load, save
from bilevel.solving.description import Describer, differences
from bilevel.solving.identity import in_words
from bilevel.tree import Variables
from bilevel.tuning.tuned import TrainedOn, Tuned
from bilevel.workers import require_workers, side_by_side


def trained_on(tuned: Tuned, steps: int, seed: int) -> TrainedOn:
    """The run's own model trained for so many more steps at the values found, and again at the start's.

    An optimiser and a scheduler that begin anew, and the same draws, for both. Torch's random numbers are left as they
    are.
    """
    game, losses = tuned.tuning.game(), []
    try:
        for values in (tuned.hyper, tuned.start):
            with random_kept(start=seed):
                loss = tuned.tuning.loss_at(values)
                model = _train(tuned, game, copy.deepcopy(tuned.model), loss, steps, seed)
            with random_kept(start=seed):
                losses.append(_validate(tuned, game, model, values))
    finally:
        game.stop_reading()
    return TrainedOn(steps, *losses)


@final
@dataclass(frozen=True, eq=False)
class Retrained:
    """Fresh trainings at the hyperparameters found, and at those at the start.

    Attributes:
        found: The validation loss of each seed at the values found.
        start: The same at the start's, the same seeds.
        models: The trained models of the first, one a seed.
        plain: The same losses of the training loss as it is, with nothing around it; empty unless asked for.
    """

    found: tuple[float, ...]
    start: tuple[float, ...]
    models: tuple[nn.Module, ...] = field(repr=False)
    plain: tuple[float, ...] = ()

    @property
    def better(self) -> bool:
        """Whether the mean over the seeds is lower at the values found than of all that they were compared with."""
        others = [losses for losses in (self.start, self.plain) if losses]
        return statistics.fmean(self.found) < min(statistics.fmean(losses) for losses in others)

    def __str__(self) -> str:
        """A table, a row a seed."""
        from rich.table import Table  # noqa: PLC0415

        table = Table(title="Validation loss of fresh trainings")
        columns = {"nothing tuned": self.plain, "at the start's values": self.start, "at those found": self.found}
        columns = {name: losses for name, losses in columns.items() if losses}
        for name in ("seed", *columns):
            table.add_column(name, justify="right")
        for seed, losses in enumerate(zip(*columns.values(), strict=True)):
            table.add_row(str(seed), *(f"{loss:.4g}" for loss in losses))
        table.add_row("mean", *(f"{statistics.fmean(losses):.4g}" for losses in columns.values()))
        return printed(table)


def retrain(
    tuned: Tuned,
    *,
    seeds: int = 1,
    steps: int | None = None,
    make: Callable[[], nn.Module] | None = None,
    values: Mapping[str, Variables] | None = None,
    plain: bool = False,
    checkpoint: str | Path | None = None,
    jobs: int = 1,
    cluster: str | None = None,
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
        plain: Train with the training loss as it is as well. The start's values are not "nothing": a declaration begins
            with some smoothing or noise, which may be worse than none.
        checkpoint: A file that keeps each training as it ends; what it has is not done again. More `seeds` may follow.
        jobs: How many trainings go at once, in processes of one thread (joblib); -1: as many as there are cores.
        cluster: Train on a Ray cluster, by its address ("host:6379", "ray://host:10001", "auto"), or "local": one on
            this machine. As many at once as it has cores, or `jobs`. The file is written here.

    Raises:
        CheckpointError: For a file of other trainings: of other values, another length or another model.
        ImportError: For `jobs` without joblib, for `cluster` without Ray.
        ConnectionError: Where nobody answers at a cluster's address.
        ValueError: For a layer with parameters of its own that cannot be reset; then give `make`. Before any training
            for validation data that do not end; of data without a length one pass is read to know it. For `plain` with
            a training loss that has hyperparameters of its own.

    Costs 2 `seeds` trainings, with `plain` 3.
    """
    if seeds < 1:
        raise ValueError(f"retrain: seeds={seeds}; expected at least 1.")
    if plain:
        tuned.tuning.undeclared()  # refused before any work where there is none
    require_workers("retrain", jobs, cluster)
    count = tuned.plan.steps if steps is None else steps
    fresh = partial(_reset, tuned.model) if make is None else make
    given = {"found": tuned.hyper if values is None else values, "start": tuned.start}
    # At None, the training loss as it is.
    trained: dict[str, Mapping[str, Variables] | None] = {**given, **({"plain": None} if plain else {})}
    losses: dict[str, list[float]] = {which: [] for which in trained}
    models: list[nn.Module] = []
    game = tuned.tuning.game()
    game.require_end(tuned.tuning.leader, "retrain", read=True)
    kept = _Kept.of(None if checkpoint is None else Path(checkpoint), tuned, game, given, count)
    try:
        if jobs != 1 or cluster is not None:
            # Without the run, which nobody needs there, and which may be large.
            own = replace(tuned, solution=None)  # type: ignore[arg-type]
            todo = {
                f"{which} {seed}": partial(_afresh, own, fresh, at, count, seed, keep=which == "found")
                for seed in range(seeds)
                for which, at in trained.items()
                if f"{which} {seed}" not in kept.trainings
            }
            for index, ended in side_by_side(list(todo.values()), jobs=jobs, cluster=cluster if todo else None):
                kept.keep(list(todo)[index], ended)
        for seed in range(seeds):
            for which, at in trained.items():
                done = kept.trainings.get(f"{which} {seed}")
                if done is None:
                    model, loss = _one(tuned, game, fresh, at, count, seed)
                    done = {
                        "loss": loss,
                        "model": model.state_dict() if which == "found" else {},
                    }
                    kept.keep(f"{which} {seed}", done)
                elif which == "found":
                    with random_kept(start=seed):
                        model = fresh().eval()
                    model.load_state_dict(done["model"])
                losses[which].append(done["loss"])
                if which == "found":
                    models.append(model)
    finally:
        game.stop_reading()
    return Retrained(tuple(losses["found"]), tuple(losses["start"]), tuple(models), tuple(losses.get("plain", ())))


def _one(
    tuned: Tuned, game: Game, fresh: Callable[[], nn.Module], at: Mapping[str, Variables] | None, steps: int, seed: int
) -> tuple[nn.Module, float]:
    """A fresh model that was trained, and its validation loss."""
    training_loss = tuned.tuning.undeclared() if at is None else tuned.tuning.loss_at(at)
    with random_kept(start=seed):
        model = _train(tuned, game, fresh(), training_loss, steps, seed)
    with random_kept(start=seed):  # loaders that shuffle give all the same batches
        return model, _validate(tuned, game, model, tuned.start if at is None else at)


def _afresh(
    tuned: Tuned,
    fresh: Callable[[], nn.Module],
    at: Mapping[str, Variables] | None,
    steps: int,
    seed: int,
    *,
    keep: bool,
) -> dict[str, Any]:
    """What is kept of a training that is done in a process of its own."""
    game = tuned.tuning.game()
    try:
        model, loss = _one(tuned, game, fresh, at, steps, seed)
    finally:
        game.stop_reading()
    return {"loss": loss, "model": model.state_dict() if keep else {}}


@dataclass(frozen=True, eq=False)
class _Kept:
    """The trainings that have ended, by which values and seed, in a file where there is one."""

    path: Path | None
    identity: Mapping[str, Any]
    trainings: dict[str, dict[str, Any]]

    @staticmethod
    def of(
        path: Path | None, tuned: Tuned, game: Game, values: Mapping[str, Mapping[str, Variables]], steps: int
    ) -> _Kept:
        describer = Describer()
        identity = {
            "values": {which: describer.describe(at) for which, at in values.items()},
            "steps": steps,
            "model": describer.describe(tuned.model),
            "losses": {name: describer.describe(player.objective) for name, player in game.players.items()},
            "optimizer": Describer(list(tuned.model.parameters())).optimizer(tuned.optimizer),
            "clip_norm": tuned.clip_norm,
        }
        if path is None or not path.exists():
            return _Kept(path, identity, {})
        saved = load(path)
        if saved.get("identity") != identity:
            told = in_words(differences(saved.get("identity", {}), identity)) or "it is of something else"
            raise CheckpointError(
                f"retrain: {path} is a checkpoint of other trainings: {told}. Pass another checkpoint=, or delete it."
            )
        return _Kept(path, identity, dict(saved["trainings"]))

    def keep(self, name: str, training: dict[str, Any]) -> None:
        """One that has ended."""
        self.trainings[name] = training
        if self.path is not None:
            save(self.path, {"identity": dict(self.identity), "trainings": self.trainings})


def _train(
    tuned: Tuned, game: Game, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], steps: int, seed: int
) -> nn.Module:
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
        if tuned.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, tuned.clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model.eval()


@torch.no_grad()
def _validate(tuned: Tuned, game: Game, model: nn.Module, values: Mapping[str, Variables]) -> float:
    """The mean of the validation loss over one pass, whose batches come to where the model is."""
    loss, leader = tuned.tuning.valid_loss_at(values), tuned.tuning.leader
    losses = [loss(model, batch) for batch in game.whole_pass(leader, game.start(leader), "tune")]
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
