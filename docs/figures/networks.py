"""Writes the tables of docs/networks.md from docs/networks/structured.json, which benchmarks/structured.py measured."""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"<!-- (?P<name>\w+) -->\n(?:(?!<!-- /).*\n)*<!-- /(?P=name) -->\n")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and the others numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def costs(found: dict[str, Any]) -> str:
    """One row a response: ratios to plain Adam."""
    alone = found["memory"]["plain"]
    plain = f"{min(row['plain_seconds'] for row in found['steps'].values()):.3f} s"
    rows = [["plain Adam", plain, "1", *(f"{alone[key] / 1e6:.0f} MB" for key in ("tensors", "process"))]]
    for name, row in found["steps"].items():
        sizes = [f"{found['memory'][name][key] / alone[key]:.2f}" for key in ("tensors", "process")]
        rows.append([name, f"{row['step_ratio']:.2f}", f"{row['round_ratio']:.2f}", *sizes])
    return table(["Against plain Adam", "step", "round", "tensors", "process"], rows)


def jacobians(found: dict[str, Any]) -> str:
    """One row a network, one column a game: cosine and residual."""
    games = found["jacobians"]

    def cell(row: dict[str, float]) -> str:
        best = f" ({row['best_possible_cosine']:.3f})" if "best_possible_cosine" in row else ""
        return f"{row['cosine']:.3f}{best}, {row['residual']:.2f}"

    names = list(next(iter(games.values())))
    rows = [[name, *(cell(networks[name]) for networks in games.values())] for name in names]
    return table(["Cosine (best possible), residual", *games], rows)


def setting(found: dict[str, Any]) -> str:
    """What was measured, and where."""
    versions, machine = found["versions"], found["machine"]
    return (
        f"An MLP of {found['weights']:,} weights, 10 hyperparameters (8 log decays, 2 sizes of noise), batches of 128, "
        f"float32, fused Adam, {found['steps_a_call']} steps of fitting a call; {machine['processor']}, one thread, "
        f"torch {versions['torch']}.\n"
    )


def told(page: str) -> str:
    """The page with each table as the JSON has it."""
    found = json.loads((DOCS / "networks" / "structured.json").read_text())
    makers = {"costs": costs, "jacobians": jacobians, "setting": setting}

    def text(match: re.Match[str]) -> str:
        return f"<!-- {match['name']} -->\n{makers[match['name']](found)}<!-- /{match['name']} -->\n"

    return PLACE.sub(text, page)


if __name__ == "__main__":
    path = DOCS / "networks.md"
    path.write_text(told(path.read_text()))
