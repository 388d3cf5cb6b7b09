"""The table, the figure and the JSON of `bilevel mixture`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from games.experiments.provenance import provenance
from games.experiments.store import as_json, write_json
from games.experiments.style import COLOURS, LINES, SMALL, empty_figure, label_axes, save_figure
from games.mixture.run import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cells(noisy: Sequence[bool], rows: Sequence[Row]) -> list[list[str]]:
    """Heads, and a row a run."""
    heads = ["mixture", "noise", "noise < 1 % after", "test loss", "gradients", "seconds"]
    found = [heads]
    for row in rows:
        noise = sum(share for share, is_noise in zip(row.shares, noisy, strict=True) if is_noise)
        after = "" if not row.curve else "never" if row.below is None else f"{row.below:,} steps"
        found.append([row.method, f"{noise:.1%}", after, f"{row.loss:.3f}", f"{row.gradients:,}", f"{row.seconds:.0f}"])
    return found


def content(
    names: Sequence[str], noisy: Sequence[bool], rows: Sequence[Row], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All of it, as JSON holds it."""
    head = {**provenance(), "settings": dict(settings), "sources": list(names), "noise": list(noisy)}
    made: dict[str, Any] = as_json({**head, "rows": [asdict(row) for row in rows]})
    return made


def write(
    output: Path, names: Sequence[str], noisy: Sequence[bool], rows: Sequence[Row], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """results.json, and shares.png where a run has learned; returns what is in the first."""
    made = content(names, noisy, rows, settings)
    write_json(output / "results.json", made, indent=1)
    learned = [row for row in rows if row.curve]
    if learned:
        save_figure(figure(names, noisy, learned), output / "shares.png")
    return made


def figure(names: Sequence[str], noisy: Sequence[bool], rows: Sequence[Row]) -> Figure:
    """The shares over the training steps, a panel for each method."""
    drawing = empty_figure(5.0 * len(rows) + 1.0, 5.0)
    panels = drawing.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for axes, row in zip(panels, rows, strict=True):
        steps = [step for step, _ in row.curve]
        for index, name in enumerate(names):
            line = "--" if noisy[index] else LINES[0]
            values = [shares[index] for _, shares in row.curve]
            axes.plot(steps, values, line, color=COLOURS[index % len(COLOURS)], linewidth=2.0, label=name)
        axes.set_yscale("log")
        axes.axhline(0.01, color="0.5", linewidth=0.8)
        label_axes(axes, x="training steps", y="share of the loss" if axes is panels[0] else "", title=row.method)
        axes.text(0.0, 0.011, "1 %", fontsize=SMALL, color="0.4")
    handles, labels = panels[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    return drawing
