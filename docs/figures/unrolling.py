"""The tables of docs/unrolling.md from docs/unrolling/memory.json, which `benchmarks/memory.py` measured."""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]


def read():
    """What was measured, case by case."""
    return json.loads((DOCS / "unrolling" / "memory.json").read_text(encoding="utf-8"))["rows"]


def named(row):
    """How a case differentiates, in words."""
    if row["how"] in ("plain", "all"):
        return {"plain": "plain training", "all": "`ReverseMode()`"}[row["how"]]
    told = [f"{k}={row[k]:,}".replace(",", "_") for k in ("count", "memory") if row.get(k)]
    return f"`Segments({', '.join(told)})`"


def counted(row):
    """The bytes of its tensors."""
    return "" if row.get("counted") is None else f"{row['counted'] / 1e6:,.0f} MB"


def segments():
    """Plain runs, storing all and segments, by steps."""
    rows = read()
    shown = [row for row in rows if row["how"] != "forward"]
    per_step = {row["steps"]: row["cpu"] / row["steps"] for row in rows if row["how"] == "all"}
    all_steps = per_step[max(per_step)]
    body = []
    for row in sorted(shown, key=lambda r: r["steps"]):
        share = "" if row["how"] == "plain" else f"{row['cpu'] / row['steps'] / all_steps:.2f}"
        size = f"{row['resident'] / 1e6:,.0f} MB"
        body.append([named(row), f"{row['steps']:,}", counted(row), size, f"{row['cpu']:.1f} s", share])
    heads = ["Differentiation", "steps", "tensors", "resident set", "seconds", "time a step, of storing all"]
    return [heads, *body]


def forward():
    """Forward mode by network and entries, against plain runs."""
    body = []
    for row in read():
        if row["how"] == "forward":
            net = "-".join(str(w) for w in (784, *row["hidden"], 10))
            runs = row["plain_runs"]
            body.append(
                [
                    net,
                    str(row["leaders"]),
                    str(row["steps"]),
                    counted(row),
                    f"{runs:.1f}",
                    f"{runs / (row['leaders'] + 1):.2f}",
                ]
            )
    return [["Network", "entries p", "steps", "tensors", "plain runs", "plain runs / (p + 1)"], *body]


PARTS = {part.__name__: part for part in (segments, forward)}
