"""The tables and the figure of docs/estimators.md: what `python -m benchmarks.estimators` measured.

python docs/figures/estimators.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "estimators"
NOISY = "diabetes and 30 columns of noise"


def read() -> dict[str, list[dict[str, Any]]]:
    """The splits of each table."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["results"]:
        found.setdefault(row["set"], []).append(row)
    return found


def difference(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The mean of tuned less single, and its standard error."""
    less = np.array([row["test"]["tuned"] - row["test"]["single"] for row in rows])
    return float(less.mean()), float(less.std(ddof=1) / len(less) ** 0.5) if len(less) > 1 else float("nan")


def losses() -> list[list[str]]:
    """One row a table of data."""
    theirs = ("RidgeCV", "LogisticRegressionCV", "ElasticNetCV")
    table = [["Data", "rows x features", "splits", "tuned", "single", *theirs, "tuned - single", "apart"]]
    for name, rows in read().items():
        means = {
            kind: f"{np.mean([row['test'][kind] for row in rows]):.3f}" if kind in rows[0]["test"] else ""
            for kind in ("tuned", "single", *theirs)
        }
        mean, error = difference(rows)
        apart = sum(row["spread"] > 0.0 for row in rows)
        size = f"{rows[0]['rows']} x {rows[0]['features']}"
        table.append(
            [name, size, str(len(rows)), *means.values(), f"{mean:+.4f} ± {error:.4f}", f"{apart} of {len(rows)}"]
        )
    return table


def reading() -> str:
    """Which tables are better and worse than by the single penalty, by more than two standard errors."""
    sides: dict[str, list[str]] = {"better": [], "worse": [], "alike": []}
    for name, rows in read().items():
        mean, error = difference(rows)
        side = "better" if mean < -2.0 * error else "worse" if mean > 2.0 * error else "alike"
        sides[side].append(name)
    told = [f"{side}: {'; '.join(names) or 'none'}" for side, names in sides.items()]
    return (
        "Against the single penalty, by more than two standard errors of the difference: "
        + ". ".join(part[0].upper() + part[1:] for part in told)
        + "."
    )


def seconds() -> list[list[str]]:
    """Of each estimator."""
    kinds = ("tuned", "single", "RidgeCV", "LogisticRegressionCV", "ElasticNetCV")
    table = [["Data", *kinds]]
    for name, rows in read().items():
        row = [
            f"{np.mean([row['seconds'][kind] for row in rows]):.3g}" if kind in rows[0]["seconds"] else ""
            for kind in kinds
        ]
        table.append([name, *row])
    return table


def draw() -> None:
    """The penalties of one split."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_diabetes

    row = read()[NOISY][0]
    penalties, names = np.array(row["penalties"]), load_diabetes().feature_names
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    real = len(names)
    places = np.arange(len(penalties))
    axes.semilogy(places[:real], penalties[:real], "o", color="#3f51b5", label="features of the data")
    axes.semilogy(places[real:], penalties[real:], "o", color="#9e9e9e", label="columns of noise")
    axes.axhline(row["single_penalty"], color="#e65100", linewidth=1, label="best single penalty")
    axes.set_xticks(places[:real], names, rotation=60)
    axes.set_ylabel("penalty")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "penalties.png", dpi=150)


PARTS = {part.__name__: part for part in (losses, reading, seconds)}

if __name__ == "__main__":
    draw()
