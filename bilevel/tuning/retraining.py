"""Fresh trainings at fixed hyperparameters: what was found in a run, for models that begin anew."""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.errors import CheckpointError
from bilevel.game import Game
from bilevel.hyper import Tuning
from bilevel.inner.torch_optim import OptimizerFactory, build, build_scheduler
from bilevel.parallel.agreement import glanced
from bilevel.randomness import random_kept
from bilevel.solving.checkpoint import load, save
from bilevel.solving.description import Describer, differences
from bilevel.solving.history import Record
from bilevel.solving.identity import in_words
from bilevel.solving.progress import progress_bar
from bilevel.tree import Variables
from bilevel.tuning.retrained import TOLD, Retrained
from bilevel.tuning.tuned import Tuned
from bilevel.workers import require_workers, side_by_side


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
    require_workers("retrain", jobs, cluster)
    at = {"found": tuned.hyper if values is None else values, "start": tuned.start, **({"plain": {}} if plain else {})}
    for chosen in at.values():
        tuned.tuning.loss_at(chosen)  # refused before any work where there is none
    fresh = partial(_reset, tuned.model) if make is None else make
    game = tuned.tuning.game()
    game.require_end(tuned.tuning.leader, "retrain", read=True)
    trainings = _Trainings(tuned, fresh, at, tuned.plan.steps if steps is None else steps)
    kept = _Kept.of(None if checkpoint is None else Path(checkpoint), trainings, game)
    try:
        if jobs != 1 or cluster is not None:
            # Without the run, which nobody needs there, and which may be large.
            own = replace(trainings, tuned=replace(tuned, solution=None))  # type: ignore[arg-type]
            todo = {
                f"{which} {seed}": partial(own.alone, which, seed)
                for seed in range(seeds)
                for which in at
                if f"{which} {seed}" not in kept.trainings
            }
            for index, ended in side_by_side(list(todo.values()), jobs=jobs, cluster=cluster if todo else None):
                kept.keep(list(todo)[index], ended)
        return trainings.all(game, range(seeds), kept)
    finally:
        game.stop_reading()


