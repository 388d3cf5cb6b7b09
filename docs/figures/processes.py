"""The tables of docs/processes-measured.md: interrupted ranks, the memory of sharded variables, the cost model."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import cost_model  # noqa: E402

FILE = ROOT / "docs" / "processes" / "interrupted.json"


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


PARTS = {
    "interrupted": interrupted,
    "memory": cost_model.checked,
    "extrapolated": cost_model.extrapolated,
    "advised": cost_model.advised,
}
