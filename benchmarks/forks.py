"""Ranks that are forks of this process: what they need is imported once."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def forked(function: Callable[[], Any], size: int) -> list[Any]:
    """What each of so many ranks returns, as JSON keeps it; they meet by gloo where they are several. Needs POSIX.

    Raises:
        RuntimeError: Where one of them failed, whose traceback is on stderr.
    """
    torch.set_num_threads(1)  # before the fork: threads do not come along
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(function, Path(folder), rank, size) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            raise RuntimeError(f"ranks ended by {codes}")
        return [json.loads((Path(folder) / str(rank)).read_text(encoding="utf-8")) for rank in range(size)]


def _fork(function: Callable[[], Any], folder: Path, rank: int, size: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if size > 1:
            distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
        (folder / str(rank)).write_text(json.dumps(function()), encoding="utf-8")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
