"""A bar with the losses and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bilevel.solving.history import RUN_KEYS, Record


@contextmanager
def progress_bar(wanted: bool, done: int, steps: int) -> Iterator[Callable[[Record], None]]:
    """Gives a function that shows a step's record; nothing is shown when no bar is `wanted`."""
    if not wanted:
        yield lambda record: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("starting", total=steps, completed=done)

        def show(record: Record) -> None:
            shown = [f"{k} {v:.4g}" for k, v in record.items() if k not in RUN_KEYS and not k.endswith(_DETAILS)]
            bar.update(task, completed=int(record["step"]), description="  ".join(shown))

        yield show


_DETAILS = (".stationarity", ".worst")
