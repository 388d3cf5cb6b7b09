"""Ctrl-C and SIGTERM before a command has begun: nothing here needs to be loaded first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it takes a machine away; handled as Ctrl-C is."""


def stop(number: int, frame: FrameType | None) -> None:
    """What a signal does: raise, or come again a little later where an exception would be printed and lost."""
    if _unheard(frame):
        again = threading.Timer(0.01, os.kill if os.name == "posix" else _raise, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _raise(_: int, number: int) -> None:
    signal.raise_signal(number)


def _unheard(frame: FrameType | None) -> bool:
    """Whether this is within a finaliser or a weak reference's callback, whose exceptions Python ignores."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename.endswith(_CALLBACKS):
            return True
        frame = frame.f_back
    return False


_CALLBACKS = ("weakref.py", "_weakrefset.py")


def code_of(pressed: KeyboardInterrupt) -> int:
    """The exit code of a command that was stopped."""
    return 143 if isinstance(pressed, Terminated) else 130


@contextmanager
def held_back() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM wait for the end; the second does not.

    For the time in which modules are loaded: an exception in the middle of a compiled module's beginning is told as
    something else, or lost.
    """
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed:
            stop(number, frame)
        pressed.append(number)

    with handled(handle):
        yield
    if pressed:
        stop(pressed[0], None)


@contextmanager
def raising() -> Iterator[None]:
    """Let both raise at once, and tell of them whatever the code that they met has made of the exception.

    An import that is interrupted may raise an ImportError or a RuntimeError instead.
    """
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        stop(number, frame)

    with handled(handle):
        try:
            yield
        except Exception:
            if pressed:
                stop(pressed[0], None)
            raise


@contextmanager
def handled(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let both signals call `handle`; one that is ignored, as a shell's background job ignores Ctrl-C, stays so."""
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread, where signals do not arrive
        yield
        return
    try:
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


def main(load: Callable[[], Callable[[], object]]) -> None:
    """Load a command line and run it; a signal at any moment is one line on stderr, and its code."""
    try:
        with raising():
            with held_back():
                run = load()
            run()
    except KeyboardInterrupt as pressed:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(code_of(pressed)) from None
