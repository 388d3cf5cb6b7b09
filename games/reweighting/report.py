"""What runs of reweighting came to: a file of rows, a table of medians and a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from games.experiments.provenance import provenance
from games.experiments.store import write_json
from games.experiments.style import COLOURS, SMALL, empty_figure, label_axes
from games.reweighting.run import Row, row_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


def write(rows: Sequence[Row], path: Path, settings: dict[str, Any]) -> None:
    """All rows and what they were made with, as JSON."""
    content = {"settings": settings, **provenance("scipy", "scikit-learn"), "rows": [asdict(row) for row in rows]}
    write_json(path, content, indent=1)


def read(path: Path) -> list[Row]:
    """What `write` wrote."""
    return [row_of(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def medians(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """case -> method -> the medians over the seeds, None where a number does not apply."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for case in dict.fromkeys(row.case for row in rows):
        found[case] = {}
        for method in dict.fromkeys(row.method for row in rows if row.case == case):
            chosen = [row for row in rows if (row.case, row.method) == (case, method)]
            found[case][method] = {
                key: _median([getattr(row, key) for row in chosen])
                for key in ("accuracy", "auc", "auc_of_losses", "auc_of_new", "recovered", "seconds")
            }
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def table(rows: Sequence[Row]) -> Table:
    """Case by method, medians over the seeds."""
    from rich.box import SIMPLE
    from rich.table import Table

    seeds = len({row.seed for row in rows})
    shown = Table(
        title=f"Test accuracy, medians over {seeds} {'seed' if seeds == 1 else 'seeds'}",
        caption="AUC: how well wrong labels are told from right ones, by the weights, by the trained model's losses, "
        "and by the weights of new examples. Of gap: of that from plain training to the oracle, who trains without the "
        "wrong labels (for a long tail: at inverse frequencies, accuracy being the mean over classes). s: seconds.",
        box=SIMPLE,
    )
    for column in ("labels", "accuracy", "of gap", "AUC", "losses", "new", "s"):
        shown.add_column(column, justify="left" if column == "labels" else "right", no_wrap=True)
    for case, methods in medians(rows).items():
        shown.add_section()
        shown.add_row(f"[bold]{case}")
        for method, numbers in methods.items():
            cells = [
                "" if numbers[k] is None else form.format(numbers[k])
                for k, form in (
                    ("accuracy", "{:.3f}"),
                    ("recovered", "{:.0%}"),
                    ("auc", "{:.3f}"),
                    ("auc_of_losses", "{:.3f}"),
                    ("auc_of_new", "{:.3f}"),
                )
            ]
            seconds = f"{numbers['seconds']:.0f}" if numbers["seconds"] else ""
            shown.add_row(f"  {method}", *cells, seconds)
    return shown


def figure(rows: Sequence[Row]) -> Figure:
    """Test accuracy in every case, a dot a seed; without those trained anew by example, which change little."""
    drawn = empty_figure(11.0, 5.0)
    axes = drawn.add_subplot()
    cases, methods = list(dict.fromkeys(r.case for r in rows)), list(dict.fromkeys(r.method for r in rows))
    methods = [method for method in methods if not method.startswith("per example,")]
    marks = ("o", "s", "^", "D", "v", "P")
    for at, method in enumerate(methods):
        chosen = [row for row in rows if row.method == method]
        places = [cases.index(row.case) + 0.1 * (at - (len(methods) - 1) / 2) for row in chosen]
        heights = [row.accuracy for row in chosen]
        axes.plot(places, heights, marks[at % 6], color=COLOURS[at % 7], markersize=7, label=method)
    axes.set_xticks(range(len(cases)), [case.replace(" ", "\n") for case in cases])
    label_axes(axes, x="what is wrong with the training labels", y="test accuracy")
    drawn.legend(loc="outside upper center", ncols=4, fontsize=SMALL, frameon=False)
    return drawn
