"""How experiments are shown while they run: a bar with the time left, and a line for each figure."""

from __future__ import annotations

import time
from pathlib import Path

from bilevel import BilevelError
from games.paper.experiment import Experiment, Part, Results, Source
from games.paper.runner import Remade, remake
from games.tuning.data import idx_digits


def remake_shown(
    chosen: list[Experiment], data: Path | None, output: Path, *, jobs: int, resume: bool
) -> dict[str, Results]:
    """`remake` with a bar of the time left and a line for each figure; the results by experiment.

    Raises `BilevelError` at the end when a part failed, `DataError` at once for a folder of data that cannot be read.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if data is not None:
        idx_digits(data, train=1, valid=1, test=1)  # a defect is told now, and not by every part
    total = sum(part.seconds for experiment in chosen for part in experiment.parts)
    failed: list[str] = []
    found: dict[str, Results] = {}
    columns = (
        TextColumn("{task.fields[parts]} parts"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}"),
    )
    console = Console()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        count = sum(len(experiment.parts) for experiment in chosen)
        task = progress.add_task("", total=total, parts=f"0/{count}", left="")
        began, ended, worked = time.perf_counter(), 0, 0.0

        def end(experiment: Experiment, part: Part, seconds: float) -> None:
            nonlocal ended, worked
            ended += 1
            worked += part.seconds if seconds else 0.0
            progress.advance(task, part.seconds)
            left = progress.tasks[0].remaining or 0.0
            # The parts' own estimates are relative; this machine's pace turns them into seconds.
            pace = (time.perf_counter() - began) / worked if worked else 0.0
            told = f"{int(left * pace // 60)}:{int(left * pace % 60):02d} left" if worked else ""
            progress.update(task, parts=f"{ended}/{count}", left=told, description=f"{experiment.name}: {part.name}")

        def draw(remade: Remade) -> None:
            found[remade.experiment.name] = remade.results
            for error in remade.errors:
                failed.append(remade.experiment.name)
                progress.console.print(f"Error: {remade.experiment.name}: {error}", highlight=False, markup=False)
            if remade.figure is not None:
                console.print(f"{remade.figure}: {remade.line}", highlight=False, markup=False, soft_wrap=True)

        remake(chosen, Source(data), output, jobs=jobs, resume=resume, ended=end, drawn=draw)
    if failed:
        names = ", ".join(dict.fromkeys(failed))
        raise BilevelError(f"{names} failed; the other parts are kept, and --resume does only what is missing.")
    return found
