"""The table of docs/curvature.md: what `benchmarks/gauss_newton.py` measured."""

import json
import statistics
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "curvature"


def read() -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((FOLDER / "gauss_newton.json").read_text(encoding="utf-8"))
    return found


def errors() -> list[list[str]]:
    """One row a method: the median error at each stop, or in how many seeds it was refused."""
    rows = read()["rows"]
    stops = sorted({row["steps"] for row in rows})
    table = [["Matrix and solver", *[f"{stop:,} steps" for stop in stops], "products"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells, products = [], []
        for stop in stops:
            group = [row for row in rows if (row["method"], row["steps"]) == (method, stop)]
            found = [row["error"] for row in group if "error" in row]
            products += [row["products"] for row in group if "products" in row]
            refused = len(group) - len(found)
            told = f"{statistics.median(found):.0%}" if found else ""
            cells.append(told + (f" (refused in {refused} of {len(group)})" if refused else ""))
        table.append(
            [method, *[cell.strip() for cell in cells], f"{statistics.median(products):.0f}" if products else ""]
        )
    return table


def told() -> list[list[str]]:
    """Beside the error, what the report said."""
    rows = [row for row in read()["rows"] if row["method"] == "CG, Gauss-Newton" and "error" in row]
    stops = sorted({row["steps"] for row in rows})
    found = [["After", "error", "the report's `error`"]]
    for stop in stops:
        group = [row for row in rows if row["steps"] == stop]
        error, said = (statistics.median(row[key] for row in group) for key in ("error", "told"))
        found.append([f"{stop:,} steps", f"{error:.0%}", f"{said:.0%}"])
    return found


PARTS = {part.__name__: part for part in (errors, told)}
