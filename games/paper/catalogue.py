"""Every experiment, in the paper's order."""

from __future__ import annotations

from games.paper.experiment import Experiment


def experiments() -> dict[str, Experiment]:
    """Name -> experiment."""
    return {}
