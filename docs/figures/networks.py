"""The tables of docs/networks.md from docs/networks/structured.json, which benchmarks/structured.py measured."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
Rows = list[list[str]]


def read() -> dict[str, Any]:
    """What was measured."""
    return json.loads((DOCS / "networks" / "structured.json").read_text(encoding="utf-8"))


def costs() -> Rows:
    """One row a response: ratios to plain Adam."""
    found = read()
    alone = found["memory"]["plain"]
    plain = f"{min(row['plain_seconds'] for row in found['steps'].values()):.3f} s"
    rows = [["plain Adam", plain, "1", *(f"{alone[key] / 1e6:.0f} MB" for key in ("tensors", "process"))]]
    for name, row in found["steps"].items():
        sizes = [f"{found['memory'][name][key] / alone[key]:.2f}" for key in ("tensors", "process")]
        rows.append([name, f"{row['step_ratio']:.2f}", f"{row['round_ratio']:.2f}", *sizes])
    return [["Against plain Adam", "step", "round", "tensors", "process"], *rows]


def jacobians() -> Rows:
    """One row a network, one column a game: cosine and residual."""
    games = read()["jacobians"]

    def cell(row: dict[str, float]) -> str:
        best = f" ({row['best_possible_cosine']:.3f})" if "best_possible_cosine" in row else ""
        return f"{row['cosine']:.3f}{best}, {row['residual']:.2f}"

    names = list(next(iter(games.values())))
    rows = [[name, *(cell(networks[name]) for networks in games.values())] for name in names]
    return [["Cosine (best possible), residual", *games], *rows]


def setting() -> str:
    """What was measured, and where."""
    found = read()
    versions, machine = found["versions"], found["machine"]
    return (
        f"An MLP of {found['weights']:,} weights, 10 hyperparameters (8 log decays, 2 sizes of noise), batches of 128, "
        f"float32, fused Adam, {found['steps_a_call']} steps of fitting a call; {machine['processor']}, one thread, "
        f"torch {versions['torch']}."
    )


PARTS = {part.__name__: part for part in (costs, jacobians, setting)}
