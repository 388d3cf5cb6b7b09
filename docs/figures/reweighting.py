"""The tables of docs/reweighting.md from docs/reweighting/*.json; draws their figure when it is run.

`results.json` is `bilevel reweight --seeds 3`, `fashion.json` is `bilevel reweight --seeds 3 --steps 60 --data FOLDER`
with Fashion-MNIST's IDX files, `cleaning.json` is `python -m
benchmarks.cleaning --hidden 0 --seeds 1 --data FOLDER --method F2SA Nudged SingleLoop LastStep Implicit`,
`perceptron.json` is `bilevel reweight --hidden 64 --case 'symmetric 0.4' --seeds 3`.
"""

import json
from functools import partial
from pathlib import Path

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


def cleaning() -> list[list[str]]:
    """Accuracy, F1 and work of hyper-cleaning, a row a method."""
    lines = [["method", "test accuracy", "F1 of the clean set", "gradients and products"]]
    for row in json.loads((DOCS / "reweighting" / "cleaning.json").read_text())["rows"]:
        lines.append([row["method"], f"{row['accuracy']:.1%}", f"{row['f1']:.1%}", f"{row['work']:,}"])
    return lines


PARTS = {
    f"{part.__name__}_{name}": partial(part, name)
    for part in (accuracies, orderings)
    for name in ("results", "fashion", "perceptron")
} | {"cleaning": cleaning}

if __name__ == "__main__":
    figure(read(DOCS / "reweighting" / "results.json")).savefig(DOCS / "reweighting" / "accuracy.png", dpi=100)
