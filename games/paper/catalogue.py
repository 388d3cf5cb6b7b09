"""Every experiment, in the paper's order."""

from __future__ import annotations

from games.paper import figure2, figure4, figure5
from games.paper.experiment import Experiment


def experiments() -> dict[str, Experiment]:
    """Name -> experiment."""
    return {module.EXPERIMENT.name: module.EXPERIMENT for module in (figure2, figure4, figure5)}
