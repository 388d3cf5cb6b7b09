"""The command `bilevel`, also `python -m games`: one subcommand an application."""

from __future__ import annotations

from typing import Annotated

import typer

import bilevel as bl
from games.compare.command import compare_command
from games.gan.command import gan_command
from games.meta.command import meta_command
from games.paper.command import paper_command
from games.reweighting.command import reweight_command
from games.tuning.command import tune_command

OVERVIEW = """\
bilevel {version}: nested optimisation and differentiable games in PyTorch.

  Tune a weight decay for each weight of a classifier, by three responses side by side:
    bilevel tune --train 200 --steps 10

  Tune decay, dropout and smoothing of a model of your own, made by a function in a file, while it is trained:
    bilevel tune --model net.py:build --data data.npz --hyper decay --hyper dropout --epochs 20 --plot

  Find wrong labels by how much each training example helps on a small clean set:
    bilevel reweight --case "symmetric 0.4" --train 1000 --steps 10

  Train generators against discriminators that follow in different ways:
    bilevel gan ring --method simultaneous --method "unrolled 1" --seeds 2 --evaluations 4000

  Learn where many small tasks start, and how fast each weight moves:
    bilevel meta sinusoid --shots 5 --steps 300

  Compare responses on games with known answers:
    bilevel compare --game quadratic --response "implicit CG" --response unrolled

  Remake a figure of the paper that learned responses come from (--list names all):
    bilevel paper fig3

Each command writes to a folder, goes on after an interruption with --resume, and explains its options with --help.
In Python: import bilevel as bl; bl.solve(game) solves a game of your own."""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def overview(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version, and end.")] = False,
) -> None:
    """Nested optimisation and differentiable games."""
    if version:
        typer.echo(bl.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(OVERVIEW.format(version=bl.__version__))


app.command("tune")(tune_command)
app.command("reweight")(reweight_command)
app.command("gan")(gan_command)
app.command("meta")(meta_command)
app.command("paper")(paper_command)
app.command("compare")(compare_command)


def main() -> None:
    """Run the command line."""
    app()
