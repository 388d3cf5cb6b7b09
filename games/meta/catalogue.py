"""The experiments of `bilevel meta`: their parts, figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from games.experiments.experiment import Experiment, Part, Results
from games.experiments.style import COLOURS, SMALL, empty_figure, label_axes
from games.meta.run import BY_HAND, DIGITS, SINUSOID, digits, sinusoid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED = {
    ("MAML", 5): "1.13 ± .18",
    ("MAML", 10): ".77 ± .11",
    ("MAML", 20): ".48 ± .08",
    ("Meta-SGD", 5): ".90 ± .16",
    ("Meta-SGD", 10): ".53 ± .09",
    ("Meta-SGD", 20): ".31 ± .05",
}
"""Mean squared errors of arXiv 1707.09835's table, after training and testing with as many shots; not verified."""


def experiments(*, shots: Sequence[int], steps: int, tasks: int, held_out: int, seed: int) -> dict[str, Experiment]:
    """All of them by name."""
    common = {"steps": steps, "tasks": tasks, "held_out": held_out, "seed": seed}
    sines = tuple(
        Part(f"{method}, {count} shots", sinusoid, {"method": method, "shots": count, **common}, steps / 100)
        for count in shots
        for method in SINUSOID
        if method != BY_HAND or count == shots[0]  # it takes the same steps as MAML, more slowly
    )
    turned = tuple(Part(method, digits, {"method": method, **common}, steps / 50) for method in DIGITS)
    return {
        "sinusoid": Experiment("sinusoid", "Mean squared error on new sine curves, one step", sines, _draw, _told),
        "digits": Experiment("digits", "Accuracy on new digits, 5-way 1-shot, five steps", turned, _draw, _told),
    }


def rows(name: str, results: Results) -> list[dict[str, str]]:
    """A table: a row a run, the published number beside it where there is one."""
    found = []
    for part, result in results.items():
        row = {"run": part, "new tasks": f"{result['mean']:.3f} ± {result['half_width']:.3f}"}
        if name == "sinusoid":
            method, _, count = part.rpartition(", ")
            row["arXiv 1707.09835 (not verified)"] = PUBLISHED.get((method, int(count.split()[0])), "")
        found.append(row | {"meta-iterations": f"{result['steps']:,}", "seconds": f"{result['training_seconds']:.0f}"})
    return found


def _told(results: Results) -> str:
    return ", ".join(f"{part}: {r['mean']:.3f} ± {r['half_width']:.3f}" for part, r in results.items())


def _draw(results: Results) -> Figure:
    """The loss on the training tasks' queries over the run."""
    figure = empty_figure(width=8.0, height=5.0)
    axes = figure.subplots()
    for number, (part, result) in enumerate(results.items()):
        curve = result["curve"]
        if curve["step"]:
            axes.plot(curve["step"], curve["loss"], color=COLOURS[number % len(COLOURS)], label=part)
    label_axes(axes, x="meta-iteration", y="query loss of training tasks")
    axes.set_yscale("log")
    axes.legend(fontsize=SMALL, frameon=False)
    return figure
