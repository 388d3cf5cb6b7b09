"""What every command shares: checks of options, errors in one line, Ctrl-C and SIGTERM that wait for a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType

import typer

from bilevel import BilevelError
from bilevel.errors import CheckpointError
from bilevel.files import write_whole
from bilevel.tuning import retraining
from games.errors import DataError, MissingExtraError
from games.stopping import code_of, handled, raising, stop

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
def output_folder(
    output: Path, command: str, *, resume: bool = False, goes_on_from: str = "the last step"
) -> Iterator[None]:
    """Make the folder of --output, and keep it to this process while `command` works there.

    A hidden file in it names the commands that have begun there. Ctrl-C and SIGTERM tell what --resume `goes_on_from`.
    Raises `UsageError` when that cannot be done, nothing can be written there, another process works there, or
    `resume` is asked where the command has never begun: then nothing is made.
    """
    if resume:
        _require_begun(output, command)
    fresh = [path for path in (output, *output.parents) if not path.exists()]
    earlier = _begun(output)
    writable_folder(output, "--output")
    try:
        with _alone_in(output):
            try:
                begun = _begun(output)
                if command not in begun:
                    write_whole(output / _BEGUN, "".join(f"{name}\n" for name in (*begun, command)).encode())
            except OSError as error:
                raise UsageError(f"--output {output}: {error.strerror or error}.") from error
            try:
                yield
            except Stopped:
                raise  # it says more
            except KeyboardInterrupt as pressed:
                raise Stopped(pressed, f"The same command with --resume goes on from {goes_on_from}.") from None
    except (UsageError, DataError, MissingExtraError):
        if not earlier:
            _undo(output, fresh)
        raise


def _undo(output: Path, fresh: Sequence[Path]) -> None:
    """After bad input nothing is written: take the hidden file and the `fresh` folders away, unless they hold more."""
    with suppress(OSError):
        if [path.name for path in output.iterdir()] == [_BEGUN]:
            (output / _BEGUN).unlink()
        for path in fresh:
            path.rmdir()


def writable_folder(path: Path, option: str) -> None:
    """Make the folder that an option names; raises `UsageError` where that, or writing there, is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"{option} {path}: it, or a folder above it, is a file.") from error
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: no permission to write there.")


_BEGUN = ".bilevel"
"""In a folder of --output: the commands that have begun there, one a line."""


def _begun(output: Path) -> list[str]:
    try:
        return (output / _BEGUN).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []


def _require_begun(output: Path, command: str) -> None:
    begun = _begun(output)
    if command in begun:
        return
    if not output.is_dir():
        came = "there is no such folder"
    elif begun:
        came = f"`bilevel {'`, `bilevel '.join(begun)}` ran there, and not `bilevel {command}`"
    else:
        came = f"`bilevel {command}` has never begun there"
    raise UsageError(
        f"--resume: nothing to go on from in {output}: {came}. Give the --output of the run that was stopped, or leave "
        "--resume out to begin."
    )


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Keep a folder to this process."""
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


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what the user may do next."""

    def __init__(self, pressed: KeyboardInterrupt, advice: str) -> None:
        super().__init__(advice)
        self.pressed, self.advice = pressed, advice


@contextmanager
def errors_in_one_line() -> Iterator[ExitStack]:
    """End with one line on stderr: 2 for what the user can put right, 1 for a run that failed.

    For Ctrl-C the code is 130, for SIGTERM 143. Yields what holds contexts up to the command's end.
    """
    try:
        with raising(), ExitStack() as held:
            yield held
    except (UsageError, DataError, MissingExtraError, CheckpointError, OSError) as error:
        _fail(error, 2)
    except BilevelError as error:
        _fail(error, 1)
    except KeyboardInterrupt as pressed:
        raise interrupted(pressed) from None


def interrupted(pressed: KeyboardInterrupt) -> typer.Exit:
    """Tell of an interruption in one line; the command's end, with its code."""
    advice = f" {pressed.advice}" if isinstance(pressed, Stopped) else ""
    with suppress(OSError):  # nobody may be there any more to read it
        typer.echo(f"Interrupted.{advice}", err=True)
    return typer.Exit(code_of(pressed.pressed if isinstance(pressed, Stopped) else pressed))


def _trains_anew(frame: FrameType | None) -> bool:
    """Whether this is within `retrain`, or in the trainings that follow a run of `tune`."""
    while frame is not None:
        if frame.f_code.co_filename == retraining.__file__:
            return True
        frame = frame.f_back
    return False


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from None


@contextmanager
def interrupt_after_step() -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C or SIGTERM wait for the end of a step, so that a checkpoint is of a whole one.

    The second does not wait, nor does the first within a fresh training, which has no checkpoint of its own. Yields
    what to call after each step: it raises `KeyboardInterrupt` when one has come.
    """
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed or _trains_anew(frame):
            stop(number, frame)
        pressed.append(number)
        with suppress(RuntimeError):  # the signal came while stderr was being written
            print("\nStopping after this step; Ctrl-C again to stop now.", file=sys.stderr)

    def check() -> None:
        if pressed:
            stop(pressed[0], None)

    with handled(handle):
        yield check