def require_rate(optimizer: OptimizerFactory, model: nn.Module) -> None:
    """Raise `ValueError` for an optimiser whose rate is not its groups' "lr", so that it cannot be made larger."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for group in build(optimizer, list(named.values()), None, list(named)).param_groups:
        if not isinstance(group.get("lr"), float | int | Tensor):
            raise ValueError(
                "tune: check= below 1 trains in fewer steps at a larger rate, and the optimiser's groups have "
                f"lr={group.get('lr')!r}; expected a number. Pass check=1.0, whole trainings, or check=0."
            )


def checked(
    tuned: Tuned, model: nn.Module, share: float, seed: int, checkpoint: Path | None, *, progress: bool
) -> Retrained:
    """What `tune` makes of the values that it found: fresh trainings of this share of its steps, one at each.

    They begin at the model's own weights. Where steps are fewer the rate is as many times larger, so that the weights
    go about as far. The global random numbers of torch, NumPy and Python begin alike for each, and are left as they
    were.
    """
    game, steps = tuned.tuning.game(), max(1, round(share * tuned.plan.steps))
    at = {"found": tuned.hyper, "start": tuned.start, **({"plain": {}} if tuned.tuning.all_declared else {})}
    try:
        with progress_bar(progress, 0, steps * len(at)) as show:
            trainings = _Trainings(
                tuned,
                partial(copy.deepcopy, model),
                at,
                steps,
                speed=tuned.plan.steps / steps,
                keeps=False,
                show=show,
            )
            return trainings.all(game, [seed], _Kept.of(checkpoint, trainings, game, anew=True))
    finally:
        game.stop_reading()


def _unseen(record: Record) -> None:
    """Nobody looks on."""


@dataclass(frozen=True, eq=False)
class _Trainings:
    """Fresh trainings at several values.

    Attributes:
        tuned: The run.
        fresh: Makes a model.
        values: By name.
        steps: Of each training.
        speed: How many times larger the rate is.
        keeps: Whether the models that were trained at the values found are kept.
        show: Is told of each step.
    """

    tuned: Tuned
    fresh: Callable[[], nn.Module]
    values: Mapping[str, Mapping[str, Variables]]
    steps: int
    speed: float = 1.0
    keeps: bool = True
    show: Callable[[Record], None] = _unseen

    def all(self, game: Game, seeds: Sequence[int], kept: _Kept) -> Retrained:
        """Those that are not kept yet are done, one after the other."""
        losses: dict[str, list[float]] = {which: [] for which in self.values}
        models: list[nn.Module] = []
        read: set[tuple[int, int]] = set()
        for seed in seeds:
            for which in self.values:
                done = kept.trainings.get(f"{which} {seed}")
                if done is None:
                    model, done = self.one(game, which, seed, before=self.steps * len(kept.trainings))
                    kept.keep(f"{which} {seed}", done)
                elif done["model"]:
                    with _begun_at(seed, game.device):
                        model = self.fresh().eval()
                    model.load_state_dict(done["model"])
                losses[which].append(done["loss"])
                if done["read"] is not None:
                    read.add((seed, done["read"]))
                if done["model"]:
                    models.append(model)
        found, start, plain = (tuple(losses.get(which, ())) for which in ("found", "start", "plain"))
        alike = len(read) == len({seed for seed, _ in read})
        return Retrained(
            found, start, tuple(models), plain, values=self.values, steps=self.steps, speed=self.speed, alike=alike
        )

    def one(self, game: Game, which: str, seed: int, before: int = 0) -> tuple[nn.Module, dict[str, Any]]:
        """A model that was trained, and what is kept of it; `before` it others have taken so many steps."""
        at, tuning = self.values[which], self.tuned.tuning
        game.stop_reading()  # batches that are remembered would be drawn by no generator
        with _begun_at(seed, game.device):
            model, read = self._train(game, tuning.loss_at(at), seed, which, before)
        with _begun_at(seed, game.device):  # loaders that shuffle give all the same batches
            loss = _validate(game, tuning, model, at)
        kept = model.state_dict() if self.keeps and which == "found" else {}
        return model, {"loss": loss, "model": kept, "read": read}

    def alone(self, which: str, seed: int) -> dict[str, Any]:
        """What is kept of a training that is done in a process of its own."""
        game = self.tuned.tuning.game()
        try:
            return self.one(game, which, seed)[1]
        finally:
            game.stop_reading()

    def _train(
        self, game: Game, loss: Callable[[nn.Module, Any], Tensor], seed: int, which: str, before: int
    ) -> tuple[nn.Module, int | None]:
        """The model, and a number by which all of its batches are known; None where it ended early."""
        tuned, model = self.tuned, self.fresh()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = build(tuned.optimizer, list(named.values()), None, list(named))
        scheduler = None if tuned.scheduler is None else build_scheduler(tuned.scheduler, optimizer, None)
        model.train()
        read: int | None = 0
        position = game.start(tuned.tuning.follower, seed)
        for step in range(1, self.steps + 1):
            batch, position = game.draw(tuned.tuning.follower, position)
            read = (31 * (read or 0) + glanced(batch)) % 2**62
            optimizer.zero_grad()
            value = loss(model, batch)
            number = float(value.detach())
            if not math.isfinite(number):
                read = None
                break  # its validation loss will tell
            value.backward()  # type: ignore[no-untyped-call]
            if tuned.clip_norm is not None:
                nn.utils.clip_grad_norm_(named.values(), tuned.clip_norm)
            with _sped(optimizer, self.speed):
                optimizer.step()
            if scheduler is not None:
                for _ in range(round(step * self.speed) - round((step - 1) * self.speed)):
                    scheduler.step()
            self.show({"step": before + step, f"a fresh training {TOLD[which]}": number})
        return model.eval(), read


@contextmanager
def _begun_at(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers begin at a seed, of NumPy and Python too, which data may draw from; then all go on."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global ones are meant
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        with random_kept(device, start=seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _sped(optimizer: torch.optim.Optimizer, speed: float) -> Iterator[None]:
    """Each group's rate times `speed`, for a step: a scheduler sees the rates that it has set."""
    if speed == 1.0:
        yield
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = speed * group["lr"]
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@dataclass(frozen=True, eq=False)
class _Kept:
    """The trainings that have ended, by which values and seed, in a file where there is one."""

    path: Path | None
    identity: Mapping[str, Any]
    trainings: dict[str, dict[str, Any]]
    beside: Mapping[str, Any]

    @staticmethod
    def of(path: Path | None, trainings: _Trainings, game: Game, *, anew: bool = False) -> _Kept:
        """What a file has; of other trainings it is refused, or with `anew` forgotten."""
        describer, tuned = Describer(), trainings.tuned
        identity = {
            "values": {which: describer.describe(at) for which, at in trainings.values.items() if which != "plain"},
            "steps": trainings.steps,
            "speed": trainings.speed,
            "model": describer.describe(tuned.model),
            "losses": {name: describer.describe(player.objective) for name, player in game.players.items()},
            "optimizer": Describer(list(tuned.model.parameters())).optimizer(tuned.optimizer),
            "scheduler": describer.describe(tuned.scheduler),
            "clip_norm": tuned.clip_norm,
        }
        if path is None or not path.exists():
            return _Kept(path, identity, {}, {})
        saved = load(path)
        beside = {key: saved[key] for key in saved if key not in ("identity", "trainings", "format")}
        if saved.get("identity") == identity:
            return _Kept(path, identity, dict(saved["trainings"]), beside)
        if anew:
            return _Kept(path, identity, {}, beside)
        told = in_words(differences(saved.get("identity", {}), identity)) or "it is of something else"
        raise CheckpointError(
            f"retrain: {path} is a checkpoint of other trainings: {told}. Pass another checkpoint=, or delete it."
        )

    def keep(self, name: str, training: dict[str, Any]) -> None:
        """One that has ended."""
        self.trainings[name] = training
        if self.path is not None:
            save(self.path, {**self.beside, "identity": dict(self.identity), "trainings": self.trainings})


@torch.no_grad()
def _validate(game: Game, tuning: Tuning, model: nn.Module, values: Mapping[str, Variables]) -> float:
    """The mean of the validation loss over one pass, whose batches come to where the model is."""
    loss, leader = tuning.valid_loss_at(values), tuning.leader
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
