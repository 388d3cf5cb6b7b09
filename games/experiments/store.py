"""A folder of finished and unfinished work, where a later run finds what it need not do again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from bilevel.errors import CheckpointError
from bilevel.files import remove_abandoned, write_whole
from bilevel.solving import checkpoint as checkpoints
from games.experiments.experiment import Result

DIGEST = "sha256:"
Identity = Mapping[str, Any]
"""What makes a piece of work this one and no other (settings, data, code), as what JSON can hold."""


@final
@dataclass(frozen=True)
class Store:
    """Files in `folder`: NAME.json for a finished result, NAME.pt for the checkpoint of a run that may go on.

    Both are known by an identity. A result of another identity, or a file that was never finished, counts as missing:
    the work is done again. A checkpoint of another identity is refused, since hours of work may be in it.
    A file is written whole or not at all, so that a run that is killed loses nothing that it had finished.
    """

    folder: Path

    def load(self, name: str, identity: Identity) -> Result | None:
        """The finished result of this name and identity; None when there is none."""
        try:
            content = json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("identity") != as_json(identity):
            return None
        result: Result | None = content.get("result")
        return result

    def save(self, name: str, identity: Identity, result: Result) -> Result:
        """Keep a finished result; returns it as `load` will, so that a resumed run has the same numbers."""
        written: Result = as_json(result)
        write_json(self.file(name), {"identity": as_json(identity), "result": written})
        return written

    def discard(self, name: str) -> None:
        """Forget the result of this name, if there is one."""
        self.file(name).unlink(missing_ok=True)

    def checkpoint(
        self, name: str, identity: Identity, *, steps: int, resume: bool, accepted: Collection[str] = (), hint: str = ""
    ) -> Path:
        """The file for `bl.solve(checkpoint=file)` of a run of so many steps.

        With `resume` a checkpoint that is there is continued, bit for bit; without it, it is deleted. Parts of the
        identity that are `accepted` may be others now. Raises `CheckpointError`, whose end is the `hint`, for one of
        another identity, one that cannot be read, or one that is beyond `steps`.
        """
        path, beside = self.file(name).with_suffix(".pt"), self.file(name)
        if resume and path.exists():
            wanted = as_json(identity)
            _check_identity(path, beside, {k: part for k, part in wanted.items() if k not in accepted}, hint)
            if accepted:
                write_json(beside, {"identity": wanted})
            done = checkpoints.load(path)["step"]
            if done > steps:
                raise CheckpointError(
                    f"{path} is at step {done}, beyond steps={steps}. Ask for as many or more, or start anew."
                )
            return path
        path.unlink(missing_ok=True)
        write_json(beside, {"identity": as_json(identity)})
        return path

    def file(self, name: str) -> Path:
        """Where the result of this name is: what is no letter, digit or one of -_.= becomes _."""
        return self.folder / f"{''.join(c if c.isalnum() or c in '-_.=' else '_' for c in name)}.json"


def _check_identity(checkpoint: Path, beside: Path, identity: Mapping[str, Any], hint: str) -> None:
    try:
        saved = json.loads(beside.read_text(encoding="utf-8"))["identity"]
        differing = [change for key in identity for change in _changes(key, saved.get(key), identity[key])]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{beside} does not say what run {checkpoint} is of; it may be another, or of an older version. "
            "Start anew, or choose another folder."
        ) from error
    if differing:
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of another run: {', '.join(differing)}.{hint and ' '}{hint}"
        )


def _changes(path: str, saved: Any, present: Any) -> list[str]:
    """Where two parts of identities differ, in words."""
    if saved == present:
        return []
    if isinstance(saved, Mapping) and isinstance(present, Mapping) and all(map(_is_digest, present.values())):
        keys = dict.fromkeys((*saved, *present))
        return [change for key in keys for change in _changes(str(key), saved.get(key), present.get(key))]
    if _is_digest(saved) or _is_digest(present):
        what = "has another content now" if _is_digest(saved) and _is_digest(present) else "was there alone"
        return [f"{path} {what if saved else 'is new'}"]
    return [f"{path} {saved!r}, here {present!r}"]


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(DIGEST)


def digest(*contents: bytes) -> str:
    """Of a content, for an identity; where it differs, that is told and the digits are not."""
    total = hashlib.sha256()
    for content in contents:
        total.update(hashlib.sha256(content).digest())  # so that where one ends counts
    return f"{DIGEST}{total.hexdigest()[:16]}"


def as_json(tree: Any) -> Any:
    """What JSON can hold: tensors and arrays as lists, numbers with seven digits, NaN and infinity as null."""
    if isinstance(tree, Mapping):
        return {str(key): as_json(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [as_json(value) for value in tree]
    if isinstance(tree, (torch.Tensor, np.ndarray, np.generic)):
        return as_json(tree.tolist())
    if isinstance(tree, float):  # seven digits are what float32 has, and more than any figure shows
        return float(f"{tree:.7g}") if math.isfinite(tree) else None
    return tree


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write all of it or nothing; makes the folder. Raises `ValueError` for NaN and infinity."""
    text = json.dumps(content, indent=indent, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    write_whole(path, f"{text}\n".encode())
