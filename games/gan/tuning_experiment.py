"""Which settings suit each way of following, tried on the ring on seeds that no other experiment uses."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import SMALL, empty_figure, label_axes
from games.gan.methods import SETTINGS
from games.gan.run import final_quality, mixture_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING_SEEDS = (100, 101)


def tuning_experiment(name: str, tried: dict[str, tuple[int, ...]], *, evaluations: int) -> Experiment:
    """Each method on some of `SETTINGS`, by number, on the ring."""
    parts = tuple(
        Part(
            f"{method}-{number}-{seed}",
            mixture_run,
            {"mixture": "ring", "method": method, "seed": seed, "evaluations": evaluations, "moments": 4}
            | {"rate": SETTINGS[number].rate, "ratio": SETTINGS[number].ratio, "loss": SETTINGS[number].loss},
            seconds=evaluations / 400,
        )
        for method, numbers in tried.items()
        for number in numbers
        for seed in TUNING_SEEDS
    )
    title = f"The same settings for every method, {evaluations:,} gradients and products"
    return Experiment(name, title, parts, draw, summarize)


def scores(results: Results) -> dict[str, dict[int, tuple[float, float]]]:
    """By method and setting: the mean number of modes and the mean share of high quality, over seeds."""
    ends: dict[str, dict[int, list[Result]]] = {}
    for name, result in results.items():
        method, number, _ = name.rsplit("-", 2)
        ends.setdefault(method, {}).setdefault(int(number), []).append(final_quality(result))
    return {
        method: {
            number: (statistics.mean(end["modes"] for end in some), statistics.mean(e["high_quality"] for e in some))
            for number, some in row.items()
        }
        for method, row in ends.items()
    }


def summarize(results: Results) -> str:
    """The best setting of each loss: most modes times quality."""
    phrases = []
    for method, row in scores(results).items():
        for loss in dict.fromkeys(setting.loss for setting in SETTINGS):
            numbers = [number for number in row if SETTINGS[number].loss == loss]
            if numbers:
                best = max(numbers, key=lambda number: row[number][0] * row[number][1])
                phrases.append(f"{method}, {loss}: setting {best}, {row[best][0]:g} modes, {row[best][1]:.2f}")
    return "; ".join(phrases)


def draw(results: Results) -> Figure:
    """Modes times high-quality share, by method and setting."""
    figure = empty_figure(10.0, 5.0)
    axes = figure.add_subplot()
    found = scores(results)
    shares = {m: {n: modes * quality / 8.0 for n, (modes, quality) in row.items()} for m, row in found.items()}
    table = [[row.get(number, math.nan) for number in range(len(SETTINGS))] for row in shares.values()]
    axes.imshow(table, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    for i, row in enumerate(shares.values()):
        for j, value in row.items():
            colour = "white" if value > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=SMALL, color=colour)
    labels = [f"{s.rate:g}\n\u00d7{s.ratio:g}\n{s.loss}" for s in SETTINGS]
    axes.set_xticks(range(len(SETTINGS)), labels)
    axes.set_yticks(range(len(table)), list(shares))
    label_axes(axes, x="generator's rate, the discriminator's multiple, loss", y="", grid=False)
    axes.tick_params(axis="x", labelsize=SMALL - 4)
    axes.set_title("Share of modes hit times share of high quality", fontsize=SMALL)
    return figure
