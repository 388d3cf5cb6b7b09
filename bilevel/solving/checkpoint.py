"""A run on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import CheckpointError

FORMAT = 2


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint beside `path`, then put it in its place at once."""
    beside = path.with_name(path.name + ".part")
    torch.save({"format": FORMAT, **content}, beside)
    os.replace(beside, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`; raises `CheckpointError` when it is none."""
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: {type(error).__name__}. Delete it to start anew."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of bilevel. Delete it to start anew.")
    return content
