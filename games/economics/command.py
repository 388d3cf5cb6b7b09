"""The command `bilevel economics`."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def economics_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(file_okay=False, help="Draw the figures of the documentation into this folder.")
    ] = None,
) -> None:
    """Solve a market with a capacity, a contract, guards within a budget and a tolled road, beside what is known."""
    from games.experiments.console import errors_in_one_line, writable_folder

    with errors_in_one_line():
        from rich.console import Console
        from rich.table import Table

        import bilevel as bl
        from games.economics.solved import rows

        if plot is not None:
            writable_folder(plot, "--plot")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.errors.BilevelWarning)  # what they would tell of is beside the numbers
            found = rows()
        if as_json:
            typer.echo(json.dumps([asdict(row) for row in found], indent=1))
        else:
            table = Table(title="Games in which bounds decide")
            for head in ("game", "what", "solved", "known", "by"):
                table.add_column(head, justify="right" if head in ("solved", "known") else "left")
            for row in found:
                table.add_row(row.game, row.what, f"{row.found:.6g}", f"{row.known:.6g}", row.by)
            Console().print(table)
        if plot is not None:
            from games.economics.bounded_figures import bounded_figures
            from games.economics.figures import figures
            from games.experiments.style import save_figure

            for name, figure in {**figures(), **bounded_figures()}.items():
                save_figure(figure, plot / f"{name}.png", dpi=100)
                typer.echo(f"{plot / name}.png", err=True)
