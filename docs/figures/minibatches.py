"""The tables of docs/minibatches.md: what `benchmarks/coverage.py` and `benchmarks/single_loop.py` measured."""

import json
import statistics
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "minibatches"


def read(name: str) -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def coverage() -> list[list[str]]:
    """One row an interval: how often it held what it is of."""
    found = read("coverage.json")
    heads = ["Game and response", "interval", "replications", "experiments", f"held it ({found['level']:.0%} wanted)"]
    rows = [heads]
    for row in found["rows"]:
        for what, count in row["held"].items():
            named = {"mean": "of the hypergradient", "bias": "of its bias"}[what]
            told = [row["experiment"], named, str(row["replications"]), f"{row['draws']:,}"]
            rows.append([*told, f"{count / row['draws']:.1%}"])
    return rows


def single_loop() -> list[list[str]]:
    """One row a method and problem: where it ended, medians over the seeds."""
    rows = read("single_loop.json")["rows"]
    table = [["Problem", "method", "steps", "passes", "squared gradient", "of the first look"]]
    for problem, method in dict.fromkeys((row["problem"], row["method"]) for row in rows):
        group = [row for row in rows if (row["problem"], row["method"]) == (problem, method) and row["curve"]]
        if not group:
            table.append([problem, method, "", "", "failed", ""])
            continue
        last = [row["curve"][-1] for row in group]
        value, passes = (statistics.median(point[key] for point in last) for key in ("value", "passes"))
        share = statistics.median(row["curve"][-1]["value"] / row["curve"][0]["value"] for row in group)
        table.append([problem, method, f"{last[0]['step']:,}", f"{passes:,.0f}", f"{value:.1e}", f"{share:.1e}"])
    return table


PARTS = {part.__name__: part for part in (coverage, single_loop)}
