"""The table of docs/many-games.md from docs/many-games/batch.json, which `benchmarks/batch.py` measured."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]


def read() -> dict[str, Any]:
    """What was measured."""
    return json.loads((DOCS / "many-games" / "batch.json").read_text(encoding="utf-8"))


def played() -> list[dict[str, Any]]:
    """The results of games; those of cross-validation are apart."""
    return [row for row in read()["results"] if row["problem"] != "cross-validation"]


def gains() -> list[list[str]]:
    """One row a problem and a way to play it, one column a number of games."""
    rows = played()
    counts = sorted({row["games"] for row in rows})
    ratio = {(row["problem"], row["way"], row["games"]): row["ratio"] for row in rows}
    return [
        ["Times sooner than the loop", *[f"{count:,} game{'s' * (count > 1)}" for count in counts]],
        *(
            [f"{problem}, {way}", *[number(ratio[problem, way, count]) for count in counts]]
            for problem, way in dict.fromkeys((row["problem"], row["way"]) for row in rows)
        ),
    ]


def gain_of_a_thousand() -> str:
    """The least and the largest gain over the loop with 1,000 games."""
    ratios = [row["ratio"] for row in played() if row["games"] == 1000]
    return f"{number(min(ratios))} to {number(max(ratios))}"


def cross_validation() -> str:
    """The gain of cross-validation, by each way."""
    searched = [row for row in read()["results"] if row["problem"] == "cross-validation"]
    return " and ".join(f"{number(row['ratio'])} times by {row['way']}" for row in searched)


def settings() -> str:
    """What made the numbers."""
    found = read()
    settings, machine, torch = found["settings"], found["machine"], found["versions"]["torch"]
    return (
        f"{settings['dtype']}, {machine['threads']} thread of {machine['processor']}, torch {torch}, medians "
        f"of {settings['rounds']} rounds"
    )


def number(value: float) -> str:
    """Two digits or more."""
    return f"{value:.1f}" if value < 10.0 else f"{value:.0f}"


PARTS = {part.__name__: part for part in (gains, gain_of_a_thousand, cross_validation, settings)}
