"""The table of docs/problems.md from docs/problems/results.json, which `bilevel problems --json` wrote."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
Rows = list[list[str]]


def read() -> dict[str, Any]:
    """What was measured."""
    return json.loads((DOCS / "problems" / "results.json").read_text(encoding="utf-8"))


def results() -> Rows:
    """One row a problem."""
    heads = ["Problem", "variables", "status", "value", "best known", "evaluations", "answers", "seconds"]
    rows = [heads]
    for found in read()["results"]:
        value = "" if found["value"] is None else f"{found['value']:.5g}"
        n, m = found["dimensions"]
        rows.append(
            [
                *(found["name"], f"{n} + {m}", found["status"], value, f"{found['published']:.5g}"),
                *(str(found["evaluations"]), str(found["answers"]), f"{found['seconds']:.1f}"),
            ]
        )
    return rows


def total() -> str:
    """How many are solved, and what all of them cost."""
    found = read()["results"]
    good = sum(row["status"] in ("solved", "better") for row in found)
    work, seconds = sum(row["evaluations"] for row in found), sum(row["seconds"] for row in found)
    return f"{good} of {len(found)} problems, {work:,} evaluations, {seconds:.0f} s"


def missing() -> str:
    """Those that are stated and were not measured, in words."""
    left = read()["stated"] - len(read()["results"])
    return f"{left} more are stated and were not measured here." if left else "All that are stated were measured."


def unsolved() -> str:
    """Those that are not, with their status."""
    rows = [row for row in read()["results"] if row["status"] not in ("solved", "better")]
    return ", ".join(f"{row['name']} ({row['status']})" for row in rows) or "none"


def setting() -> str:
    """How, and where."""
    found = read()
    versions, machine = found["versions"], found["machine"]
    return (
        f"{found['starts']} starts, at most {found['steps']} evaluations from each, seed {found['seed']}; "
        f"{machine['processor']}, one thread, torch {versions['torch']}, SciPy {versions['scipy']}."
    )


PARTS = {part.__name__: part for part in (results, total, missing, unsolved, setting)}
