"""The tables of docs/performance.md from docs/performance/*.json; draws its figures when it is run.

The files are made by the programs that the page names.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from games.experiments.style import BLUE, COLOURS, DPI, LINES, RED, SMALL, empty_figure, label_axes

DOCS = Path(__file__).resolve().parents[1]
KINDS = {"unroll": "unrolled steps", "cg": "conjugate gradients", "neumann": "Neumann terms"}


def read(name: str) -> dict:
    """One program's results."""
    return json.loads((DOCS / "performance" / f"{name}.json").read_text(encoding="utf-8"))


def equal_work() -> list[dict[str, str]]:
    """Ratios of time and of peak memory to hand-written torch."""
    rows = [row for row in read("equal_work")["rows"] if "failure" not in row]
    table = []
    for problem, kind in dict.fromkeys((row["problem"], row["kind"]) for row in rows):
        some = {row["method"]: row for row in rows if (row["problem"], row["kind"]) == (problem, kind)}
        floor = some["hand-written"]
        line = {"follower": problem, "work": f"{floor['work']} {KINDS[kind]}"}
        line["by hand"] = _seconds(floor["cpu seconds"])
        for name in dict.fromkeys(row["method"] for row in rows):
            if name == "hand-written":
                continue
            row = some.get(name)
            if row is None:
                line[name] = ""
                continue
            wrong = "" if row["difference"] < 0.05 or name == "jaxopt" else " (another answer)"
            memory = "" if row["peak bytes"] is None else f" / {row['peak bytes'] / floor['peak bytes']:.2f}"
            line[name] = f"{row['ratio']:.2f}{memory}{wrong}"
        table.append(line)
    return table


def accuracy() -> list[dict[str, str]]:
    """Seconds to each accuracy, and how many times the fastest other library's or plain method's."""
    whole = read("accuracy")
    problems = list(dict.fromkeys(row["problem"] for row in whole["rows"]))
    table = []
    for name in dict.fromkeys(row["method"] for row in whole["rows"]):
        line = {"method": name}
        for problem in problems:
            for wanted in (1e-3, 1e-6):
                line[f"{problem}, {wanted:.0e}"] = _cell(whole["rows"], problem, name, wanted)
        table.append(line)
    return table


def best_elsewhere(rows: list[dict], problem: str, wanted: float) -> float:
    """The fewest seconds that anybody takes who is not us."""
    return min(
        row["seconds"]
        for row in rows
        if row["problem"] == problem and row["wanted"] == wanted and "seconds" in row and "ours" not in row["method"]
    )


def _cell(rows: list[dict], problem: str, name: str, wanted: float) -> str:
    some = [r for r in rows if (r["problem"], r["method"], r["wanted"]) == (problem, name, wanted)]
    if not some:
        return ""
    if "failure" in some[0]:
        return "not reached"
    gain = best_elsewhere(rows, problem, wanted) / some[0]["seconds"]
    return f"{_seconds(some[0]['seconds'])} ({some[0]['products']:,}; {gain:.1f} x)"


def along() -> list[dict[str, str]]:
    """Seconds of a later step of a run, and how many times the plain method's; those of the first."""
    rows = read("along")["rows"]
    table = []
    for name in dict.fromkeys(row["method"] for row in rows):
        line = {"method": name}
        for problem, wanted in dict.fromkeys((row["problem"], row["wanted"]) for row in rows):
            some = {r["method"]: r for r in rows if (r["problem"], r["wanted"]) == (problem, wanted)}
            if name in some:
                first, seconds, products = later_step(some[name])
                gain = later_step(some["by hand"])[1] / seconds
                told = f"{_seconds(seconds)} ({products:,.0f}; {gain:.1f} x)"
                alone = len(some[name]["seconds"]) == 1
                line[f"{problem}, {wanted:.0e}"] = told if alone else f"{told}, first {_seconds(first)}"
        table.append(line)
    return table


def later_step(row: dict) -> tuple[float, float, float]:
    """Seconds of a run's first step; mean seconds and products of those from the third on, which know two before."""
    seconds, products = row["seconds"], row["products"]
    later = slice(2, None) if len(seconds) > 2 else slice(None)
    return seconds[0], statistics.mean(seconds[later]), statistics.mean(products[later])


