"""The table of docs/processes-measured.md: what `benchmarks/interrupted_ranks.py` found."""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "processes" / "interrupted.json"


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


PARTS = {"interrupted": interrupted}
