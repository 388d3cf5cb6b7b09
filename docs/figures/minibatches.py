"""The tables of docs/minibatches.md: what `benchmarks/coverage.py` measured."""

import json
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


PARTS = {part.__name__: part for part in (coverage,)}
