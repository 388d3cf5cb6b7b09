"""What runs of the decay game came to: a table, results.json and two figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from games.experiments.data import Digits
from games.experiments.provenance import provenance
from games.experiments.store import write_json
from games.problems.decay import START
from games.tuning.figures import draw_decay, draw_losses
from games.tuning.run import Trained, Tuned


def table(digits: Digits, before: Trained, runs: Mapping[str, Tuned]) -> Table:
    """One column before tuning and one for each run; one row for each figure of merit."""
    shown = Table(
        title=f"One log decay a weight, tuned on {digits.name}",
        caption=(
            f"Above the line, every column is the same classifier trained to convergence (L-BFGS) on the same "
            f"{len(digits.train):,} examples; before: every log decay at {START:g}, after: at the learned decay. "
            "Differences are the decay's, not those of training time. The decay was chosen on the "
            "validation examples, so judge it by the test rows. Losses are cross-entropies in nats, without penalty."
        ),
        caption_justify="left",
    )
    shown.add_column("")
    for name in ("before", *runs):
        shown.add_column(name, justify="right", no_wrap=True)
    after = {name: run.after for name, run in runs.items()}
    points = [before, *after.values()]
    shown.add_row("validation loss", *[f"{point.valid.loss:.4f}" for point in points])
    shown.add_row("validation accuracy", *[f"{100 * point.valid.accuracy:.1f} %" for point in points])
    shown.add_row("test loss", *[f"{point.test.loss:.4f}" for point in points])
    shown.add_row("test accuracy", *[f"{100 * point.test.accuracy:.1f} %" for point in points])
    changes = [point.test.loss - before.test.loss for point in after.values()]
    shown.add_row("change in test loss", "", *[f"{change:+.4f}" for change in changes])
    shown.add_row("gradient left by training", *[f"{point.gradient_norm:.0e}" for point in points], end_section=True)
    solutions = [run.solution for run in runs.values()]
    shown.add_row("tuning steps", "", *[str(len(s.history)) for s in solutions])
    shown.add_row("gradients", "", *[f"{s.gradients:,}" for s in solutions])
    shown.add_row("Hessian-vector products", "", *[f"{s.products:,}" for s in solutions])
    shown.add_row("seconds", "", *[f"{s.seconds:.1f}" for s in solutions])
    shown.add_row("stationarity", "", *[_small(s.stationarity.get("weights")) for s in solutions])
    shown.add_row("derivative residual", "", *[_small(s.residuals.get("weights")) for s in solutions])
    return shown


def warnings_of(runs: Mapping[str, Tuned]) -> list[str]:
    """Everything that the solutions warn of, each with its run's name."""
    return [f"{name}: {warning}" for name, run in runs.items() for warning in run.solution.warnings]


def write_results(path: Path, digits: Digits, before: Trained, runs: Mapping[str, Tuned], *, seed: int) -> None:
    """Everything that the table and the figures are made of, with settings, versions and machine, as JSON."""
    content: dict[str, Any] = {
        "data": {
            "name": digits.name,
            **{part: len(getattr(digits, part)) for part in ("train", "valid", "test")},
        },
        "seed": seed,
        "start": START,
        **provenance("numpy", "scipy"),
        "before": asdict(before),
        "runs": {
            name: {
                "response": repr(run.method.response),
                "learning_rate": run.method.learning_rate,
                "steps": len(run.solution.history),
                "after": asdict(run.after),
                "change_in_test_loss": run.after.test.loss - before.test.loss,
                "gradients": run.solution.gradients,
                "products": run.solution.products,
                "seconds": run.solution.seconds,
                "stationarity": run.solution.stationarity["weights"],
                "linear_residual": run.solution.residuals.get("weights"),
                "warnings": list(run.solution.warnings),
                "history": run.solution.history,
            }
            for name, run in runs.items()
        },
    }
    write_json(path, _without_nan(content), indent=1)


def draw(folder: Path, digits: Digits, runs: Mapping[str, Tuned]) -> None:
    """losses.png and decay.png."""
    records = {
        name: [
            {"work": r["work"], "leader_loss": r["decay"], "follower_loss": r["weights"]} for r in run.solution.history
        ]
        for name, run in runs.items()
    }
    test = {name: (run.after.test.loss, run.after.test.accuracy) for name, run in runs.items()}
    draw_losses(records, folder / "losses.png", test=test)
    draw_decay(
        {name: run.decay["weight"].T for name, run in runs.items()},
        folder / "decay.png",
        classes=digits.classes,
        centre=START,
        image_shape=digits.image_shape,
    )


def _small(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.1e}"


def _without_nan(tree: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(tree, dict):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
