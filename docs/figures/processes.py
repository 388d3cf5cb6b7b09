"""The tables of docs/processes-measured.md: interrupted ranks, the memory of sharded variables, the cost model."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "processes" / "interrupted.json"


def _formulas() -> Any:
    """By its path: "benchmarks" is another page's program, where the site is built."""
    spec = importlib.util.spec_from_file_location("cost_formulas", ROOT / "benchmarks" / "cost_formulas.py")
    assert spec is not None and spec.loader is not None
    found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def measured() -> dict[str, Any]:
    """What was found."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def interrupted() -> list[list[str]]:
    """One row a game and a fault: on as many ranks, on others, and what was wrong."""
    rows = [["What is played", "fault", "trials", "equal bit for bit, on 2 ranks", "within 1e-9, on 1 or 3", "wrong"]]
    for game, faults in measured()["games"].items():
        for fault, verdicts in faults.items():
            counts = [sum(v.startswith(word) for v in verdicts) for word in ("bit for bit", "within", "WRONG")]
            rows.append([game, fault, str(len(verdicts)), *map(str, counts)])
    return rows


FORMULAS = _formulas()
PARTS = {
    "interrupted": interrupted,
    "memory": FORMULAS.checked,
    "extrapolated": FORMULAS.extrapolated,
    "advised": FORMULAS.advised,
}
