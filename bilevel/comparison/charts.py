"""The figures of a comparison: error and value against work, and memory, each response in one colour throughout.

Drawn on matplotlib's objects: no pyplot, no window, no global state. Colours are those of Okabe and Ito (2008) and one
more, distinct to the colour-blind; each response has a marker of its own as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilevel._drawn import blank
from bilevel.comparison.measurements import Measurements
from bilevel.comparison.rows import Row, Spread, number, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7300", "#882255")
MARKERS = "os^vDPX*"
INK, FAINT = "#1b1b1c", "#e1e1e2"
"""Of text and lines, and of the grid; unlike any response's, so that a page may put its own in their place."""

SMALL, LARGE = 11, 12.5
COLUMNS = 3
FLOOR = 1e-16
"""What a log axis shows of an error of zero: float64's own rounding."""


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure, what it shows, and the same in words for who cannot see it."""

    figure: Figure
    caption: str
    alt: str


def charts(comparison: Measurements) -> dict[str, Chart]:
    """By name: "error", "value", "memory". Raises `ImportError` without matplotlib, `ValueError` without rows."""
    if not comparison.rows:
        raise ValueError("There are no rows to draw.")
    return {"error": _errors(comparison), "value": _values(comparison), "memory": _memory(comparison)}


def looks(comparison: Measurements) -> dict[str, dict[str, Any]]:
    """Each response's colour and marker; the line's dashes change once the colours have been used up."""
    return {
        name: {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3],
        }
        for index, name in enumerate(comparison.responses)
    }


# The three figures ---------------------------------------------------------------------------------------------------


def _errors(comparison: Measurements) -> Chart:
    def draw(axes: Axes, game: str) -> None:
        for name, look in looks(comparison).items():
            rows = _rows(comparison, game, name)
            points = []
            for budget in sorted({point.budget for row in rows for point in row.errors}):
                found = [p for row in rows for p in row.errors if p.budget == budget and p.error is not None]
                error = Spread.of([p.error for p in found])
                if error is not None:
                    points.append((_median([p.work for p in found]), error, budget))
            _line(axes, [(x, y) for x, y, _ in points], look, floor=FLOOR)
            for work, error, budget in points:
                if budget == 1.0:
                    axes.plot([work], [max(error.median, FLOOR)], markersize=9, markeredgecolor=INK, zorder=4, **look)
        axes.set_yscale("log")
        axes.set_xscale("log")
        axes.axhline(1.0, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, min(max(top, 2.0), 1e3))

    told = []
    for game in comparison.games:
        found = [(s.error.median, s.response, s.work) for s in comparison.summaries if s.game == game and s.error]
        if found:
            error, name, work = min(found, key=lambda one: one[0])
            told.append(f"{game}: {name}, {number(error)} after {number(work.median if work else 0.0)}")
    return Chart(
        _grid(comparison, draw, x="gradients + Hessian-vector products", y="relative error"),
        "Error of one hypergradient at the game's start, from scratch, over the work put into it. Each line is one "
        "response given from few to many of its own steps; the ringed marker is its own setting. Lines are medians "
        "over the seeds, bands their range. On the dotted line the error is as large as the hypergradient itself; an "
        "error of zero is drawn at 10⁻¹⁶.",
        f"{len(comparison.games)} panels, one a game. Lowest median error at a response's own setting: "
        f"{'; '.join(told) or 'none was measured'}.",
    )


def _values(comparison: Measurements) -> Chart:
    least = {(r.game, r.seed): r.least for r in comparison.references}
    known = {game: all(least.get((game, seed)) is not None for seed in comparison.seeds) for game in comparison.games}

    def draw(axes: Axes, game: str) -> None:
        for name, look in looks(comparison).items():
            rows = [row for row in _rows(comparison, game, name) if row.history]
            points = []
            for step in sorted({step.step for row in rows for step in row.history}):
                there = [(row.seed, s) for row in rows for s in row.history if s.step == step and s.value is not None]
                above = [(s.value or 0.0) - ((least[game, seed] or 0.0) if known[game] else 0.0) for seed, s in there]
                value = Spread.of(above)
                if value is not None:
                    points.append((_median([s.work for _, s in there]), value))
            _line(axes, points, look, floor=FLOOR if known[game] else None)
        axes.set_xscale("log")
        if known[game]:
            axes.set_yscale("log")
            axes.set_ylabel("above the optimum", fontsize=SMALL, color=INK)
        else:
            axes.set_ylabel("leader's loss", fontsize=SMALL, color=INK)

    told = []
    for game in comparison.games:
        ends = [(s.response, s.value.median) for s in comparison.summaries if s.game == game and s.value]
        if ends:
            low, high = min(ends, key=lambda e: e[1]), max(ends, key=lambda e: e[1])
            told.append(f"{game}: from {low[1]:.4g} ({low[0]}) to {high[1]:.4g} ({high[0]})")
    return Chart(
        _grid(comparison, draw, x="gradients + Hessian-vector products", y=""),
        "The leader's loss along its run, once the follower has converged to its answer, over the work of the run. "
        "Where the optimum is known, the loss above it, on a log axis. Medians over the seeds, bands their range.",
        f"{len(comparison.games)} panels, one a game. The leader's loss at the end: {'; '.join(told) or 'none'}.",
    )


def _memory(comparison: Measurements) -> Chart:
    figure = blank(12.0, 1.6 + 0.42 * len(comparison.games))
    axes = figure.subplots()
    summaries = {(s.game, s.response): s.memory for s in comparison.summaries}
    shown = looks(comparison)
    for place, game in enumerate(comparison.games):
        for index, (name, look) in enumerate(shown.items()):
            found = summaries.get((game, name))
            if found is None:
                continue
            # Side by side within a game's band, or equal memories would hide each other.
            height = place + 0.6 * ((index + 0.5) / len(shown) - 0.5)
            axes.plot([found.low, found.high], [height, height], color=look["color"], linewidth=2.4, alpha=0.6)
            axes.plot([found.median], [height], marker=look["marker"], color=look["color"], markersize=8, linestyle="")
        if place:
            axes.axhline(place - 0.5, color=FAINT, linewidth=0.9)
    axes.set_yticks(range(len(comparison.games)), comparison.games)
    axes.set_ylim(len(comparison.games) - 0.5, -0.5)
    axes.set_xscale("log")
    _tidy(axes, size)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=LARGE)
    axes.set_xlabel("peak bytes of the tensors of one hypergradient (log)", fontsize=LARGE, color=INK)
    _legend(figure, comparison)
    most = [(s, s.memory.median) for s in comparison.summaries if s.memory]
    top = max(most, key=lambda pair: pair[1], default=None)
    alt = "One row a game, one mark a response."
    if top is not None:
        alt += f" The most is {size(top[1])}, {top[0].response} on {top[0].game}."
    return Chart(
        figure,
        "Peak memory of one hypergradient at each response's own setting: the most bytes that its tensors hold at one "
        "time, forward and backward. Counted, not sampled; the game's own data is not in it.",
        alt,
    )


# How they look -------------------------------------------------------------------------------------------------------


def _grid(comparison: Measurements, draw: Callable[[Axes, str], None], *, x: str, y: str) -> Figure:
    """One panel a game under one legend."""
    games = comparison.games
    columns = min(COLUMNS, len(games))
    rows = math.ceil(len(games) / columns)
    figure = blank(12.0, 0.9 + 2.75 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(games) :]:
        axes.set_visible(False)
    for axes, game in zip(grid, games, strict=False):
        draw(axes, game)
        axes.set_title(game, fontsize=LARGE, color=INK, loc="left", fontweight="bold")
        _tidy(axes, power)
    figure.supxlabel(x, fontsize=LARGE, color=INK)
    if y:
        figure.supylabel(y, fontsize=LARGE, color=INK)
    _legend(figure, comparison)
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, Spread]], look: Mapping[str, Any], *, floor: float | None) -> None:
    if not points:
        return
    low, middle, high = (
        [getattr(spread, part) if floor is None else max(getattr(spread, part), floor) for _, spread in points]
        for part in ("low", "median", "high")
    )
    work = [x for x, _ in points]
    axes.fill_between(work, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.plot(work, middle, linewidth=1.9, markersize=4.5, markeredgewidth=0, **look)


def _tidy(axes: Axes, form: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator  # noqa: PLC0415

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            if high / max(low, 1e-300) >= 30.0:
                axis.set_major_locator(LogLocator(numticks=6))
                axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
            else:  # within a decade or so there may be no power of ten to name
                axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=SMALL, which="both", colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Figure, comparison: Measurements) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [Line2D([], [], label=name, markersize=7, **look) for name, look in looks(comparison).items()]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(4, len(handles)),
        fontsize=LARGE,
        labelcolor=INK,
        frameon=False,
    )


def power(value: float) -> str:
    """A tick of a log axis: 0.01, 1, 100, and 10⁻⁹ where zeros would have to be counted."""
    exponent = round(math.log10(value)) if value > 0.0 else 0
    if -3 <= exponent <= 3:
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _rows(comparison: Measurements, game: str, response: str) -> list[Row]:
    return [row for row in comparison.rows if (row.game, row.response) == (game, response)]


def _median(values: Sequence[float]) -> float:
    """Of works, for a log axis."""
    return max(statistics.median(values), 1.0)
