"""The three results on the first page, from committed numbers: what its sentences say, and the pictures beside them.

`python docs/figures/front.py` draws docs/front/*.svg: horizontal bars with their numbers, legible at 300 pixels. One
file is for a light page and one for a dark one.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import performance
import reweighting
import search
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1]
CASE = "class-dependent 0.4"
FOLLOWER = "penalties over six decades"
THEMES = {"light": ("#0072B2", "#9a9a9a", "#1a1a1a"), "dark": ("#56B4E9", "#8a8a8a", "#f0f0f0")}
Bar = tuple[str, float, str, bool]
"""Name, length, what is written at its end, and whether it is ours."""


def decays() -> list[Bar]:
    """Test loss with 7,850 decays, and the training steps that it took."""
    runs = search.by_method(search.read("results"), "many")
    found: list[Bar] = []
    for name, label in (("TPE", "Optuna's TPE"), ("grid", "grid"), ("unrolled", "bilevel")):
        loss = statistics.median(run["standard"]["test"] for run in runs[name])
        steps = statistics.median(run["curve"][-1][0] for run in runs[name])
        found.append((label, loss, f"{loss:.2f} in {steps:,.0f} steps", label == "bilevel"))
    return found


def seconds() -> list[Bar]:
    """Seconds to a hypergradient with a relative error of 1e-3, at penalties of different scales."""
    rows = performance.read("accuracy")["rows"]
    some = {row["method"]: row for row in rows if row["problem"] == FOLLOWER and row["wanted"] == 1e-3}
    names = {"torchopt": "TorchOpt", "by hand": "torch by hand", "ours, warm, diagonal": "bilevel"}
    return [
        (label, some[name]["seconds"], f"{some[name]['seconds']:.2g} s", label == "bilevel")
        for name, label in names.items()
    ]


def labels() -> list[Bar]:
    """Test accuracy where four labels in ten are wrong."""
    found = reweighting.medians(reweighting.read(reweighting.DOCS / "reweighting" / "results.json"))[CASE]
    names = {"plain": "plain training", "per example": "bilevel", "oracle": "right labels only"}
    return [
        (label, found[name]["accuracy"], f"{100 * found[name]['accuracy']:.0f} %", label == "bilevel")
        for name, label in names.items()
    ]


PARTS = {
    "loss_ours": lambda: decays()[2][2],
    "loss_tpe": lambda: decays()[0][2],
    "times_sooner": lambda: f"{min(bar[1] for bar in seconds()[:2]) / seconds()[2][1]:.0f}",
    "accuracy_plain": lambda: labels()[0][2],
    "accuracy_ours": lambda: labels()[1][2],
    "accuracy_oracle": lambda: labels()[2][2],
}


def draw(bars: Sequence[Bar], theme: str) -> Figure:
    """Bars with their names above them and their numbers at their ends."""
    ours, others, ink = THEMES[theme]
    figure = Figure(figsize=(4.0, 2.3))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    longest = max(bar[1] for bar in bars)
    for index, (name, length, end, own) in enumerate(bars):
        at = len(bars) - index
        axes.barh(at, length / longest, height=0.42, color=ours if own else others)
        weight = "bold" if own else "normal"
        axes.text(0.0, at + 0.3, name, fontsize=13, va="bottom", color=ink, weight=weight)
        axes.text(1.0, at + 0.3, end, fontsize=13, va="bottom", ha="right", color=ink, weight=weight)
    axes.set(xlim=(-0.01, 1.01), ylim=(0.65, len(bars) + 0.85))
    axes.set_axis_off()
    return figure


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "bilevel"
    (DOCS / "front").mkdir(exist_ok=True)
    for part in (decays, seconds, labels):
        for theme in THEMES:
            file = DOCS / "front" / f"{part.__name__}-{theme}.svg"
            draw(part(), theme).savefig(file, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
