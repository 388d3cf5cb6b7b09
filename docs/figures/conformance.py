"""The tables of docs/conformance.md from docs/conformance/verdicts.json, made by benchmarks/conformance."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
MARKS = {"holds": "holds", "fails": "**fails**", "does not apply": "–"}


def applying(found: dict[str, Any]) -> list[str]:
    """The laws that apply to somebody, in their order."""
    rows = [row for entry in found.values() for row in entry["laws"]]
    used = {row["law"] for row in rows if row["verdict"] != "does not apply"}
    return [law for law in dict.fromkeys(row["law"] for row in rows) if law in used]


def verdicts(found: dict[str, Any], unrolled: bool) -> list[list[str]]:
    """Law by library, of those that promise the derivative of their steps or of the optimum."""
    chosen = {name: entry for name, entry in found.items() if entry["unrolled"] is unrolled}
    by = {name: {row["law"]: row for row in entry["laws"]} for name, entry in chosen.items()}
    rows = [[law, *[MARKS[by[name][law]["verdict"]] for name in chosen]] for law in applying(chosen)]
    return [["Law", *chosen], *rows]


def told(found: dict[str, Any], verdict: str) -> list[tuple[str, dict[str, Any]]]:
    """Adapter and row, for each row with this verdict under a law that applies to somebody."""
    laws = applying(found)
    return [
        (name, row)
        for name, entry in found.items()
        for row in entry["laws"]
        if row["verdict"] == verdict and row["law"] in laws
    ]


def failures(found: dict[str, Any]) -> str:
    """One line a failure: what came, and the game in one line of code."""
    lines = [
        f"* **{name}**, {row['law']}: {row['note']}\n\n    `{row['game']}`\n\n" for name, row in told(found, "fails")
    ]
    return "".join(lines)


def missing(found: dict[str, Any]) -> str:
    """Why a law does not apply, once a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, row in told(found, "does not apply"):
        reasons.setdefault((row["law"], row["note"]), []).append(name)
    return "".join(f"* {law}: {', '.join(names)}. {note}\n" for (law, note), names in reasons.items())


def versions(found: dict[str, Any]) -> str:
    """What made the verdicts."""
    entries = list(found.values())
    packages = {entry["package"]: entry["versions"][entry["package"]] for entry in entries}
    told = ", ".join(f"{package} {number}" for package, number in packages.items())
    common = {f"torch {entry['versions']['torch']}, python {entry['versions']['python']}" for entry in entries}
    examples = ", ".join(
        f"{count} for {', '.join(names)}"
        for count, names in sorted(
            {
                count: [name for name, entry in found.items() if entry["examples"] == count]
                for count in {entry["examples"] for entry in entries}
            }.items()
        )
    )
    return f"{told}; {'; '.join(sorted(common))}. Games a law (costly laws take fewer): {examples}."


def read() -> dict[str, Any]:
    """The verdicts, adapter by adapter."""
    return json.loads((DOCS / "conformance" / "verdicts.json").read_text(encoding="utf-8"))


PARTS = {
    "unrolled": lambda: verdicts(read(), True),
    "implicit": lambda: verdicts(read(), False),
    "failures": lambda: failures(read()),
    "missing": lambda: missing(read()),
    "versions": lambda: versions(read()),
}
