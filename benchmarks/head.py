"""What every benchmark's JSON begins with: the machine, the versions and the seed that its numbers were made with."""

from __future__ import annotations

from typing import Any

from games.experiments.provenance import provenance


def head(*packages: str, seed: int = 0) -> dict[str, Any]:
    """The head, with the versions of those of `packages` that are there; call it when the threads are set."""
    return {**provenance(*packages), "seed": seed}
