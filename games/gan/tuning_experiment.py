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
    """Modes times high-quality share, by method and by those settings that some method was run with."""
    found = scores(results)
    shares = {m: {n: modes * quality / 8.0 for n, (modes, quality) in row.items()} for m, row in found.items()}
    numbers = sorted({number for row in shares.values() for number in row})
    figure = empty_figure(10.0, 1.9 + 0.5 * len(shares))
    axes = figure.add_subplot()
    table = [[row.get(number, math.nan) for number in numbers] for row in shares.values()]
    axes.set_facecolor("0.93")
    axes.imshow(table, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
    for i, row in enumerate(shares.values()):
        for j, number in enumerate(numbers):
            value = row.get(number)
            text, colour = (
                ("not run", "0.45") if value is None else (f"{value:.2f}", "white" if value > 0.6 else "black")
            )
            axes.text(j, i, text, ha="center", va="center", fontsize=SMALL - (value is None), color=colour)
    axes.set_xticks([j + 0.5 for j in range(len(numbers) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(table) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=2.0)
    chosen = [SETTINGS[number] for number in numbers]
    axes.set_xticks(range(len(numbers)), [f"{s.loss}\nrate {s.rate:g}, \u00d7{s.ratio:g}" for s in chosen])
    axes.set_yticks(range(len(table)), list(shares))
    title = "Share of modes hit times share of samples of high quality (1 is best)"
    label_axes(
        axes,
        x="loss; the generator's rate, and how many times that the discriminator's is",
        y="",
        title=title,
        grid=False,
    )
    axes.tick_params(which="minor", length=0)
    axes.tick_params(axis="x", labelsize=SMALL - 2 - 2 * (len(numbers) > 5))
    axes.xaxis.label.set_fontsize(SMALL)
    axes.title.set_fontsize(SMALL)
    return figure
