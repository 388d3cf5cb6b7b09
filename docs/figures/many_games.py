"""Writes the table of docs/many-games.md from docs/many-games/batch.json, which `benchmarks/batch.py` measured."""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"<!-- gains -->\n(?:(?!<!-- /).*\n)*<!-- /gains -->\n")


def gains(found: dict[str, Any]) -> str:
    """One row a problem and a way to play it, one column a number of games; then cross-validation and the settings."""
    played = [row for row in found["results"] if row["problem"] != "cross-validation"]
    counts = sorted({row["games"] for row in played})
    ratio = {(row["problem"], row["way"], row["games"]): row["ratio"] for row in played}
    lines = [
        ["Times sooner than the loop", *[f"{count:,} game{'s' * (count > 1)}" for count in counts]],
        ["---", *["---:"] * len(counts)],
        *(
            [f"{problem}, {way}", *[number(ratio[problem, way, count]) for count in counts]]
            for problem, way in dict.fromkeys((row["problem"], row["way"]) for row in played)
        ),
    ]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    searched = [row for row in found["results"] if row["problem"] == "cross-validation"]
    told = " and ".join(f"{number(row['ratio'])} times by {row['way']}" for row in searched)
    settings, machine, torch = found["settings"], found["machine"], found["versions"]["torch"]
    return (
        f"{text}\nCross-validation of the ridge regression, 100 candidates in 5 folds, all at once: {told}.\n\n"
        f"{settings['dtype']}, {machine['threads']} thread of {machine['processor']}, torch {torch}, medians "
        f"of {settings['rounds']} rounds.\n"
    )


def number(value: float) -> str:
    """Two digits or more."""
    return f"{value:.1f}" if value < 10.0 else f"{value:.0f}"


def told(page: str) -> str:
    """The page with the table as the JSON has it."""
    found = json.loads((DOCS / "many-games" / "batch.json").read_text(encoding="utf-8"))
    return PLACE.sub(lambda match: f"<!-- gains -->\n{gains(found)}<!-- /gains -->\n", page)


if __name__ == "__main__":
    path = DOCS / "many-games.md"
    path.write_text(told(path.read_text(encoding="utf-8")), encoding="utf-8")
