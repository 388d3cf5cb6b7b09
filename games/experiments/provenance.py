"""Where numbers come from: the machine and the versions that a file of results begins with."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(*packages: str) -> dict[str, Any]:
    """The "machine" and the "versions": Python's, torch's, this library's, and those of `packages` that are installed.

    Call it when the number of threads is set, which is among them.
    """
    versions = {"python": platform.python_version()}
    for name in dict.fromkeys(("torch", "bilevel", *packages)):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    machine = {"platform": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()}
    return {"machine": machine, "versions": versions}


def _processor() -> str:
    """Its name, which Linux tells in a file of its own."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
