"""A file of plain data and tensors: written whole or not at all, checked when read, read without running code.

The file is `torch.save`'s, with a digest of its bytes after its end. It is written under a name of its own beside the
target, brought to the disk, and then put in the target's place at once.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import CheckpointError

FORMAT = 3

_MARK = b"bilevel.sha256."
_END = len(_MARK) + hashlib.sha256().digest_size
_ABANDONED = 3600.0  # seconds after which nobody is still writing a file: a save takes seconds


def save(path: Path, content: Mapping[str, Any], *, check: bool = False) -> None:
    """Write a checkpoint; a link is followed, and what was there stays whole when it fails.

    Args:
        path: where to, in a folder that exists.
        content: dicts, lists, numbers, strings and tensors.
        check: whether to read it back before it takes its place, for content that `torch.save` writes and nobody can
            read, such as an object of a user's class.

    Raises:
        CheckpointError: in one line, where it cannot be written, or not be read back.
    """
    try:
        data = _encoded(content)
        if check:
            _decoded(data)
    except Exception as error:
        told = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"Cannot save {path}: torch.load(..., weights_only=True) could not read it back ({told}). States and "
            "schedulers may hold tensors, numbers, strings, lists and dicts."
        ) from error
    try:
        target = Path(os.path.realpath(path))
        _replace(target, data + _MARK + hashlib.sha256(data).digest())
    except OSError as error:
        raise CheckpointError(
            f"Cannot write the checkpoint {path}: {error.strerror or error}. What was there before is whole."
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: in one line, where it cannot be read, is damaged, of another format, or none at all.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {path}: {error.strerror or error}.") from error
    data, end = (data[:-_END], data[-_END:]) if data[-_END:].startswith(_MARK) else (data, b"")
    if end and end != _MARK + hashlib.sha256(data).digest():
        raise CheckpointError(f"The checkpoint {path} is damaged: its checksum does not hold. Delete it to start anew.")
    try:
        content = _decoded(data)
    except Exception as error:
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: {type(error).__name__}. Delete it to start anew."
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found == FORMAT and not end:
        raise CheckpointError(f"The checkpoint {path} is damaged: its checksum is missing. Delete it to start anew.")
    if found != FORMAT:
        told = f"of format {found}, and this version of bilevel reads format {FORMAT}" if found else "of something else"
        raise CheckpointError(f"The checkpoint {path} is {told}. Delete it to start anew.")
    return content  # type: ignore[no-any-return]


def _encoded(content: Mapping[str, Any]) -> bytes:
    # In memory, and not straight to the disk: torch's own writer tells of a full disk without saying so.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    return buffer.getvalue()


def _decoded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _replace(target: Path, data: bytes) -> None:
    """Put a file of these bytes in a target's place; nothing is left beside it when that fails."""
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
    """Remove what a process that was killed while it wrote has left beside a checkpoint."""
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
