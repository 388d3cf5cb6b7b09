"""The tables of docs/reweighting.md from docs/reweighting/*.json; draws their figure when it is run.

`results.json` is `bilevel reweight --seeds 3`, `fashion.json` is `bilevel reweight --seeds 3 --steps 60 --data FOLDER`
with Fashion-MNIST's IDX files, `cleaning_linear.json`, `cleaning_network.json` and `cleaning_longer.json` are the
commands of docs/reweighting.md, the first file of two of them,
`perceptron.json` is `bilevel reweight --hidden 64 --case 'symmetric 0.4' --seeds 3`.
"""

import json
from functools import partial
from pathlib import Path
from statistics import median

from games.reweighting.report import figure, medians, read

DOCS = Path(__file__).resolve().parents[1]
TRAINED = ("plain", "clean set alone", "oracle", "per example", "network", "network, pruned", "network, capped")
FOUND = (
    ("per example", "auc", "weights per example"),
    ("network", "auc", "weights by network"),
    ("network", "auc_of_new", "the same, new images"),
    ("network", "auc_of_losses", "losses at these weights"),
    ("plain", "auc_of_losses", "losses, plain"),
    ("clean set alone", "auc_of_losses", "losses, clean set alone"),
)


def accuracies(name: str) -> list[list[str]]:
    """Test accuracy, and the share of the gap from plain to oracle, case by method."""
    lines = [["labels", *TRAINED]]
    for case, methods in medians(read(DOCS / "reweighting" / f"{name}.json")).items():
        best = "oracle" if "oracle" in methods else "inverse frequency"
        line = [case]
        for method in TRAINED:
            n = methods.get(best if method == "oracle" else method)
            share = "" if n is None or n["recovered"] is None else f" ({100 * n['recovered']:.0f} %)"
            line.append("" if n is None else f"{n['accuracy']:.3f}{share}")
        lines.append(line)
    return lines


def orderings(name: str) -> list[list[str]]:
    """How well wrong labels are told from right ones, case by means."""
    lines = [["labels", *(said for *_, said in FOUND)]]
    for case, methods in medians(read(DOCS / "reweighting" / f"{name}.json")).items():
        if "oracle" in methods:
            numbers = [methods[method][key] for method, key, _ in FOUND]
            lines.append([case, *(f"{n:.3f}" for n in numbers)])
    return lines


def cleaning(name: str) -> list[list[str]]:
    """Accuracy, F1 and work of hyper-cleaning, a row a method: the median over seeds, and the least and largest."""
    rows = json.loads((DOCS / "reweighting" / f"{name}.json").read_text())["rows"]
    seeds = len({row["seed"] for row in rows})
    head = ["method", "test accuracy", "trained anew at its weights", "F1 of the clean set", "gradients and products"]
    lines = [head]
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        told = f"{method} (seed 0)" if len(group) < seeds else method
        oracle = method.startswith("oracle")
        cells = ["" if oracle and key != "accuracy" else _spread(group, key) for key in ("accuracy", "retrained", "f1")]
        work = "" if oracle else f"{median(row['work'] for row in group):,.0f}"
        lines.append([told, *cells, work])
    return lines


def longer() -> list[list[str]]:
    """The longer run of the network, and what the clean examples are worth by themselves."""
    rows = json.loads((DOCS / "reweighting" / "cleaning_longer.json").read_text())["rows"]
    keys = ("f1", "accuracy", "retrained", "together")
    lines = [
        ["", "F1 of the clean set", "own accuracy", "trained anew at its weights", "with the clean 5,000", "gradients"]
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        cells = [_spread(group, key) if key in group[0] else "" for key in keys]
        work = f"{median(row['work'] for row in group):,.0f}" if "work" in group[0] else ""
        lines.append([method, *cells, work])
    return lines


def _spread(group: list[dict[str, float]], key: str) -> str:
    """The median of a share in per cent, with the ends where there are several."""
    values = sorted(100 * row[key] for row in group)
    return f"{median(values):.1f}" + (f" ({values[0]:.1f} to {values[-1]:.1f})" if len(values) > 1 else "")


PARTS = (
    {
        f"{part.__name__}_{name}": partial(part, name)
        for part in (accuracies, orderings)
        for name in ("results", "fashion", "perceptron")
    }
    | {name: partial(cleaning, name) for name in ("cleaning_linear", "cleaning_network")}
    | {"cleaning_longer": longer}
)

if __name__ == "__main__":
    figure(read(DOCS / "reweighting" / "results.json")).savefig(DOCS / "reweighting" / "accuracy.png", dpi=100)
