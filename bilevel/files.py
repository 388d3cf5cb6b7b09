"""A file that is written whole or not at all: after a crash, on a full disk, and when two processes write it."""

from __future__ import annotations

import os
import secrets
import stat
import time
from pathlib import Path

_ABANDONED = 3600.0  # seconds after which nobody is still writing a file: a save takes seconds


def write_whole(path: Path, data: bytes) -> None:
    """Put a file of these bytes in a path's place at once; a link is followed.

    It is written under a name of its own beside the target, brought to the disk, and then renamed. What was there stays
    whole when that fails, and nothing is left beside it. Raises `OSError`, which names the path itself.
    """
    target = Path(os.path.realpath(path))
    try:
        _replace(target, data)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def _replace(target: Path, data: bytes) -> None:
    mode = 0o666
    if target.exists():
        if not os.access(target, os.W_OK):  # a file may be replaced where it may not be written
            raise PermissionError(13, "Permission denied, the file is read-only")
        mode = stat.S_IMODE(target.stat().st_mode)
    beside = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the folder's entry too; elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_abandoned(path: Path) -> None:
    """Remove what a process that was killed while it wrote has left beside a file."""
    target = Path(os.path.realpath(path))
    for beside in target.parent.glob(f"{_literal(target.name)}.*.part"):
        try:
            if time.time() - beside.stat().st_mtime > _ABANDONED:
                beside.unlink()
        except OSError:  # another process was quicker, or it is not ours to remove
            continue


def _literal(name: str) -> str:
    """A name as a pattern that matches itself alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
