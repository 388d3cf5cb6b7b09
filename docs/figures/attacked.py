"""The table of docs/attacked.md from docs/attacked/verdicts.json, made by `python -m benchmarks.attack`."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
VERDICTS = ("right", "refused", "warned", "told", "no truth", "slow", "raw", "silent")


def read() -> dict[str, Any]:
    """The counts, family by family."""
    return json.loads((DOCS / "attacked" / "verdicts.json").read_text(encoding="utf-8"))


def games(found: dict[str, Any]) -> list[list[str]]:
    """A row for each family, and one for all."""
    families = found["families"]
    rows = [[row["what"].split("\n")[0], *(str(row[verdict]) for verdict in VERDICTS)] for row in families.values()]
    rows.append(["all", *(str(sum(row[verdict] for row in families.values())) for verdict in VERDICTS)])
    return [["Games", *VERDICTS], *rows]


def seeds(found: dict[str, Any]) -> str:
    """Which games these are."""
    return (
        f"Seeds {found['seed']} to {found['last_seed']}, {found['games']:,} games, torch {found['versions']['torch']}."
    )


PARTS = {"games": lambda: games(read()), "seeds": lambda: seeds(read())}
