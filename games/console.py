"""What every command shares: output folders, errors told in one line, and Ctrl-C that waits for a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from bilevel import BilevelError
from bilevel.errors import CheckpointError
from games.errors import DataError, MissingExtraError


def prepare(output: Path) -> None:
    """Make the output folder, and see that it can be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--output {output}: it, or a folder above it, is a file.") from error
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}.") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise UsageError(f"--output {output}: no permission to write there.")


class UsageError(Exception):
    """An option that cannot be used; the message is one line."""


@contextmanager
def told_in_one_line() -> Iterator[None]:
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
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C wait for the end of a step, so that a checkpoint is of a whole one; the second does not."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nStopping after this step; Ctrl-C again to stop now.", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
