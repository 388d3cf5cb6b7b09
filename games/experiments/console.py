"""What every command shares: its options' checks, errors in one line, and Ctrl-C that waits for a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from bilevel import BilevelError
from bilevel.errors import CheckpointError
from games.errors import DataError, MissingExtraError


class UsageError(Exception):
    """An option that cannot be used; the message is one line."""


def chosen_names(given: Iterable[str] | None, known: Iterable[str], what: str, *, option: str = "") -> list[str]:
    """The names given, each once, or all that are known when none is given.

    Raises `UsageError` for one that is not known; `what` it should name is in the message, and `option` before it.
    """
    names = list(known)
    for name in given or ():
        if name not in names:
            where = f"{option} {name}" if option else name
            raise UsageError(f"{where}: there is no such {what}; expected one of {', '.join(names)}.")
    return list(dict.fromkeys(given or names))


def check_at_least(least: int, **options: int) -> None:
    """Raise `UsageError` for an option below `least`; `steps=0` is told as --steps 0."""
    for name, value in options.items():
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least {least}.")


def make_output_folder(output: Path) -> None:
    """Make the folder of --output; raises `UsageError` when that cannot be done, or nothing can be written there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--output {output}: it, or a folder above it, is a file.") from error
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}.") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise UsageError(f"--output {output}: no permission to write there.")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End with one line on stderr: 2 for what the user can put right, 1 for a run that failed, 130 for Ctrl-C."""
    try:
        yield
    except (UsageError, DataError, MissingExtraError, CheckpointError, OSError) as error:
        _fail(error, 2)
    except BilevelError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command with --resume goes on from the last step.", err=True)
        raise typer.Exit(130) from None


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from None


@contextmanager
def interrupt_after_step() -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C wait for the end of a step, so that a checkpoint is of a whole one; the second does not.

    Yields what to call after each step: it raises `KeyboardInterrupt` when Ctrl-C was pressed.
    """
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        print("\nStopping after this step; Ctrl-C again to stop now.", file=sys.stderr)

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield check
        return
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
