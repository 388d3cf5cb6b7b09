"""A run of tuning as a figure: the losses, and every hyperparameter over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bilevel._drawn import blank
from bilevel.constraints import Log
from bilevel.hyper import Tuning
from bilevel.tree import leaves
from bilevel.tuning.rule import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow, which is lost on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_COLUMNS = 3


def figure(history: Sequence[Mapping[str, float]], plan: Plan, tuning: Tuning) -> Figure:
    """The losses above, a panel for each hyperparameter below; steps are those of training."""
    steps = [plan.warmup + record["step"] * plan.every for record in history]
    names = list(tuning.init)
    rows = 1 + math.ceil(len(names) / _COLUMNS)
    drawn = blank(10.0, 3.2 + 2.4 * (rows - 1))
    grid = drawn.add_gridspec(rows, min(_COLUMNS, len(names)), height_ratios=[1.3] + [1.0] * (rows - 1))
    above = drawn.add_subplot(grid[0, :])
    ends: list[tuple[float, str, str]] = []
    for key, label, colour in ((tuning.follower, "training", _COLOURS[0]), (tuning.leader, "validation", _COLOURS[1])):
        values = [record[key] for record in history]
        above.plot(steps, values, color=colour, linewidth=1.8)
        ends.append((values[-1], label, colour))
    _label(above, steps[-1], ends)
    _dress(above, "loss")
    for index, name in enumerate(names):
        axes = drawn.add_subplot(grid[1 + index // _COLUMNS, index % _COLUMNS])
        _draw(axes, steps, history, f"{tuning.leader}.{name}")
        if all(isinstance(kind, Log) for kind in leaves(tuning.init[name])):
            axes.set_yscale("log")
        _dress(axes, name)
    drawn.supxlabel("training steps", fontsize=12)
    return drawn


def _draw(axes: Axes, steps: Sequence[float], history: Sequence[Mapping[str, float]], key: str) -> None:
    """The numbers of one hyperparameter: each by itself, or the quartiles of many."""
    found = [name for name in history[0] if name == key or name.startswith((f"{key}.", f"{key}["))]
    if f"{key}.median" in found:
        low, middle, high = ([record[f"{key}.{part}"] for record in history] for part in ("low", "median", "high"))
        axes.fill_between(steps, low, high, color=_COLOURS[0], alpha=0.25, linewidth=0.0)
        axes.plot(steps, middle, color=_COLOURS[0], linewidth=1.8)
        return
    ends: list[tuple[float, str, str]] = []
    for place, name in enumerate(found):
        values = [record[name] for record in history]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(steps, values, color=colour, linewidth=1.5)
        ends.append((values[-1], name.removeprefix(key).strip(".[]"), colour))
    if 1 < len(found) <= len(_COLOURS):
        _label(axes, steps[-1], ends)


def _label(axes: Axes, x: float, ends: list[tuple[float, str, str]]) -> None:
    """The lines' names at their ends, outside of the panel; one above the other where the lines meet."""
    low, high = axes.get_ylim()
    space, last = 0.07 * (high - low), -math.inf
    for y, text, colour in sorted(ends):
        last = max(y, last + space)
        place: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 10}
        axes.annotate(text, (x, last), color=colour, annotation_clip=False, **place)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
