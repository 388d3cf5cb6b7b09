"""A run of `bilevel.tune` that the command line describes, and what it writes."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel import BilevelError, BilevelWarning
from bilevel._printed import printed
from bilevel.errors import CheckpointError, CheckStopped
from bilevel.files import write_whole
from bilevel.randomness import random_kept
from bilevel.tuning import Retrained, Tuned
from bilevel.workers import LOCAL, on_cluster, require_workers
from games.errors import MissingExtraError, TrainingError
from games.experiments.console import Stopped, UsageError, check_at_least, output_folder
from games.experiments.provenance import provenance
from games.experiments.store import Store, as_json, digest, write_json
from games.experiments.style import empty_figure, save_figure
from games.stopping import raising
from games.tuning.own import named, settings
from games.tuning.own.sets import Sets, sets


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command, as they were given; None where its default is asked for."""

    model: str
    data: str | None
    hyper: Sequence[str] | None
    loss: str | None
    optimizer: str
    lr: float
    epochs: int | None
    steps: int | None
    device: str
    batch: int
    train: int | None
    valid: int | None
    image_size: int | None
    check: float
    retrain: int
    ray: str | None
    seed: int
    output: Path
    resume: bool
    accept_changes: bool
    plot: bool


def run(options: Options, *, quiet: bool, stop_if_asked: Callable[[], None]) -> dict[str, Any]:
    """Tune, evaluate, and write results.json, model.pt and run.png to the output folder; gives what is in the JSON.

    Raises `UsageError` and `DataError` for what can be put right, before any training, and `TrainingError` for what
    the user's functions raise once it has begun.
    """
    check_at_least(1, batch_size=options.batch)
    check_at_least(0, retrain=options.retrain)
    if not 0.0 <= options.check <= 1.0:
        raise UsageError(f"--check {options.check}: expected a share of the run's length, from 0, which is none, to 1.")
    _check_ray(options)
    if options.epochs is not None and options.steps is not None:
        raise UsageError("--epochs and --steps both say how long to train; give one of them.")
    length = (
        {"steps": options.steps}
        if options.steps is not None
        else {"epochs": 20 if options.epochs is None else options.epochs}
    )
    check_at_least(1, **length)
    if options.plot:
        empty_figure()  # what would fail after minutes of work is tried before it
    device = settings.device(options.device)
    build = named.function(options.model, "--model")
    factory = settings.optimizer(options.optimizer, options.lr)
    data = sets(
        options.data,
        train=options.train,
        valid=options.valid,
        batch=options.batch,
        seed=options.seed,
        image_size=options.image_size,
    )
    torch.manual_seed(options.seed)
    model = named.called(build, options.model, "--model")
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model {options.model} returned a {type(model).__name__}; expected an nn.Module.")
    model = model.to(device)
    loss, classes = _checked_loss(options, model, data)
    declared = settings.hyper(options.hyper, model, classes)
    files = named.files(options.model, options.data, options.loss, options.optimizer)
    with output_folder(options.output, "tune", resume=options.resume):
        identity = {
            "model": options.model,
            "files": {name: digest(path.read_bytes()) for name, path in files.items()},
            "data": data.fingerprint,
            "hyper": {name: repr(entry) for name, entry in declared.items()},
            "loss": options.loss,
            "optimizer": [options.optimizer, options.lr],
            "length": length,
            "device": options.device,
            "batch": options.batch,
            "seed": options.seed,
        }
        checkpoint = Store(options.output).checkpoint(
            "tune",
            identity,
            steps=2**62,
            resume=options.resume,
            accepted=("files",) if options.accept_changes else (),
            hint="Put back what was there, or pass --accept-changes to go on with what is there now.",
        )

        kept = options.output / "retrain.pt"
        if not options.resume:
            kept.unlink(missing_ok=True)

        def step(number: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
            stop_if_asked()

        fresh = partial(_fresh, build, device)

        tune = partial(
            bl.tune,
            model,
            loss,
            loss,
            data.train,
            data.valid,
            hyper=declared,
            optimizer=factory,
            check=options.check,
            callbacks=(step,),
            checkpoint=checkpoint,
            accept_changes=options.accept_changes,
            progress=not quiet,
            seed=options.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)  # they are in the solution, and told at the end
            before, tuned, again, stopped = _version(checkpoint), None, None, None
            try:
                tuned = tune(**length)  # type: ignore[arg-type]
                if options.retrain:
                    again = _retrained(tuned, fresh, kept, options, stop_if_asked)
            except CheckStopped as pressed:
                tuned, stopped = pressed.tuned, pressed.__cause__
            except KeyboardInterrupt as pressed:
                if tuned is None:
                    raise
                stopped = pressed
            except CheckpointError:
                raise
            except Exception as error:
                # The run writes its checkpoint as it begins, after all that it refuses.
                if tuned is None and _version(checkpoint) == before:
                    raise UsageError(named.told(error)) from error
                if isinstance(error, BilevelError):
                    raise
                raise TrainingError(f"The training failed: {named.told(error)}") from error
        content = _content(options, identity, data, tuned, again, loss, classes)
        write_json(options.output / "results.json", content, indent=1)
        buffer = io.BytesIO()
        torch.save(tuned.model.state_dict(), buffer)
        write_whole(options.output / "model.pt", buffer.getvalue())
        if options.plot:
            save_figure(tuned.plot(), options.output / "run.png")
        if isinstance(stopped, KeyboardInterrupt):
            raise Stopped(
                stopped,
                f"Wrote results.json and model.pt to {options.output}, without the fresh trainings that had not ended; "
                "go on with them by --resume.",
            )
        return content


def _check_ray(options: Options) -> None:
    """Raise where nothing would go to a cluster, or could not, before any training."""
    if options.ray is None:
        return
    if not options.retrain:
        raise UsageError(
            f"--ray {options.ray}: a run is one training, which is done here. Add --retrain 4 for fresh trainings on "
            "the cluster, or leave --ray out."
        )
    if options.device != "cpu":
        raise UsageError(
            f"--ray {options.ray} trains on the cluster's cores; --device {options.device} cannot be had there. Use "
            "--device cpu, or leave --ray out."
        )
    try:
        require_workers("tune", 1, options.ray)
    except ImportError as error:
        raise MissingExtraError(str(error)) from error
    with on_cluster(options.ray, 1) if options.ray != LOCAL else nullcontext():
        pass  # whether anybody answers


def _fresh(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    return build().to(device)


def _retrained(
    tuned: Tuned,
    fresh: Callable[[], nn.Module],
    kept: Path,
    options: Options,
    stop_if_asked: Callable[[], None],
) -> Retrained:
    """Fresh trainings: here, each to its end before a stop, or on a cluster, which is stopped at once."""
    retrain = partial(bl.retrain, tuned, seeds=options.retrain, checkpoint=kept)
    stop_if_asked()
    if options.ray is None:

        def make() -> nn.Module:
            stop_if_asked()
            return fresh()

        return retrain(make=make)
    with raising(), named.sent_whole(options.model, options.data, options.loss, options.optimizer):
        return retrain(make=fresh, cluster=options.ray)


def _version(file: Path) -> tuple[int, int] | None:
    """Which file lies there: each save puts another in its place."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _checked_loss(options: Options, model: nn.Module, data: Sets) -> tuple[Callable[..., Tensor], bool]:
    """The loss, after it was called once with the first batches; the model and its buffers stay as they are."""
    batches = []
    for name, loader in (("train", data.train), ("valid", data.valid)):
        what = options.data or data.name
        first: Any = named.called(lambda loader=loader: next(iter(loader), None), what, "--data")
        if first is None:
            raise UsageError(f"--data {what}: the {name} loader gives no batch.")
        batches.append(settings.placed(first, model))
    loss, classes = settings.loss(options.loss, batches[0])
    before = model.training
    model.eval()
    try:
        for batch in batches:
            with torch.no_grad():
                value: Any = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise UsageError(f"--loss {options.loss} returned {came}; expected a tensor with one number.")
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"--model {options.model} and the loss fail on a batch, {settings.form(batch)}: {named.told(error)}"
        ) from error
    finally:
        model.train(before)
    return loss, classes


def _content(
    options: Options,
    identity: Mapping[str, Any],
    data: Sets,
    tuned: Tuned,
    again: Retrained | None,
    loss: Callable[..., Tensor],
    classes: bool,
) -> dict[str, Any]:
    with random_kept(start=options.seed):  # loaders that shuffle give the same batches to a run that was resumed
        values = {
            "valid": _evaluated(tuned.model, data.judged, loss, classes),
            **({} if data.test is None else {"test": _evaluated(tuned.model, data.test, loss, classes)}),
        }
    retrained = None if again is None else {"start": list(again.start), "found": list(again.found)}
    found: dict[str, Any] = as_json(
        {
            "data": data.name,
            "settings": identity,
            "plan": str(tuned.plan),
            "start": tuned.start,
            "hyper": tuned.hyper,
            "advised": tuned.advised,
            "check": tuned.unchecked if tuned.retrained is None else tuned.retrained.told(),
            "model": values,
            "retrained": retrained,
            "warnings": list(tuned.solution.warnings),
            "gradients": tuned.solution.gradients,
            "seconds": tuned.solution.seconds,
            **provenance("numpy"),
            "history": tuned.history,
        }
    )
    return found


@torch.no_grad()
def _evaluated(
    model: nn.Module, batches: Iterable[Any], loss: Callable[..., Tensor], classes: bool
) -> dict[str, float]:
    """Mean loss, by examples where batches tell them, and accuracy."""
    before = model.training
    model.eval()
    total = right = seen = 0.0
    for drawn in batches:
        batch = settings.placed(drawn, model)
        count = float(len(batch[1])) if isinstance(batch, tuple | list) and len(batch) == 2 else 1.0
        total += count * float(loss(model, batch))
        seen += count
        if classes:
            labels = batch[1].argmax(1) if batch[1].is_floating_point() else batch[1]
            hits = model(batch[0]).argmax(1) == labels
            right += count * float(hits.double().mean())
    model.train(before)
    return {"loss": total / seen, **({"accuracy": right / seen} if classes else {})}


def table(content: Mapping[str, Any], output: Path) -> str:
    """What was found, for a person."""
    from rich.table import Table

    shown = Table(title=f"Tuned on {content['data']}")
    for column in ("", "start", "found"):
        shown.add_column(column, justify="left" if column == "" else "right")
    for name, value in content["hyper"].items():
        for key, found in _numbers(name, value).items():
            shown.add_row(key, f"{_numbers(name, content['start'][name])[key]:.4g}", f"{found:.4g}")
    lines = [printed(shown), content["plan"]]
    for part, told in (("valid", "validation"), ("test", "test")):
        if part in content["model"]:
            of = content["model"][part]
            accuracy = f", accuracy {100 * of['accuracy']:.1f} %" if "accuracy" in of else ""
            lines.append(f"The trained model's {told} loss: {of['loss']:.4g}{accuracy}")
    lines += [] if content["check"] is None else [content["check"]]
    if content["retrained"] is None:
        lines.append("Whole fresh trainings of two initialisations: --resume --retrain 2")
    else:
        of = content["retrained"]
        mean = {name: sum(values) / len(values) for name, values in of.items()}
        lines.append(
            f"Validation loss of {len(of['found'])} fresh trainings: {mean['start']:.4g} at the start's values, "
            f"{mean['found']:.4g} at those found"
        )
    lines += [f"Warning: {warning}" for warning in content["warnings"]]
    return "\n".join([*lines, f"Wrote results.json and model.pt to {output}"])


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Scalars under their names; of many numbers the least, the median and the largest."""
    if isinstance(value, Mapping):
        return {key: x for part, inner in value.items() for key, x in _numbers(f"{name} {part}", inner).items()}
    if isinstance(value, list):
        flat = torch.tensor(value).flatten()
        return {
            f"{name} {w}": float(f(flat))
            for w, f in (("least", torch.min), ("median", torch.median), ("most", torch.max))
        }
    return {name: float(value)}


def as_text(content: Mapping[str, Any]) -> str:
    """What is in results.json, for a program."""
    return json.dumps(content, allow_nan=False)