def whole_run() -> list[dict[str, str]]:
    """Work of a leader's run, means by means."""
    whole = read("whole_run")
    first = whole["rows"][0]
    return [
        {
            "means": row["method"],
            "gradients": f"{row['gradients']:,}",
            "products": f"{row['products']:,}",
            "seconds": f"{row['seconds']:.0f}",
            "faster": f"{first['seconds'] / row['seconds']:.1f} x",
            "validation loss": f"{row['value']:.4f}",
            "apart from the first": f"{row['apart']:.1e}",
        }
        for row in whole["rows"]
    ]


def growth() -> list[dict[str, str]]:
    """Slopes, and the ends of each sweep."""
    return [
        {
            "grows with": sweep["axis"],
            "response": sweep["response"],
            "from": f"{sweep['rows'][0][sweep['axis']]:,}",
            "to": f"{sweep['rows'][-1][sweep['axis']]:,}",
            "seconds": f"{_seconds(sweep['rows'][0]['seconds'])} to {_seconds(sweep['rows'][-1]['seconds'])}",
            "slope of seconds": f"{sweep['seconds slope']:.2f}",
            "memory": f"{_bytes(sweep['rows'][0]['bytes'])} to {_bytes(sweep['rows'][-1]['bytes'])}",
            "slope of memory": f"{sweep['bytes slope']:.2f}",
        }
        for sweep in read("growth")["sweeps"]
    ]


def players() -> list[dict[str, str]]:
    """A line for each game and response: a step, and how much dearer a player is among 1,000 than among a few."""
    return [
        {
            "game": sweep["game"],
            "players do": sweep["response"],
            **{f"{row['players']:,}": _seconds(row["seconds"]) for row in sweep["rows"]},
            "a player of 1,000, in ones of 50": f"{sweep['seconds a player']:.2f}",
            "memory of 1,000": _bytes(sweep["rows"][-1]["bytes"]),
            "a player of 1,000, in ones of 200": f"{sweep['bytes a player']:.2f}",
        }
        for sweep in read("players")["sweeps"]
    ]


def device_name() -> str:
    """What it was measured on."""
    found = read("device")
    return f"{found['device']}, {found['machine']['processor']}"


def device() -> list[dict[str, str]]:
    """A line for each response: seconds, also in plain training steps, and memory in copies of the weights."""
    rows = read("device")["times"]
    steps = {row["weights"]: row["float32"]["seconds"] for row in rows if row["row"] == "a training step"}

    def cell(row: dict) -> str:
        found = row["float32"]
        if "failed" in found:
            return "does not fit"
        return f"{_seconds(found['seconds'])}, {found['seconds'] / steps[row['weights']]:.3g}, {found['copies']:.0f}"

    names = list(dict.fromkeys(row["row"] for row in rows))
    return [
        {"": name, **{f"{row['weights']:,} weights": cell(row) for row in rows if row["row"] == name}} for name in names
    ]


def half() -> list[dict[str, str]]:
    """The same for bfloat16 beside float32: seconds, memory, and how much of the hypergradient's direction is left."""
    rows = [row for row in read("device")["times"] if "cosine" in row["bfloat16"]]

    def cell(row: dict) -> str:
        half, full = row["bfloat16"], row["float32"]
        ratios = (half[key] / full[key] for key in ("seconds", "copies"))
        return ", ".join([*(f"{ratio:.2f}" for ratio in ratios), f"{1.0 - half['cosine']:.0e}"])

    names = list(dict.fromkeys(row["row"] for row in rows))
    return [
        {"": name, **{f"{row['weights']:,} weights": cell(row) for row in rows if row["row"] == name}} for name in names
    ]


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1.0 else f"{value:.3g} s"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def table(lines: Callable[[], list[dict[str, str]]]) -> list[list[str]]:
    """Rows of cells, in the order of the heads' first appearance."""
    found = lines()
    heads = list(dict.fromkeys(key for line in found for key in line))
    return [heads, *([line.get(head, "") for head in heads] for line in found)]


def limits(tell: Callable[[dict], str]) -> Callable[[], str]:
    """A number of what could be had, told by `tell`."""
    return lambda: tell(read("limits"))


