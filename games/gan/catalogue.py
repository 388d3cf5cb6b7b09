"""The experiments of `bilevel gan`, in parts that run side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from games.gan.images import image_run
from games.gan.methods import FINALISTS, METHODS, SETTINGS, TUNED
from games.gan.mixtures import Mixture
from games.gan.run import last, mixture_run, mixtures
from games.paper.experiment import Experiment, Part, Result, Results
from games.paper.style import BLUE, COLOURS, LARGE, LINES, RED, SMALL, blank, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING_SEEDS = (100, 101)


def experiments(
    *, seeds: int = 10, evaluations: int = 40_000, methods: tuple[str, ...] = tuple(METHODS)
) -> dict[str, Experiment]:
    """All of them by name; tuning is on seeds that the others do not use.

    Images are tried on 3 seeds at most, with a quarter of the evaluations for digits and an eighth for mnist.
    """
    found = [
        tuning("tuning", {method: tuple(range(len(SETTINGS))) for method in methods}, evaluations=8_000),
        tuning("finals", {method: FINALISTS[method] for method in methods}, evaluations=30_000),
        *(mixture(name, methods, seeds=seeds, evaluations=evaluations) for name in ("ring", "grid")),
        *(
            pictures(name, methods, seeds=min(seeds, 3), evaluations=-(-evaluations // share))
            for name, share in (("digits", 4), ("mnist", 8))
        ),
    ]
    return {experiment.name: experiment for experiment in found}


def tuning(name: str, tried: dict[str, tuple[int, ...]], *, evaluations: int) -> Experiment:
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
    return Experiment(name, title, parts, draw_tuning, see_tuning)


def scores(results: Results) -> dict[str, dict[int, tuple[float, float]]]:
    """By method and setting: the mean number of modes and the mean share of high quality, over seeds."""
    ends: dict[str, dict[int, list[Result]]] = {}
    for name, result in results.items():
        method, number, _ = name.rsplit("-", 2)
        ends.setdefault(method, {}).setdefault(int(number), []).append(last(result))
    return {
        method: {
            number: (statistics.mean(end["modes"] for end in some), statistics.mean(e["high_quality"] for e in some))
            for number, some in row.items()
        }
        for method, row in ends.items()
    }


def see_tuning(results: Results) -> str:
    """The best setting of each loss: most modes times quality."""
    told = []
    for method, row in scores(results).items():
        for loss in dict.fromkeys(setting.loss for setting in SETTINGS):
            numbers = [number for number in row if SETTINGS[number].loss == loss]
            if numbers:
                best = max(numbers, key=lambda number: row[number][0] * row[number][1])
                told.append(f"{method}, {loss}: setting {best}, {row[best][0]:g} modes, {row[best][1]:.2f}")
    return "; ".join(told)


def draw_tuning(results: Results) -> Figure:
    """Modes times high-quality share, by method and setting."""
    figure = blank(10.0, 5.0)
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
    tidy(axes, x="generator's rate, the discriminator's multiple, loss", y="", grid=False)
    axes.tick_params(axis="x", labelsize=SMALL - 4)
    axes.set_title("Share of modes hit times share of high quality", fontsize=SMALL)
    return figure


def mixture(name: str, methods: tuple[str, ...], *, seeds: int, evaluations: int) -> Experiment:
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
        partial(draw_mixture, wanted),
        partial(see_mixture, wanted),
        more={"samples": partial(draw_samples, wanted)},
    )


def by_method(results: Results) -> dict[str, list[Result]]:
    """The runs of each method, by seed."""
    found: dict[str, list[Result]] = {}
    for name, result in results.items():
        found.setdefault(name.rpartition("-")[0], []).append(result)
    return found


def succeeded(result: Result, modes: int) -> bool:
    """Whether a run ended with every mode and nine samples of ten near one."""
    end = last(result)
    return bool(end["modes"] == modes and end["high_quality"] >= 0.9)


def see_mixture(wanted: Mixture, results: Results) -> str:
    """In how many seeds each method hit everything with 90 % of high quality."""
    modes = len(wanted.centres)
    told = [
        f"{method} {sum(succeeded(run, modes) for run in runs)} of {len(runs)}"
        for method, runs in by_method(results).items()
    ]
    return f"all {modes} modes with 90 % of high quality: {', '.join(told)}"


def rows(wanted: Mixture, results: Results, *, spread: bool = True) -> list[dict[str, str]]:
    """A table's rows: medians over seeds, with the lowest and highest if `spread`, of runs as they ended."""
    table = []
    for method, runs in by_method(results).items():
        ends = [last(run) for run in runs]

        def told(key: str, digits: str, ends: list[Result] = ends) -> str:
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
                "modes": told("modes", ".0f"),
                "high quality": told("high_quality", ".2f"),
                "both": f"{sum(succeeded(run, modes) for run in runs)}/{len(runs)}",
                "reverse KL": told("reverse_kl", ".2f"),
                "variance": told("covariance_ratio", ".2f"),
                "seconds": "" if untimed(runs) else f"{statistics.median(end['seconds'] for end in ends):.0f}",
                "failed": str(sum("failure" in moment for run in runs for moment in run["moments"])),
            }
        )
    return table


