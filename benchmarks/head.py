"""What every benchmark's JSON begins with: the machine, the versions and the seed that its numbers were made with."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def head(*packages: str, seed: int = 0) -> dict[str, Any]:
    """The head, with the versions of those of `packages` that are there; call it when the threads are set."""
    versions = {}
    for name in dict.fromkeys(("torch", "bilevel", *packages)):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "machine": {"platform": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **versions},
        "seed": seed,
    }


def _processor() -> str:
    """Its name, which Linux tells in a file of its own."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
