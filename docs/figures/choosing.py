"""The tables of docs/choosing.md from docs/choosing/comparison.json, which `bilevel compare` measured.

Draws docs/choosing/error.png and value.png from the same file when it is run. The whole page of the comparison has all
games.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.comparison import Comparison
from bilevel.comparison.rows import number, size
from games.experiments.style import BLACK, BLUE, DPI, GREEN, ORANGE, PURPLE, RED, SKY, SMALL, empty_figure, label_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parents[1]
Rows = list[list[str]]


def costs(found: Comparison) -> Rows:
    """One row a response on the larger tuning game: what its hypergradient and its run took."""
    heads = ["On `mnist`", "error", "gradients + products", "peak memory", "loss after the run", "work of the run"]
    rows = []
    for s in found.summaries:
        if s.game == "mnist":
            # A rule of play has no hypergradient of its own: its run alone.
            error = number(s.error.median) if s.error else ""
            memory, work = size(s.memory.median) if s.memory else "", f"{s.work.median:,.0f}" if s.work else ""
            rows.append([s.response, error, work, memory, f"{s.value.median:.3f}", number(s.total.median)])
    return [heads, *rows]


def errors(found: Comparison) -> Rows:
    """One row a response, one column a game: the error of one hypergradient, and in how much work."""
    cells = {(s.response, s.game): number(s.error.median) for s in found.summaries if s.error}
    return [
        ["Error", *found.games],
        *[
            [name, *[cells.get((name, game), "") for game in found.games]]
            for name in found.responses
            if any((name, game) in cells for game in found.games)
        ],
    ]


def ratios(found: Comparison) -> Rows:
    """One row a response: work and memory of one hypergradient against implicit CG's, medians over the games."""
    by = {(s.response, s.game): s for s in found.summaries}
    rows = []
    for name in found.responses:
        pairs = [(by[name, game], by["implicit CG", game]) for game in found.games]
        ratio = [
            f"{statistics.median(getattr(one, key).median / getattr(base, key).median for one, base in pairs):.1f}"
            if all(getattr(one, key) for one, _ in pairs)
            else ""
            for key in ("work", "total", "memory")
        ]
        right = [s.error.median < 1e-2 for s in found.summaries if s.response == name and s.error]
        rows.append([name, *ratio, f"{sum(right)} of {len(found.games)}" if right else ""])
    heads = ["Against implicit CG", "work of a hypergradient", "work of a run", "peak memory", "error below 1 %"]
    return [heads, *rows]


def settings(found: Comparison) -> str:
    """What made the numbers."""
    versions = ", ".join(f"{name} {found.versions[name]}" for name in ("python", "torch", "numpy", "scipy"))
    return (
        f"{len(found.games)} games, {len(found.responses)} responses, {len(found.seeds)} seeds, "
        f"{found.settings['steps']} leader steps, float64; {versions}; {found.machine}."
    )


def measured(part: Callable[[Comparison], Rows | str]) -> Callable[[], Rows | str]:
    """The part, made of the committed file."""
    return lambda: part(Comparison.from_json(DOCS / "choosing" / "comparison.json"))


PARTS = {part.__name__: measured(part) for part in (costs, errors, ratios, settings)}

SHOWN = {
    "quadratic": "quadratic: well conditioned",
    "ill-conditioned": "ill-conditioned quadratic",
    "log-barrier": "log-barrier: curved",
    "mnist": "mnist: a decay for each of 7,850 weights",
}
LOOKS = {
    "unrolled": (BLUE, "o"),
    "truncated": (RED, "s"),
    "implicit CG": (GREEN, "^"),
    "implicit Neumann": (PURPLE, "v"),
    "implicit Nyström": (ORANGE, "D"),
    "implicit identity": (SKY, "P"),
    "nudged": ("#7a7a7a", "p"),
    "last step": ("#b05ca8", "h"),
    "single loop": ("#7a5c00", "*"),
    "hypernetwork": (BLACK, "X"),
    "value function": ("#882255", "d"),
}
"""Okabe and Ito's colours, and four more, for eleven responses; each has a marker and its name besides."""


def curves(rows: list[dict], game: str, response: str) -> list[tuple[float, float, float]]:
    """Budget, work and error, medians over the seeds; no error below rounding."""
    runs = [row["errors"] for row in rows if row["game"] == game and row["response"] == response]
    found = []
    for points in zip(*runs, strict=True):
        work = statistics.median(point["gradients"] + point["products"] for point in points)
        error = statistics.median(point["error"] for point in points)
        found.append((points[0]["budget"], work, max(error, 1e-15)))
    return found


