"""The tables of docs/tasks.md: what `benchmarks/tasks.py` and `bilevel meta sinusoid` measured."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tasks"


def read(name: str) -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def gains() -> list[list[str]]:
    """One row a method and number of tasks: how many times sooner one pass is than the loops, and than torch's own."""
    head = [
        "Times sooner, tasks in a batch",
        "than the library's loop",
        "than plain torch's loop",
        "than torch.func.vmap",
    ]
    rows = [head]
    for row in read("tasks.json")["results"]:
        ratios = row["ratios"]
        plain, at_once = (f"{ratios[way]:.1f}" if way in ratios else "" for way in ("plain torch", "vmap by hand"))
        rows.append([f"{row['method']}, {row['tasks']}", f"{ratios['loop']:.1f}", plain, at_once])
    return rows


def sinusoid() -> list[list[str]]:
    """One row a run, with the published number beside it."""
    from games.meta.catalogue import rows

    found = rows("sinusoid", read("sinusoid.json")["results"])
    return [list(found[0]), *(list(row.values()) for row in found)]


PARTS = {part.__name__: part for part in (gains, sinusoid)}
