"""A file of plain data and tensors: written whole or not at all, checked when read, read without running code.

The file is `torch.save`'s, with a digest of its bytes after its end.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import CheckpointError
from bilevel.files import write_whole

FORMAT = 3

_MARK = b"bilevel.sha256."
_END = len(_MARK) + hashlib.sha256().digest_size


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
        write_whole(path, data + _MARK + hashlib.sha256(data).digest())
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
