"""Every experiment, in the paper's order; then what its slides leave open."""

from __future__ import annotations

from games.experiments.experiment import Experiment
from games.paper import (
    discrete,
    distillation,
    dropout,
    exploration,
    figure2,
    figure3,
    figure4,
    figure5,
    implicit,
    inner_optimizer,
    learned_scale,
    many,
)


def experiments() -> dict[str, Experiment]:
    """Name -> experiment."""
    figures = (figure2, figure3, figure4, figure5, many, dropout, distillation)
    limits = (inner_optimizer, discrete, learned_scale, exploration, implicit)
    return {module.EXPERIMENT.name: module.EXPERIMENT for module in (*figures, *limits)}
