"""Every way of following, as tuned, on a mixture of Gaussians: modes hit, and the share of good samples."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLUE, COLOURS, LARGE, LINES, RED, SMALL, empty_figure, label_axes
from games.gan.methods import TUNED
from games.gan.mixtures import Mixture
from games.gan.run import by_method, final_quality, mixture_run, mixtures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mixture_experiment(name: str, methods: tuple[str, ...], *, seeds: int, evaluations: int) -> Experiment:
    """Every method, as tuned, on one mixture."""
    parts = tuple(
        Part(
            f"{method}-{seed}",
            mixture_run,
            {"mixture": name, "method": method, "seed": seed, "evaluations": evaluations, "keep_samples": seed == 0}
            | {"rate": TUNED[method].rate, "ratio": TUNED[method].ratio, "loss": TUNED[method].loss},
            seconds=evaluations / 800,
        )
        for method in methods
        for seed in range(seeds)
    )
    wanted = mixtures()[name]
    return Experiment(
        name,
        f"A generator on a {wanted.name} Gaussians, by how its discriminator follows",
        parts,
        partial(draw, wanted),
        partial(summarize, wanted),
        extra_figures={"samples": partial(draw_samples, wanted)},
    )


def succeeded(result: Result, modes: int) -> bool:
    """Whether a run ended with every mode and nine samples of ten near one."""
    end = final_quality(result)
    return bool(end["modes"] == modes and end["high_quality"] >= 0.9)


def summarize(wanted: Mixture, results: Results) -> str:
    """In how many seeds each method hit everything with 90 % of high quality."""
    modes = len(wanted.centres)
    phrases = [
        f"{method} {sum(succeeded(run, modes) for run in runs)} of {len(runs)}"
        for method, runs in by_method(results).items()
    ]
    return f"all {modes} modes with 90 % of high quality: {', '.join(phrases)}"


def rows(wanted: Mixture, results: Results, *, spread: bool = True) -> list[dict[str, str]]:
    """A table's rows: medians over seeds, with the lowest and highest if `spread`, of runs as they ended."""
    table = []
    for method, runs in by_method(results).items():
        ends = [final_quality(run) for run in runs]

        def over_seeds(key: str, digits: str, ends: list[Result] = ends) -> str:
            values = sorted(float(end[key]) for end in ends if end[key] is not None)
            if not values:
                return "none"
            middle, low, high = (f"{v:{digits}}" for v in (statistics.median(values), values[0], values[-1]))
            return f"{middle} ({low} to {high})" if spread else middle

        modes = len(wanted.centres)
        table.append(
            {
                "discriminator": method,
                f"all {modes} modes": f"{sum(end['modes'] == modes for end in ends)}/{len(ends)}",
                "modes": over_seeds("modes", ".0f"),
                "high quality": over_seeds("high_quality", ".2f"),
                "both": f"{sum(succeeded(run, modes) for run in runs)}/{len(runs)}",
                "reverse KL": over_seeds("reverse_kl", ".2f"),
                "variance": over_seeds("covariance_ratio", ".2f"),
                "seconds": "" if untimed(runs) else f"{statistics.median(end['seconds'] for end in ends):.0f}",
                "failed": str(sum("failure" in moment for run in runs for moment in run["moments"])),
            }
        )
    return table


def untimed(runs: Iterable[Result]) -> bool:
    """Whether a run's seconds were struck out, being those of a machine that others used too."""
    return any(moment.get("seconds", 0.0) is None for run in runs for moment in run["moments"])


def draw(wanted: Mixture, results: Results) -> Figure:
    """Modes and share of high quality against work and against seconds: medians, and the worst seed thin."""
    measures = (("modes", f"modes hit, of {len(wanted.centres)}"), ("high_quality", "share of high quality"))
    clocks = [("work", "gradients and products, thousands", 1e-3), ("seconds", "seconds, one core", 1.0)]
    if untimed(results.values()):
        clocks.pop()
        figure = empty_figure(13.0, 5.5)
        panels = figure.subplots(1, 2)[:, None]
    else:
        figure = empty_figure(13.0, 9.0)
        panels = figure.subplots(2, 2, sharey="row")
    for row, (key, said) in zip(panels, measures, strict=True):
        for axes, (clock, unit, scale) in zip(row, clocks, strict=True):
            for (method, runs), colour, line in zip(by_method(results).items(), COLOURS, LINES, strict=False):
                whole = [[m for m in run["moments"] if "failure" not in m] for run in runs]
                length = min(len(moments) for moments in whole)
                if length == 0:
                    continue
                x = [scale * statistics.median(m[i][clock] for m in whole) for i in range(length)]
                middle = [statistics.median(m[i][key] for m in whole) for i in range(length)]
                worst = [min(m[i][key] for m in whole) for i in range(length)]
                axes.plot(x, middle, line, color=colour, linewidth=2.2, label=method)
                axes.plot(x, worst, line, color=colour, linewidth=0.8, alpha=0.7)
            label_axes(axes, x=unit, y=said if axes is row[0] else "")
    # Outside of the panels, where it hides nothing.
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    figure.suptitle(f"{wanted.name.capitalize()} Gaussians: median of seeds thick, worst seed thin", fontsize=LARGE)
    return figure


def draw_samples(wanted: Mixture, results: Results) -> Figure:
    """A strip for each method: 500 samples of seed 0 as its work goes on, centres as rings."""
    strips = {
        method: [m for m in runs[0]["moments"] if "failure" not in m and "samples" in m]
        for method, runs in by_method(results).items()
    }
    columns = 5
    figure = empty_figure(1.9 * columns + 2.0, 1.9 * len(strips) + 0.5)
    panels = figure.subplots(len(strips), columns, squeeze=False)
    edge = 1.35 * float(wanted.centres.abs().max())
    for row, (method, moments) in zip(panels, strips.items(), strict=True):
        picked = [moments[round((len(moments) - 1) * i / (columns - 1))] for i in range(columns)] if moments else []
        for i, axes in enumerate(row):
            axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal", xticks=[], yticks=[])
            axes.scatter(*wanted.centres.T.tolist(), s=60, facecolors="none", edgecolors=RED, linewidths=0.8)
            if i < len(picked):
                x, y = zip(*picked[i]["samples"], strict=True)
                axes.scatter(x, y, s=3, color=BLUE, alpha=0.5, linewidths=0)
                if axes in panels[0]:
                    axes.set_title(f"{picked[i]['work'] / 1000:.0f} k", fontsize=SMALL)
        row[0].set_ylabel(method, fontsize=SMALL)
    figure.suptitle("Samples by gradients and products, seed 0", fontsize=LARGE)
    return figure
