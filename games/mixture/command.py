"""The command `bilevel mixture`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from games.experiments.console import (
    check_at_least,
    chosen_names,
    errors_in_one_line,
    interrupt_after_step,
    output_folder,
)
from games.experiments.store import Store, digest
from games.experiments.style import empty_figure
from games.experiments.threads import choose_threads
from games.mixture.problem import Corpus, Sizes
from games.mixture.report import cells, write
from games.mixture.run import INNER, METHODS, Row, Show, row_of, run
from games.mixture.texts import Source, fewest_characters, sources


def mixture_command(
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHODS)}; repeat it for several. All when left out.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of the model in each run.")] = 1000,
    characters: Annotated[int, typer.Option(help="Characters of each source.")] = 200_000,
    length: Annotated[int, typer.Option(help="Characters that the model sees at once.")] = 32,
    each: Annotated[int, typer.Option(help="Pieces of each source in a batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON in place of the table.")] = False,
    output: Annotated[
        Path, typer.Option(readable=False, help="Folder for results.json, shares.png and checkpoints.")
    ] = Path("runs/mixture"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the output folder's checkpoints.")] = False,
) -> None:
    """Learn how much of each source a small language model is trained on, in the training run itself."""
    from rich.console import Console
    from rich.table import Table

    with errors_in_one_line() as held, interrupt_after_step() as stop_if_asked:
        names = chosen_names(method, METHODS, "method", option="--method")
        check_at_least(INNER, steps=steps)
        check_at_least(1, each=each)
        check_at_least(2, length=length)
        check_at_least(fewest_characters(length), characters=characters)
        empty_figure()  # what would fail after minutes of work is tried before it
        held.enter_context(output_folder(output, "mixture", resume=resume))
        choose_threads(0.0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        read = sources(characters, seed=seed)
        corpus = Corpus(read, Sizes(length=length, each=each), device)
        settings = {"steps": steps, "characters": characters, "length": length, "each": each, "seed": seed}
        store, known_by = Store(output / "parts"), {**settings, "device": str(device), "texts": _digest_of(read)}
        kept = {name: store.load(name, known_by) if resume else None for name in names}
        files = {
            name: store.checkpoint(name, known_by, steps=steps // INNER, resume=resume)
            for name, result in kept.items()  # all, before the first: an interrupted run leaves nothing of an older one
            if result is None
        }
        rows: list[Row] = []
        with _bars(steps) as begin:
            for name in names:
                result = kept[name]
                if result is None:
                    show = _stopping(begin(name), stop_if_asked)
                    row = run(name, corpus, steps=steps, seed=seed, show=show, checkpoint=files[name])
                    result = store.save(name, known_by, asdict(row))
                rows.append(row_of(result))
        labels, noisy = [s.name for s in corpus.sources], [s.noise for s in corpus.sources]
        made = write(output, labels, noisy, rows, {**settings, "device": str(device)})
        if as_json:
            typer.echo(json.dumps(made))
            return
        console, (heads, *body) = Console(), cells(noisy, rows)
        table = Table(*heads)
        for line in body:
            table.add_row(*line)
        console.print(table)
        console.print(f"Wrote results.json and, of learned mixtures, shares.png to {output}", highlight=False)


def _digest_of(read: Sequence[Source]) -> str:
    return digest(*(part.numpy().tobytes() for source in read for part in (source.train, source.held_out, source.test)))


def _stopping(show: Show, stop_if_asked: Callable[[], None]) -> Show:
    def shown(step: int, loss: float, shares: Sequence[float]) -> None:
        show(step, loss, shares)
        stop_if_asked()

    return shown


@contextmanager
def _bars(steps: int) -> Iterator[Callable[[str], Show]]:
    """A bar for each run on stderr, with the loss, the largest share and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def begin(name: str) -> Show:
            task = progress.add_task(name, total=steps, told="starting")

            def show(step: int, loss: float, shares: Sequence[float]) -> None:
                told = f"loss {loss:.3f}  shares {' '.join(f'{share:.2f}' for share in shares)}"
                progress.update(task, completed=step, told=told)

            return show

        yield begin
