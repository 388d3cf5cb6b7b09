"""What every command shares: checks of options, errors in one line, Ctrl-C and SIGTERM that wait for a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType

import typer

from bilevel import BilevelError
from bilevel.errors import CheckpointError
from games.errors import DataError, MissingExtraError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


JOBS = "How many are done side by side, each on one core; left out, one a core, with --ray one a core of the cluster."
RAY = "The address of a Ray cluster that does them; local: one on this machine, which is started and stopped."


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


def jobs_of(jobs: int | None, ray: str | None) -> int:
    """The option --jobs as a number; 1 with a cluster is one a core of it.

    Raises `UsageError` for less than 1.
    """
    if jobs is None:
        return 1 if ray is not None else os.cpu_count() or 1
    check_at_least(1, jobs=jobs)
    return jobs


@contextmanager
def output_folder(output: Path) -> Iterator[None]:
    """Make the folder of --output, and keep it to this process while it works there.

    Raises `UsageError` when that cannot be done, nothing can be written there, or another process works there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--output {output}: it, or a folder above it, is a file.") from error
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}.") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise UsageError(f"--output {output}: no permission to write there.")
    if fcntl is None:
        yield
        return
    path = output / ".lock"
    try:
        lock = _taken(path)
    except BlockingIOError as error:
        raise UsageError(
            f"--output {output}: another process is at work there. Wait for its end, or choose another folder."
        ) from error
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(lock)


def _taken(path: Path) -> int:
    """A file that is this process's alone until it ends, however it ends; `BlockingIOError` where it is another's."""
    assert fcntl is not None
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with _without_locks():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # whoever had it took it away in between


@contextmanager
def _without_locks() -> Iterator[None]:
    """Some network file systems have no locks."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError:
        pass


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it takes a machine away; handled as Ctrl-C is."""


@contextmanager
def errors_in_one_line(goes_on_from: str = "the last step") -> Iterator[ExitStack]:
    """End with one line on stderr: 2 for what the user can put right, 1 for a run that failed.

    For Ctrl-C the code is 130, for SIGTERM 143, and the line tells what --resume `goes_on_from`; nothing where it is
    empty. Yields what holds contexts up to the command's end.
    """
    with _handled(signal.SIGTERM, _terminate), ExitStack() as held:
        try:
            yield held
        except (UsageError, DataError, MissingExtraError, CheckpointError, OSError) as error:
            _fail(error, 2)
        except BilevelError as error:
            _fail(error, 1)
        except KeyboardInterrupt as pressed:
            advice = f" The same command with --resume goes on from {goes_on_from}." if goes_on_from else ""
            typer.echo(f"Interrupted.{advice}", err=True)
            raise typer.Exit(143 if isinstance(pressed, _Terminated) else 130) from None


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from None


@contextmanager
def interrupt_after_step() -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C or SIGTERM wait for the end of a step, so that a checkpoint is of a whole one.

    The second does not wait. Yields what to call after each step: it raises `KeyboardInterrupt` when one has come.
    """
    pressed: list[type[KeyboardInterrupt]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        kind = _Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if pressed:
            raise kind
        pressed.append(kind)
        with suppress(RuntimeError):  # the signal came while stderr was being written
            print("\nStopping after this step; Ctrl-C again to stop now.", file=sys.stderr)

    def check() -> None:
        if pressed:
            raise pressed[0]

    with _handled(signal.SIGINT, handle), _handled(signal.SIGTERM, handle):
        yield check


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


@contextmanager
def _handled(number: int, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a signal call `handle`."""
    try:
        before = signal.signal(number, handle)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, before)
