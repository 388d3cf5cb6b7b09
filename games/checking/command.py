"""The commands `bilevel check` and `bilevel certify`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

import typer

import bilevel as bl
from bilevel.testing import Verdict, check_hypergradient
from games.checking.loading import loaded, response_for
from games.experiments.console import UsageError, errors_in_one_line

NO, CANNOT_TELL = 3, 4
"""Exit codes; 0 is yes, and `errors_in_one_line` has the others."""
Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE:GAME",
        help="A Python file, and in it the name of a bilevel.Game, or of a function without arguments that returns a "
        "game, or a pair (game, options of bilevel.solve).",
    ),
]
Leader = Annotated[str | None, typer.Option(help="The player whose hypergradient it is. Default: the first.")]
Follower = Annotated[str | None, typer.Option(help="The player that answers. Default: the last.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def check_command(
    target: Target,
    response: Annotated[
        str | None,
        typer.Option(help="The name of a response in the file. Default: the game's options' own, or the only one."),
    ] = None,
    leader: Leader = None,
    follower: Follower = None,
    directions: Annotated[int, typer.Option(min=1, help="Directions to compare along.")] = 3,
    settle: Annotated[int, typer.Option(min=0, help="Calls of the response that come first.")] = 0,
    rtol: Annotated[float, typer.Option(min=1e-12, max=1.0, help="The relative error that is accepted.")] = 1e-2,
    seed: Annotated[int, typer.Option(min=0, help="Of directions and batches.")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Is the hypergradient of a game right? Compared with finite differences of re-solved followers.

    Exit code: 0 right, 3 wrong, 4 cannot tell, 2 bad input, 1 an error on the way.
    """
    with errors_in_one_line(), _refusals():
        found = loaded(target)
        judged, name = response_for(found, response, follower)
        check = check_hypergradient(
            found.game,
            judged,
            leader=leader,
            follower=name,
            directions=directions,
            settle=settle,
            rtol=rtol,
            seed=seed,
        )
        typer.echo(_json(asdict(check)) if as_json else str(check))
    codes = {Verdict.RIGHT: 0, Verdict.WRONG: NO}
    raise typer.Exit(codes.get(check.verdict, CANNOT_TELL))


def certify_command(
    target: Target,
    leader: Leader = None,
    follower: Follower = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the leader, in place of the options' own.")] = None,
    tolerance: Annotated[float, typer.Option(min=1e-15, max=1.0, help="The relative error that is accepted.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of random directions.")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Is a point a Stackelberg equilibrium, and how far can its hypergradient be wrong?

    Where the file gives options, the game is solved by them first and the end of the run is judged; else the point at
    which the game begins.

    Exit code: 0 certified, 3 refuted, 4 inconclusive, 2 bad input, 1 an error on the way.
    """
    with errors_in_one_line(), _refusals():
        found = loaded(target)
        if steps is not None and not found.options:
            raise UsageError("--steps: the file gives no options to solve the game with; return (game, options).")
        own = dict(found.options) | ({} if steps is None else {"steps": steps})
        point: Any = bl.solve(found.game, **own) if own else {n: found.game.initial(n) for n in found.game.names}
        certificate = bl.certify(found.game, point, leader=leader, follower=follower, tolerance=tolerance, seed=seed)
        if as_json:
            kept = ("concept", "hypergradient_norm", "error_estimate", "error_bound", "corrected_bound")
            said = {key: getattr(certificate, key) for key in (*kept, "gradients", "products")}
            findings = [asdict(finding) for finding in certificate.findings]
            typer.echo(_json({"standing": certificate.standing, **said, "findings": findings}))
        else:
            typer.echo(str(certificate))
    codes = {bl.certificates.Standing.CERTIFIED: 0, bl.certificates.Standing.REFUTED: NO}
    raise typer.Exit(codes.get(certificate.standing, CANNOT_TELL))


@contextmanager
def _refusals() -> Iterator[None]:
    """What the library refuses, as a line of the command."""
    try:
        yield
    except bl.BilevelError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """As JSON has it: enumerations by value, and null for what is not finite."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