def apart(heights: list[float], gap: float, lowest: float) -> list[float]:
    """These heights, moved to be `gap` apart at least: down, and up again where they would end below `lowest`."""
    order = sorted(range(len(heights)), key=lambda i: -heights[i])
    placed = list(heights)
    for above, below in itertools.pairwise(order):
        placed[below] = min(placed[below], placed[above] - gap)
    placed[order[-1]] = max(placed[order[-1]], lowest)
    for below, above in itertools.pairwise(reversed(order)):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed


def panel(axes: "Axes", ends: dict[str, float], *, at: float, titles: tuple[str, str, str]) -> None:
    """What the panels of both figures share: each response's name beside where its line ends; axes and title."""
    low, high = axes.get_ylim()
    heights = apart(list(ends.values()), 0.058 * (high - low), low + 0.02 * (high - low))
    for (response, end), height in zip(ends.items(), heights, strict=True):
        axes.plot([at, 1.15 * at], [end, height], color=LOOKS[response][0], linewidth=1, clip_on=False)
        axes.text(1.22 * at, height, response, color=LOOKS[response][0], fontsize=SMALL - 1, va="center", clip_on=False)
    axes.set_ylim(low, high)
    label_axes(axes, x=titles[0], y=titles[1], title=titles[2])
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_fontsize(SMALL)


def draw_errors(rows: list[dict]) -> None:
    """Four of the nine games, each response named at the end of its line."""
    figure = empty_figure(10.5, 8.6)
    for axes, (game, title) in zip(figure.subplots(2, 2).flat, SHOWN.items(), strict=True):
        ends = {}
        for response, (colour, mark) in LOOKS.items():
            line = curves(rows, game, response)
            if not line:
                continue
            x, y = [point[1] for point in line], [math.log10(point[2]) for point in line]
            axes.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=2)
            own = next(index for index, point in enumerate(line) if point[0] == 1.0)
            axes.plot(x[own], y[own], mark, color=colour, markersize=10, markeredgecolor="black")
            ends[response] = y[-1]
        low = min(*ends.values(), -3.0)
        axes.axhline(0.0, color="0.4", linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        every = 1 if low > -8 else 3
        ticks = list(range(0, int(1.05 * low) - 1, -every))
        axes.set_yticks(ticks, ["1" if tick == 0 else f"$10^{{{tick}}}$" for tick in ticks])
        axes.set(xlim=(1.5, 4000), ylim=(1.05 * low, 1.0 - 0.02 * low))
        panel(axes, ends, at=4000, titles=("gradients + Hessian-vector products", "relative error", title))
    figure.savefig(DOCS / "choosing" / "error.png", dpi=DPI)


def draw_values(found: Comparison) -> None:
    """The leader's loss along a run, on the same games; a bar at each end is the range over the seeds."""
    least = {(one.game, one.seed): one.least for one in found.references}
    figure = empty_figure(10.5, 8.6)
    for axes, (game, title) in zip(figure.subplots(2, 2).flat, SHOWN.items(), strict=True):
        known = all(least.get((game, seed)) is not None for seed in found.seeds)
        ends = {}
        for response, (colour, mark) in LOOKS.items():
            runs = [
                [(s.work, s.value - (least[row.game, row.seed] if known else 0.0)) for s in row.history]
                for row in found.rows
                if (row.game, row.response) == (game, response) and row.history
            ]
            if not runs:
                continue
            points = list(zip(*runs, strict=True))
            x = [statistics.median(work for work, _ in there) for there in points]
            values = [[math.log10(value) if known else value for _, value in there] for there in points]
            y = [statistics.median(there) for there in values]
            axes.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=1.8)
            axes.plot(x[-1:] * 2, [min(values[-1]), max(values[-1])], color=colour, linewidth=1.2)
            axes.plot(x[-1], y[-1], mark, color=colour, markersize=9, markeredgecolor="black")
            ends[response] = y[-1]
        axes.set_xscale("log")
        low, high = axes.get_ylim()
        axes.set(xlim=(2.0, 9000), ylim=(low, high))
        if known:
            every = max(1, round((high - low) / 6))
            ticks = list(range(math.ceil(low), math.floor(high) + 1, every))
            axes.set_yticks(ticks, ["1" if tick == 0 else f"$10^{{{tick}}}$" for tick in ticks])
        words = "leader's loss above the optimum" if known else "leader's loss"
        panel(axes, ends, at=9000, titles=("gradients + Hessian-vector products", words, title))
    figure.savefig(DOCS / "choosing" / "value.png", dpi=DPI)


def draw() -> None:
    """Both figures, from the committed file."""
    file = DOCS / "choosing" / "comparison.json"
    draw_errors(json.loads(file.read_text(encoding="utf-8"))["rows"])
    draw_values(Comparison.from_json(file))


if __name__ == "__main__":
    draw()
