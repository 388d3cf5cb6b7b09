"""The tables of docs/minibatches.md: what `benchmarks/coverage.py`, `single_loop.py` and `samples.py` measured."""

import json
import statistics
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "minibatches"


def read(name: str) -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def coverage() -> list[list[str]]:
    """One row an interval: how often it held what it is of."""
    found = read("coverage.json")
    heads = ["Game and response", "interval", "replications", "experiments", f"held it ({found['level']:.0%} wanted)"]
    rows = [heads]
    for row in found["rows"]:
        for what, count in row["held"].items():
            named = {"mean": "of the hypergradient", "bias": "of its bias"}[what]
            told = [row["experiment"], named, str(row["replications"]), f"{row['draws']:,}"]
            rows.append([*told, f"{count / row['draws']:.1%}"])
    return rows


def single_loop() -> list[list[str]]:
    """One row a method and problem: where it ended, medians over the seeds."""
    rows = read("single_loop.json")["rows"]
    table = [["Problem", "method", "steps", "passes", "squared gradient", "of the first look"]]
    for problem, method in dict.fromkeys((row["problem"], row["method"]) for row in rows):
        group = [row for row in rows if (row["problem"], row["method"]) == (problem, method) and row["curve"]]
        if not group:
            table.append([problem, method, "", "", "failed", ""])
            continue
        last = [row["curve"][-1] for row in group]
        value, passes = (statistics.median(point[key] for point in last) for key in ("value", "passes"))
        share = statistics.median(row["curve"][-1]["value"] / row["curve"][0]["value"] for row in group)
        table.append([problem, method, f"{last[0]['step']:,}", f"{passes:,.0f}", f"{value:.1e}", f"{share:.1e}"])
    return table


def samples() -> list[list[str]]:
    """One row a solver: what it took to the target, medians over the problems, and the least and most."""
    rows = read("samples.json")["rows"]
    table = [["Solver", "of", "batch", "step", "passes", "seconds"]]
    for key in dict.fromkeys((row["by"], row["method"], row["batch"], row["step size"]) for row in rows):
        group = [row for row in rows if (row["by"], row["method"], row["batch"], row["step size"]) == key]
        there = [row for row in group if row["failed"] is None]
        named = [key[1], key[0], str(key[2]), f"{key[3]}"]
        short = "" if len(there) == len(group) else f"; {len(there)} of {len(group)}"
        if not there:
            table.append([*named, "not reached", ""])
            continue
        passes, seconds = ([row[what] for row in there] for what in ("passes", "seconds"))
        told = f"{statistics.median(passes):.0f} ({min(passes):.0f} to {max(passes):.0f}{short})"
        table.append([*named, told, f"{statistics.median(seconds):.2f}"])
    return table


def costs() -> list[list[str]]:
    """One row a way to run SABA at the same settings: milliseconds a step, and how many times plain torch's."""
    rows = [row for row in read("samples.json")["rows"] if row["method"] == "SABA" and row["failed"] is None]
    steps = {(row["by"], row["batch"], row["step size"], row["seed"]): _milliseconds(row) for row in rows}
    table = [["SABA by", "batch", "step", "ms a step", "of plain torch's"]]
    for by, batch, size in dict.fromkeys((row["by"], row["batch"], row["step size"]) for row in rows):
        plain = {seed: ms for (who, *key, seed), ms in steps.items() if who == "plain torch" and key == [batch, size]}
        mine = {seed: ms for (who, *key, seed), ms in steps.items() if who == by and key == [batch, size]}
        both = [mine[seed] / plain[seed] for seed in mine if seed in plain]
        if both:
            ratio = f"{statistics.median(both):.2g} ({min(both):.2g} to {max(both):.2g})"
            table.append([by, str(batch), f"{size}", f"{statistics.median(mine.values()):.2g}", ratio])
    return table


def _milliseconds(row: dict[str, Any]) -> float:
    """A step's, of 1,024 samples a pass."""
    return float(1000 * row["seconds"] / (row["passes"] * 1024 / row["batch"]))


def problems() -> str:
    """How many problems they were measured on."""
    return str(len({row["seed"] for row in read("samples.json")["rows"]}))


PARTS = {part.__name__: part for part in (coverage, single_loop, samples, costs, problems)}
