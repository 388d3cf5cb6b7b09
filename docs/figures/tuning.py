"""The tables of docs/tuning-measured.md from docs/tuning/*.json, and the figure of docs/tuning.md.

`python docs/figures/tuning.py` runs the page's program and draws it.
"""

import json
import re
import statistics
from pathlib import Path

import bilevel as bl

DOCS = Path(__file__).resolve().parents[1]
ROWS = json.loads((DOCS / "tuning" / "one_run.json").read_text(encoding="utf-8"))["rows"]


def one_run() -> list[list[str]]:
    """Test losses of fresh trainings: at the start's values, then at what each setting found, a column a split."""
    seeds = sorted({row["seed"] for row in ROWS})
    names = list(dict.fromkeys(row["setting"] for row in ROWS))
    found = {(row["setting"], row["seed"]): row for row in ROWS}
    heads = ["", *(f"split {seed}" for seed in seeds), "mean", "the run itself", "gradients and products"]
    start = [found[names[0], seed]["start"]["loss"] for seed in seeds]
    table = [heads, ["nothing tuned", *_numbers(start), "", ""]]
    for name in names:
        mine = [found[name, seed] for seed in seeds if (name, seed) in found]
        run = statistics.fmean(row["run"]["loss"] for row in mine)
        work = f"{mine[0]['gradients']:,} + {mine[0]['products']:,}"
        table.append([name, *_numbers([row["retrained"]["loss"] for row in mine]), f"{run:.3f}", work])
    return table


def _numbers(losses: list[float]) -> list[str]:
    return [*(f"{loss:.3f}" for loss in losses), f"{statistics.fmean(losses):.3f}"]


def batch_norm() -> list[list[str]]:
    """Each treatment's hypergradient in units of retrained differences, the least and the largest over the splits."""
    runs = json.loads((DOCS / "tuning" / "batch_norm.json").read_text(encoding="utf-8"))
    columns = {"decays before a BatchNorm": (0, 1), "its own, and the head's": (2, 3), "smoothing": (4,)}
    table = [["running statistics", *columns]]
    for name in runs["runs"][0]["claims"][str(runs["steps"])]:
        cells = []
        for places in columns.values():
            shares = [
                run["claims"][str(runs["steps"])][name][place] / run["truth"][place]
                for run in runs["runs"]
                for place in places
            ]
            cells.append(f"{min(shares):.2g} to {max(shares):.2g}")
        table.append([name, *cells])
    return table


def batch_norm_runs() -> list[list[str]]:
    """Validation and test losses, a row a split and a treatment."""
    rows = json.loads((DOCS / "tuning" / "batch_norm_runs.json").read_text(encoding="utf-8"))["rows"]
    heads = ["split", "running statistics", "start's values", "values found", "the run itself", "test, values found"]
    return [heads] + [
        [str(row["seed"]), row["statistics"]]
        + [f"{row[kind]['valid']:.3f}" for kind in ("start", "found", "run")]
        + [f"{row['found']['test']:.3f}"]
        for row in rows
    ]


def jobs() -> list[list[str]]:
    """Test losses, a row a job, means over the splits."""
    rows = json.loads((DOCS / "tuning" / "jobs.json").read_text(encoding="utf-8"))["rows"]
    kinds = ("default", "start", "found", "the run itself", "random")
    named = ("nothing tuned", "start's values", "values found", "the run itself", "ten random trials")
    table = [["job", "splits", *named, "values advised"]]
    for name in dict.fromkeys(row["job"] for row in rows):
        mine = [row for row in rows if row["job"] == name and all(kind in row for kind in kinds if kind != "start")]
        if mine:
            known = [kind if all(kind in row for row in mine) else "" for kind in kinds]
            losses = [f"{statistics.fmean([row[kind]['test'] for row in mine]):.3f}" if kind else "" for kind in known]
            advised = statistics.fmean([row[row.get("advised", "found")]["test"] for row in mine])
            table.append([name, str(len(mine)), *losses, f"{advised:.3f}"])
    return table


def fashion() -> list[list[str]]:
    """One row a way to values, means over the splits."""
    document = json.loads((DOCS / "tuning" / "fashion.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    ways = {"default": "nothing tuned", "start": "start's values", "found": "values found by one run"}
    ways |= {"one run": "the run itself"} | {name: f"{name}, best" for name in ("TPE", "Hyperband", "ASHA")}
    table = [["", "splits", "steps", "validation loss", "test loss"]]
    for key, name in ways.items():
        mine = [row for row in rows if key in row]
        if not mine:
            continue
        spent = statistics.fmean(
            row[key].get("steps", row["one run"]["steps"] if key == "found" else document["steps"]) for row in mine
        )
        losses = (statistics.fmean(row[key][part] for row in mine) for part in ("valid", "test"))
        table.append([name, str(len(mine)), f"{spent:,.0f}", *(f"{loss:.3f}" for loss in losses)])
    return table


PARTS = {part.__name__: part for part in (one_run, batch_norm, batch_norm_runs, jobs, fashion)}


def main() -> None:
    """Run the page's program up to its figure, and draw it."""
    page = (DOCS / "tuning.md").read_text(encoding="utf-8")
    before, _, tuning = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:3]
    names: dict[str, object] = {"bl": bl}
    exec(before + tuning, names)
    names["tuned"].plot(DOCS / "tuning" / "run.png")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
