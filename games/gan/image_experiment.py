"""Every way of following, as tuned on the ring, on images of digits: the distance of samples from real ones."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import numpy as np

from games.experiments.experiment import Experiment, Part, Results
from games.experiments.style import COLOURS, LINES, SMALL, empty_figure, label_axes
from games.gan.images import image_run
from games.gan.methods import TUNED
from games.gan.run import by_method, final_moment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_experiment(name: str, methods: tuple[str, ...], *, seeds: int, evaluations: int) -> Experiment:
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
        name,
        f"A generator of {size} digits, by how its discriminator follows",
        parts,
        draw,
        summarize,
    )


def summarize(results: Results) -> str:
    """The Frechet distance that each ended at, beside that of real images to real ones."""
    phrases = []
    for method, runs in by_method(results).items():
        ends = [m for m in (final_moment(run) for run in runs) if m is not None]
        middle = f"{statistics.median(m['frechet'] for m in ends):.1f}" if ends else "failed"
        phrases.append(f"{method} {middle}")
    one = next(iter(results.values()))
    return (
        f"Frechet distance of a classifier's features (test accuracy {one['accuracy']:.2f}), median of seeds: "
        f"{', '.join(phrases)}; real images {one['floor']:.2f}"
    )


def draw(results: Results) -> Figure:
    """The distance against work and seconds, and below twenty samples of each method."""
    found = by_method(results)
    figure = empty_figure(13.0, 5.5 + 1.3 * len(found))
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
        label_axes(axes, x=unit, y="Frechet distance" if axes is panels[0] else "")
    handles, labels = panels[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    sheets = bottom.subplots(len(found), 1, squeeze=False)
    for (axes,), (method, runs) in zip(sheets, found.items(), strict=True):
        end, (height, width) = final_moment(runs[0]), runs[0]["shape"]
        if end is not None and "samples" in end:
            images = np.array(end["samples"], dtype=np.uint8).reshape(-1, height, width)
            axes.imshow(np.hstack(list(np.pad(images, ((0, 0), (0, 0), (0, 1))))), cmap="gray_r", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(method, fontsize=SMALL, rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)
    return figure
