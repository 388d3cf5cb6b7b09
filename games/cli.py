"""The command `bilevel`, also `python -m games`: one subcommand an application."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import bilevel as bl
from games.checking.command import certify_command, check_command
from games.compare.command import compare_command
from games.economics.command import economics_command
from games.experiments.console import interrupted
from games.gan.command import gan_command
from games.meta.command import meta_command
from games.mixture.command import mixture_command
from games.paper.command import paper_command
from games.published.command import problems_command
from games.reweighting.command import reweight_command
from games.stopping import raising
from games.tuning.command import tune_command

OVERVIEW = """\
bilevel {version}: nested optimisation and differentiable games in PyTorch.

  Check the hypergradient of a game of your own, `game` in mine.py, against finite differences:
    bilevel check mine.py:game

  Certify the point where a game of your own ends; `problem` returns (game, options of solve):
    bilevel certify mine.py:problem --json

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

  Learn which sources of text a small language model should be trained on:
    bilevel mixture --method Nudged --steps 400

  Compare responses on games with known answers:
    bilevel compare --game quadratic --response "implicit CG" --response unrolled

  Tolls, capacities, contracts and guards, solved beside their closed forms:
    bilevel economics

  Solve bilevel problems of the literature, with the best known leader values beside:
    bilevel problems bard

  Remake a figure of the paper that learned responses come from (--list names all):
    bilevel paper fig3

--help explains a command's options. The long ones write to a folder and go on after an interruption with --resume.
In Python: import bilevel as bl; bl.solve(game) solves a game of your own."""


@contextmanager
def _told() -> Iterator[None]:
    """Tell of an interruption that the command itself has not told."""
    try:
        with raising():
            yield
    except KeyboardInterrupt as pressed:
        raise interrupted(pressed) from None


class _Commands(TyperGroup):
    """Commands that end in one line wherever they are stopped: also while their options are read."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """The options, read."""
        with _told():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        """A command, run."""
        with _told():
            return super().invoke(ctx)


app = typer.Typer(cls=_Commands, add_completion=False, rich_markup_mode=None)


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


app.command("check")(check_command)
app.command("certify")(certify_command)
app.command("tune")(tune_command)
app.command("reweight")(reweight_command)
app.command("gan")(gan_command)
app.command("meta")(meta_command)
app.command("mixture")(mixture_command)
app.command("paper")(paper_command)
app.command("compare")(compare_command)
app.command("economics")(economics_command)
app.command("problems")(problems_command)


def main() -> None:
    """Run the command line."""
    app()