def untimed(runs: Iterable[Result]) -> bool:
    """Whether a run's seconds were struck out, being those of a machine that others used too."""
    return any(moment.get("seconds", 0.0) is None for run in runs for moment in run["moments"])


def draw_mixture(wanted: Mixture, results: Results) -> Figure:
    """Modes and share of high quality against work and against seconds: medians, and the worst seed thin."""
    measures = (("modes", f"modes hit, of {len(wanted.centres)}"), ("high_quality", "share of high quality"))
    clocks = [("work", "gradients and products, thousands", 1e-3), ("seconds", "seconds, one core", 1.0)]
    if untimed(results.values()):
        clocks.pop()
        figure = blank(13.0, 5.5)
        panels = figure.subplots(1, 2)[:, None]
    else:
        figure = blank(13.0, 9.0)
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
            tidy(axes, x=unit, y=said if axes is row[0] else "")
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
    figure = blank(1.9 * columns + 2.0, 1.9 * len(strips) + 0.5)
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


def pictures(name: str, methods: tuple[str, ...], *, seeds: int, evaluations: int) -> Experiment:
    """Every method, as tuned on the ring, on images of digits."""
    parts = tuple(
        Part(
            f"{method}-{seed}",
            image_run,
            {"images": name, "method": method, "seed": seed, "evaluations": evaluations, "keep_samples": seed == 0}
            | {"rate": TUNED[method].rate, "ratio": TUNED[method].ratio, "loss": TUNED[method].loss},
            seconds=evaluations / (150 if name == "digits" else 30),
        )
        for method in methods
        for seed in range(seeds)
    )
    size = "8 x 8" if name == "digits" else "28 x 28"
    return Experiment(
        name, f"A generator of {size} digits, by how its discriminator follows", parts, draw_pictures, see_pictures
    )


def see_pictures(results: Results) -> str:
    """The Frechet distance that each ended at, beside that of real images to real ones."""
    told = []
    for method, runs in by_method(results).items():
        ends = [m for m in (ending(run) for run in runs) if m is not None]
        middle = f"{statistics.median(m['frechet'] for m in ends):.1f}" if ends else "failed"
        told.append(f"{method} {middle}")
    one = next(iter(results.values()))
    return (
        f"Frechet distance of a classifier's features (test accuracy {one['accuracy']:.2f}), median of seeds: "
        f"{', '.join(told)}; real images {one['floor']:.2f}"
    )


def draw_pictures(results: Results) -> Figure:
    """The distance against work and seconds, and below twenty samples of each method."""
    found = by_method(results)
    figure = blank(13.0, 5.5 + 1.3 * len(found))
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(5.5, 1.3 * len(found)))[:, 0]
    floor = next(iter(results.values()))["floor"]
    clocks = (("work", "gradients and products, thousands", 1e-3), ("seconds", "seconds, one core", 1.0))
    panels = top.subplots(1, 2, sharey=True)
    for axes, (clock, unit, scale) in zip(panels, clocks, strict=True):
        for (method, runs), colour, line in zip(found.items(), COLOURS, LINES, strict=False):
            whole = [[m for m in run["moments"] if "failure" not in m] for run in runs]
            length = min(len(moments) for moments in whole)
            x = [scale * statistics.median(m[i][clock] for m in whole) for i in range(length)]
            y = [statistics.median(m[i]["frechet"] for m in whole) for i in range(length)]
            axes.plot(x, y, line, color=colour, linewidth=2.2, label=method)
        axes.axhline(floor, color="0.5", linewidth=1.5, label="real images")
        axes.set_yscale("log")
        tidy(axes, x=unit, y="Frechet distance" if axes is panels[0] else "")
    handles, labels = panels[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    sheets = bottom.subplots(len(found), 1, squeeze=False)
    for (axes,), (method, runs) in zip(sheets, found.items(), strict=True):
        end, (height, width) = ending(runs[0]), runs[0]["shape"]
        if end is not None and "samples" in end:
            images = np.array(end["samples"], dtype=np.uint8).reshape(-1, height, width)
            axes.imshow(np.hstack(list(np.pad(images, ((0, 0), (0, 0), (0, 1))))), cmap="gray_r", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(method, fontsize=SMALL, rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)
    return figure


def ending(result: Result) -> Result | None:
    """A run's last look at its generator, if it had one."""
    whole = [moment for moment in result["moments"] if "failure" not in moment]
    return whole[-1] if whole else None
