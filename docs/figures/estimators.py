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


PAIRS = (("tuned", "single"), ("tuned", "RidgeCV"), ("tuned", "LogisticRegressionCV"), ("net", "ElasticNetCV"))
THEIRS = ("RidgeCV", "LogisticRegressionCV", "ElasticNetCV")


def difference(rows: list[dict[str, Any]], mine: str, other: str) -> tuple[float, float]:
    """The mean of one less another, and its standard error."""
    less = np.array([row["test"][mine] - row["test"][other] for row in rows])
    return float(less.mean()), float(less.std(ddof=1) / len(less) ** 0.5) if len(less) > 1 else float("nan")


def losses() -> list[list[str]]:
    """One row a table of data."""
    kinds = ("tuned", "single", *THEIRS[:2], "net", "single net", THEIRS[2])
    table = [["Data", "rows x features", "splits", *kinds]]
    for name, rows in read().items():
        size = f"{rows[0]['rows']} x {rows[0]['features']}"
        table.append([name, size, str(len(rows)), *_means(rows, "test", kinds, ".4f")])
    return table


def differences() -> list[list[str]]:
    """Means and standard errors of the differences, and how much the rule used."""
    table = [["Data", *(f"{mine} - {other}" for mine, other in PAIRS), "apart", "net apart"]]
    for name, rows in read().items():
        cells = []
        for mine, other in PAIRS:
            known = mine in rows[0]["test"] and other in rows[0]["test"]
            mean, error = difference(rows, mine, other) if known else (0.0, 0.0)
            cells.append(f"{mean:+.4f} ± {error:.4f}" if known else "")
        table.append([name, *cells, *(_apart(rows, kind) for kind in ("tuned", "net"))])
    return table


def reading() -> str:
    """Which tables are better and worse than scikit-learn's, by more than two standard errors."""
    told = []
    for mine, others in (("tuned", THEIRS[:2]), ("net", THEIRS[2:])):
        sides: dict[str, list[str]] = {"better": [], "worse": []}
        for name, rows in read().items():
            for other in others:
                if mine in rows[0]["test"] and other in rows[0]["test"]:
                    mean, error = difference(rows, mine, other)
                    if abs(mean) > 2.0 * error:
                        sides["better" if mean < 0.0 else "worse"].append(name)
        words = "; ".join(f"{side} on {', '.join(names) or 'none'}" for side, names in sides.items())
        told.append(f"{mine} against {' and '.join(others)}: {words}")
    return f"By more than two standard errors of the difference, {'. '.join(told)}."


def _apart(rows: list[dict[str, Any]], kind: str) -> str:
    """In how many splits penalties were let apart."""
    return f"{sum(row[kind]['share'] > 0.0 for row in rows)} of {len(rows)}" if kind in rows[0] else ""


def _means(rows: list[dict[str, Any]], what: str, kinds: tuple[str, ...], form: str) -> list[str]:
    """Of each kind that there is."""
    known = rows[0][what]
    return [format(np.mean([row[what][kind] for row in rows]), form) if kind in known else "" for kind in kinds]


def seconds() -> list[list[str]]:
    """Of each estimator."""
    kinds = ("tuned", "single", *THEIRS[:2], "net", "single net", THEIRS[2])
    return [["Data", *kinds], *([name, *_means(rows, "seconds", kinds, ".3g")] for name, rows in read().items())]


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


PARTS = {part.__name__: part for part in (losses, differences, reading, seconds)}

if __name__ == "__main__":
    draw()