def iterations(preconditioner: str) -> Callable[[], str]:
    """The iterations to 1e-3 and to 1e-6 with this preconditioner."""
    return limits(lambda found: "{} and {}".format(*found["iterations"][preconditioner]))


PARTS = {
    **{
        part.__name__: partial(table, part)
        for part in (equal_work, accuracy, along, whole_run, growth, players, device, half)
    },
    "device_name": device_name,
    "largest_eigenvalue": limits(lambda found: f"{found['largest over the penalty']:.0f}"),
    "above_ten_penalties": limits(lambda found: str(found["above"]["10"])),
    "above_two_penalties": limits(lambda found: str(found["above"]["2"])),
    "plain_iterations": iterations("plain"),
    "unit_blocks_iterations": iterations("exact blocks, one a unit"),
    "one_block_iterations": iterations("exact blocks, one for all"),
    "estimated_block_iterations": iterations("BlockDiagonal"),
}


def draw_growth() -> None:
    """Seconds and memory against size, one panel an axis."""
    whole = read("growth")
    figure = empty_figure(14.0, 8.0)
    axes_of = list(dict.fromkeys(sweep["axis"] for sweep in whole["sweeps"]))
    names = list(dict.fromkeys(sweep["response"] for sweep in whole["sweeps"]))
    panels = figure.subplots(2, len(axes_of))
    said = {"weights": "weights of the follower", "leaders": "entries of the leader", "steps": "inner steps or terms"}
    for row, (key, unit, scale) in zip(panels, (("seconds", "seconds", 1.0), ("bytes", "MB", 1e-6)), strict=True):
        for axes, axis in zip(row, axes_of, strict=True):
            for sweep in whole["sweeps"]:
                if sweep["axis"] != axis:
                    continue
                at = names.index(sweep["response"])
                x = [point[axis] for point in sweep["rows"]]
                y = [scale * point[key] for point in sweep["rows"]]
                axes.loglog(x, y, LINES[at], color=COLOURS[at], marker="o", markersize=4, label=sweep["response"])
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            title = f"grows with the {said[axis]}" if key == "seconds" else ""
            label_axes(axes, x=said[axis] if key == "bytes" else "", y=unit if axis == axes_of[0] else "", title=title)
            axes.title.set_fontsize(SMALL)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=SMALL, frameon=False)
    figure.savefig(DOCS / "performance" / "growth.png", dpi=DPI // 2)


def draw_accuracy() -> None:
    """How many times sooner than the fastest other way, to an error of 1e-3 and of 1e-6, a panel a follower."""
    rows = [row for row in read("accuracy")["rows"] if "seconds" in row]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if "ours" in name]
    figure = empty_figure(10.5, 1.6 + 0.38 * len(names))
    panels = figure.subplots(1, len(problems), sharey=True, sharex=True, squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        axes.axvline(1.0, color="0.35", linewidth=1.2)
        for wanted, mark, colour in ((1e-3, "o", BLUE), (1e-6, "D", RED)):
            best = best_elsewhere(rows, problem, wanted)
            for row in rows:
                if (row["problem"], row["wanted"]) == (problem, wanted) and row["method"] in names:
                    at = len(names) - 1 - names.index(row["method"])
                    axes.plot(best / row["seconds"], at, mark, color=colour, markersize=8, alpha=0.9)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(-0.6, len(names) + 0.3)
        label_axes(axes, x="", y="", title=problem)
        axes.title.set_fontsize(SMALL)
    named = [name.removeprefix("ours, ").replace("ours", "plain").replace("Nystroem", "Nyström") for name in names]
    panels[0].set_yticks(range(len(names)), list(reversed(named)))
    for place, (words, colour) in enumerate((("error 1e-3", BLUE), ("error 1e-6", RED)), start=1):
        panels[-1].text(2.0, len(names) - place, words, color=colour, fontsize=SMALL, va="center")
    figure.supxlabel("speed-up over the fastest other method (right of the line: faster)", fontsize=SMALL)
    figure.savefig(DOCS / "performance" / "accuracy.png", dpi=DPI)


if __name__ == "__main__":
    draw_growth()
    draw_accuracy()
