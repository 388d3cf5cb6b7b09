"""Figures of tuning: losses over work, and the learned decay of every weight as an image."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from games.experiments.style import COLOURS, LARGE, LINES, SMALL, empty_figure, label_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, float]]
"""One run: its records in order, each with `work`, `leader_loss` and `follower_loss`."""


def draw_losses(
    runs: Mapping[str, Records],
    path: str | os.PathLike[str],
    *,
    test: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Writes `losses_figure(runs, test=test)` to `path`, in the format that its suffix names."""
    save_figure(losses_figure(runs, test=test), path)


def draw_decay(
    decays: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str],
    centre: float,
    image_shape: tuple[int, int] = (28, 28),
) -> None:
    """Writes `decay_figure(decays, ...)` to `path`, in the format that its suffix names."""
    save_figure(decay_figure(decays, classes=classes, centre=centre, image_shape=image_shape), path)


def losses_figure(
    runs: Mapping[str, Records],
    *,
    test: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Validation loss (above) and training loss (below) of each method over the work it took.

    `runs[method]` are records with `work` (in gradient equivalents, not decreasing), `leader_loss` and
    `follower_loss` (nats an example). `test[method]` is the test loss in nats, drawn as a diamond where the run ends,
    and the test accuracy from 0 to 1, written in the legend. Work that spans a decade or more is on a log scale,
    linear below its least positive value, so that methods of different cost and a record at work 0 share one axis.

    Raises `ValueError` for no runs or more than seven, an empty run, a missing key, a value that is not finite, work
    that is negative or decreases, and a test result of a method without a run; `MissingExtraError` without matplotlib.

    >>> records = [
    ...     {"work": 120, "leader_loss": 0.52, "follower_loss": 0.03},
    ...     {"work": 240, "leader_loss": 0.41, "follower_loss": 0.08},
    ... ]
    >>> figure = losses_figure({"implicit": records}, test={"implicit": (0.43, 0.89)})
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['validation loss (nats)', 'training loss (nats)']
    """
    _check_runs(runs, test or {})
    figure = empty_figure(width=8.0, height=8.8)
    valid_axes, train_axes = figure.subplots(2, 1, sharex=True)
    for (method, records), colour, line in zip(runs.items(), COLOURS, LINES, strict=False):
        work = [record["work"] for record in records]
        label = method
        if test and method in test:
            loss, accuracy = test[method]
            label = f"{method}: test {loss:.3f} nats, {100 * accuracy:.1f} %"
            valid_axes.plot(
                work[-1:], [loss], "D", color=colour, markersize=10, markeredgecolor="black", zorder=3, clip_on=False
            )
        for axes, key in ((valid_axes, "leader_loss"), (train_axes, "follower_loss")):
            values = [record[key] for record in records]
            # One record is a point; a line through it would be invisible.
            marker = "o" if len(records) == 1 else ""
            axes.plot(work, values, color=colour, linestyle=line, marker=marker, linewidth=2.4, label=label)
    _work_axis(train_axes, [record["work"] for records in runs.values() for record in records])
    label_axes(valid_axes, x="", y="validation loss (nats)")
    label_axes(train_axes, x="work (gradient equivalents)", y="training loss (nats)")
    handles, labels = valid_axes.get_legend_handles_labels()
    if test:
        handles.append(valid_axes.plot([], [], "D", color="white", markersize=10, markeredgecolor="black")[0])
        labels.append("test loss at the end")
    figure.legend(handles, labels, loc="outside upper center", ncols=1 if test else 3, fontsize=SMALL, frameon=False)
    return figure


def decay_figure(
    decays: Mapping[str, Tensor],
    *,
    classes: Sequence[str],
    centre: float,
    image_shape: tuple[int, int] = (28, 28),
) -> Figure:
    """The learned log decay of every weight: one row a method, one column a class, each weight at its pixel.

    `decays[method]: [pixels, classes]`, natural logarithms; `centre` is the value before tuning and is drawn white,
    more decay red, less decay blue. One colour scale serves the figure, symmetric around `centre`, up to the larger
    distance of the 1st and 99th percentile of all values; the pointed ends of the colour bar stand for the rest.

    Raises `ValueError` for no decays, a shape other than `[pixels, classes]`, and a value that is not finite;
    `MissingExtraError` without matplotlib.
    """
    _check_decays(decays, classes, centre, image_shape)
    values = {method: decay.detach().to("cpu", torch.float64) for method, decay in decays.items()}
    reach = _reach(torch.stack(list(values.values())), centre)
    figure = empty_figure(width=1.2 * len(classes) + 3.2, height=1.25 * len(decays) + 0.8)
    grid = figure.subplots(len(decays), len(classes), squeeze=False)
    for row, (method, decay) in zip(grid, values.items(), strict=True):
        row[0].set_ylabel(method, fontsize=LARGE, rotation=0, ha="right", va="center")
        for axes, column in zip(row, decay.T, strict=True):
            pixels = column.reshape(image_shape).numpy()
            image = axes.imshow(
                pixels, cmap="RdBu_r", vmin=centre - reach, vmax=centre + reach, interpolation="nearest"
            )
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="0.7", linewidth=0.8)
    for axes, name in zip(grid[0], classes, strict=True):
        axes.set_title(name, fontsize=LARGE)
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.95, pad=0.01, aspect=12 * len(decays))
    bar.set_label("log decay", fontsize=LARGE)
    ticks = [centre + share * reach for share in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" + (" (start)" if tick == centre else "") for tick in ticks])
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _work_axis(axes: Axes, work: Sequence[float]) -> None:
    positive = [amount for amount in work if amount > 0]
    if not positive or max(positive) < 10 * min(positive):
        return  # within a decade a linear axis has the rounder ticks
    if len(positive) == len(work):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min(positive))


def _reach(values: Tensor, centre: float) -> float:
    """How far the colours reach on both sides of `centre`."""
    # Not torch.quantile, which refuses more than 16 million values.
    ordered = values.flatten().sort().values
    last = len(ordered) - 1
    low, high = float(ordered[round(0.01 * last)]), float(ordered[round(0.99 * last)])
    # All at the centre: any width draws them white, and 0 would divide by 0.
    return max(abs(low - centre), abs(high - centre)) or 1.0


def _check_runs(runs: Mapping[str, Records], test: Mapping[str, tuple[float, float]]) -> None:
    if not 1 <= len(runs) <= len(COLOURS):
        raise ValueError(f"There are {len(runs)} runs; a figure tells 1 to {len(COLOURS)} apart.")
    for method, records in runs.items():
        if not records:
            raise ValueError(f"The run {method!r} has no records.")
        before = 0.0
        for number, record in enumerate(records):
            for key in ("work", "leader_loss", "follower_loss"):
                if key not in record:
                    raise ValueError(f"Record {number} of the run {method!r} has no {key!r}; it has {sorted(record)}.")
                if not math.isfinite(record[key]):
                    raise ValueError(f"Record {number} of the run {method!r} has {key}={record[key]}; expected finite.")
            if record["work"] < before:
                raise ValueError(
                    f"Record {number} of the run {method!r} has work={record['work']} after {before}; "
                    "work starts at 0 or above and does not decrease."
                )
            before = record["work"]
    for method, result in test.items():
        if method not in runs:
            raise ValueError(f"There is a test result of {method!r}; the runs are {', '.join(runs)}.")
        loss, accuracy = result
        if not (math.isfinite(loss) and 0 <= accuracy <= 1):
            raise ValueError(
                f"The test result of {method!r} is {result}; expected a finite loss and an accuracy from 0 to 1."
            )


def _check_decays(
    decays: Mapping[str, Tensor], classes: Sequence[str], centre: float, image_shape: tuple[int, int]
) -> None:
    if not decays or not classes:
        raise ValueError(
            f"There are {len(decays)} decays of {len(classes)} classes to draw; "
            "expected a tensor [pixels, classes] for each method."
        )
    if not math.isfinite(centre):
        raise ValueError(f"centre={centre}; expected the finite log decay before tuning.")
    expected = (math.prod(image_shape), len(classes))
    for method, decay in decays.items():
        if decay.shape != expected:
            advice = " Transpose it." if decay.shape == expected[::-1] else ""
            raise ValueError(
                f"The decay of {method!r} has shape {list(decay.shape)}; "
                f"expected [pixels, classes] = {list(expected)}.{advice}"
            )
        if not bool(decay.isfinite().all()):
            raise ValueError(
                f"The decay of {method!r} has {int((~decay.isfinite()).sum())} values that are not finite."
            )
