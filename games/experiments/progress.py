"""Experiments while they run: a bar with the time left, and a line for each figure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from bilevel import BilevelError
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Results
from games.experiments.runner import FinishedExperiment, FinishedPart, run_experiments


def run_with_progress(
    chosen: Sequence[Experiment],
    data: Path | None,
    output: Path,
    *,
    jobs: int,
    resume: bool,
    cluster: str | None = None,
) -> dict[str, Results]:
    """`run_experiments` with a bar of the time left and a line for each figure; the results by experiment.

    Raises `BilevelError` at the end when a part failed, `DataError` at once for a folder of data that cannot be read.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    source = DigitSource(data)
    source.check()  # a defect is told now, and not by every part
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
        parts = [part for experiment in chosen for part in experiment.parts]
        total = sum(part.seconds for part in parts)
        task = progress.add_task("", total=total, parts=f"0/{len(parts)}", left="")
        began, ended, worked = time.perf_counter(), 0, 0.0

        def show_part(done: FinishedPart) -> None:
            nonlocal ended, worked
            ended += 1
            worked += done.part.seconds if done.seconds else 0.0
            progress.advance(task, done.part.seconds)
            remaining = progress.tasks[0].remaining or 0.0
            # The parts' own estimates are relative; this machine's pace turns them into seconds.
            pace = (time.perf_counter() - began) / worked if worked else 0.0
            left = f"{int(remaining * pace // 60)}:{int(remaining * pace % 60):02d} left" if worked else ""
            description = f"{done.experiment}: {done.part.name}"
            progress.update(task, parts=f"{ended}/{len(parts)}", left=left, description=description)

        def show_experiment(done: FinishedExperiment) -> None:
            name = done.experiment.name
            found[name] = done.results
            for failure in done.failures:
                failed.append(name)
                progress.console.print(f"Error: {name}: {failure}", highlight=False, markup=False)
            if done.figure is not None:
                console.print(f"{done.figure}: {done.summary}", highlight=False, markup=False, soft_wrap=True)

        run_experiments(
            chosen,
            source,
            output,
            jobs=jobs,
            resume=resume,
            cluster=cluster,
            on_part=show_part,
            on_experiment=show_experiment,
        )
    if failed:
        names = ", ".join(dict.fromkeys(failed))
        raise BilevelError(f"{names} failed; the other parts are kept, and --resume does only what is missing.")
    return found
