"""The command `bilevel problems`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bilevel.files import write_whole
from games.experiments.console import check_at_least, chosen_names, errors_in_one_line, writable_folder


def problems_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Problems, or parts of their names; all when left out.", show_default=False),
    ] = None,
    starts: Annotated[int, typer.Option(help="Where the leader starts: so many points of its box.")] = 6,
    steps: Annotated[int, typer.Option(help="Evaluations of the leader from each start, at most.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the starts.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Write the results to this file, with machine and versions."),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the problems with their sources, and end.")] = False,
) -> None:
    """Solve small bilevel problems of the literature, and compare with the best known leader values."""
    from rich.console import Console
    from rich.table import Table

    from games.experiments.provenance import provenance
    from games.published.catalogue import problems
    from games.published.run import solved

    console = Console()
    with errors_in_one_line():
        check_at_least(1, starts=starts, steps=steps)
        known = problems()
        parts = [name for name in known if any(part.lower() in name.lower() for part in names or [])]
        unknown = [part for part in names or [] if not any(part.lower() in name.lower() for name in known)]
        chosen = [known[name] for name in chosen_names(unknown or parts or None, known, "problem")]
        if list_only:
            for problem in chosen:
                n, m = problem.dimensions
                console.print(f"{problem.name}: {n} + {m} variables; {problem.source}", highlight=False)
            return
        if output is not None:
            writable_folder(output.parent, "--json: the folder")
        results = []
        for problem in chosen:
            console.print(f"{problem.name} ...", highlight=False, end="\r")
            results.append(solved(problem, starts=starts, steps=steps, seed=seed))
        table = Table(title="Published bilevel problems")
        for head in ("problem", "variables", "status", "value", "best known", "evaluations", "answers", "seconds"):
            table.add_column(head, justify="left" if head in ("problem", "status") else "right")
        for found in results:
            value = "" if found.value is None else f"{found.value:.6g}"
            by = ""
            if found.status == "worse" and found.value is not None:
                by = f", by {found.value - found.published:.2g}"
            table.add_row(
                *(found.name, f"{found.dimensions[0]} + {found.dimensions[1]}", found.status + by, value),
                *(f"{found.published:.6g}", f"{found.evaluations}", f"{found.answers}", f"{found.seconds:.1f}"),
            )
        console.print(table)
        for found in results:
            if not found.solved:
                told = found.told[0] if found.told else "no warning"
                console.print(f"{found.name}: {found.status}. {told}", highlight=False, markup=False)
        count = sum(found.solved for found in results)
        total = sum(found.seconds for found in results)
        work = sum(found.evaluations for found in results)
        console.print(
            f"Solved {count} of {len(results)} within 0.1 %: {work:,} evaluations, {total:.0f} s", highlight=False
        )
        if output is not None:
            settings = {"starts": starts, "steps": steps, "seed": seed}
            written = {
                **provenance("scipy"),
                **settings,
                "stated": len(known),
                "results": [asdict(found) for found in results],
            }
            write_whole(output, (json.dumps(written, indent=1) + "\n").encode())
            console.print(f"Wrote {output}", highlight=False, markup=False)
