"""The tables of docs/tuning-measured.md from docs/tuning/*.json, and the figure of docs/tuning.md.

`python docs/figures/tuning.py` runs the page's program and draws it.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

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
            checked = all("check" in row for row in mine)
            advised = f"{statistics.fmean([row[_advised(row)]['test'] for row in mine]):.3f}" if checked else ""
            table.append([name, str(len(mine)), *losses, advised])
    return table


def _advised(row: dict[str, Any]) -> str:
    """The part of a row whose values tune's check advises."""
    best: str = row["check"]["best"]
    return "default" if best == "plain" else best


def fashion() -> list[list[str]]:
    """One row a way to values: its steps, and the test loss on each split, empty where it was not measured."""
    document = json.loads((DOCS / "tuning" / "fashion.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    ways = {"default": "nothing tuned", "start": "start's values", "found": "values found by one run"}
    ways |= {"one run": "the run itself"} | {name: f"{name}, best" for name in ("TPE", "Hyperband", "ASHA")}
    table = [["", "steps", *(f"test loss, split {row['seed'] + 1}" for row in rows)]]
    for key, name in ways.items():
        first = next((row for row in rows if key in row), None)
        if first is None:
            continue
        spent = first[key].get("steps", first["one run"]["steps"] if key == "found" else document["steps"])
        losses = (f"{row[key]['test']:.3f}" if key in row else "" for row in rows)
        table.append([name, f"{spent:,.0f}", *losses])
    return table


THREE = {"found": "values found", "start": "start's values", "plain": "nothing tuned"}
FEW = 0.02
"""A difference of a validation loss that tune's check does not go by, and of a test loss that is not counted here."""


def advice() -> list[list[str]]:
    """What each check would have advised: each initialisation is once the check, and the others are the truth."""
    document = json.loads((DOCS / "tuning" / "advice.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    # Each gives, for a row, a value and an initialisation, the loss that it goes by.
    checks = {"no check, the values found": (0.0, lambda row, which, seed: float(which != "found"))}
    name = "an eighth of the steps on from the run's weights, not with nothing tuned"
    checks[name] = (0.25, lambda row, which, seed: math.inf if which == "plain" else row["on"][which][seed])
    for place, share in enumerate(document["marks"][:-1]):
        name = f"fresh, {share:.3g} of the steps"
        checks[name] = (3 * share, lambda row, which, seed, at=place: row["curve"][which][seed][at])
    for times in reversed(document["fast"]):
        name = f"fresh, {1 / times:.3g} of the steps at {times} times the rate"
        checks[name] = (3 / times, lambda row, which, seed, at=times: row[f"fast {at}"][which][seed])
    checks["fresh, all of the steps"] = (3.0, lambda row, which, seed: row["curve"][which][seed][-1])
    table = [["check", "trainings", "right of two", "test loss above the best", "worst", "worse than nothing tuned"]]
    for name, (cost, seen) in checks.items():
        above, right, worse = [], [], 0
        for row in rows:
            for seed in range(len(row["test"]["found"])):
                losses = {which: seen(row, which, seed) for which in THREE}
                losses = {which: loss if math.isfinite(loss) else math.inf for which, loss in losses.items()}
                least = min(losses, key=lambda which: losses[which])
                best = "found" if losses["found"] - losses[least] < FEW * losses[least] else least
                true = _others(row, seed)
                above.append(true[best] / min(true.values()) - 1.0)
                worse += true[best] > (1.0 + FEW) * true["plain"]
                for other in ("start", "plain"):
                    if losses[other] < math.inf and abs(true["found"] - true[other]) > FEW * min(
                        true["found"], true[other]
                    ):
                        right.append((losses["found"] < losses[other]) == (true["found"] < true[other]))
        share = f"{sum(right)} of {len(right)}" if cost else ""
        table.append(
            [name, f"{cost:.3g}", share, f"{100 * statistics.fmean(above):.1f} %", f"{100 * max(above):.0f} %"]
        )
        table[-1].append(f"{worse} of {len(above)}")
    return table


def advice_truth() -> list[list[str]]:
    """Test losses of three fresh trainings, a row a job and split."""
    rows = json.loads((DOCS / "tuning" / "advice.json").read_text(encoding="utf-8"))["rows"]
    table = [["job", "split", "nothing tuned", "start's values", "values found", "the run itself"]]
    for row in rows:
        means = [f"{statistics.fmean(row['test'][which]):.3f}" for which in ("plain", "start", "found")]
        table.append([row["job"], str(row["split"]), *means, f"{row['run']:.3f}"])
    return table


def _others(row: dict[str, Any], seed: int) -> dict[str, float]:
    """Mean test losses of the trainings with other initialisations than this one."""
    return {
        which: statistics.fmean([loss for other, loss in enumerate(row["test"][which]) if other != seed])
        for which in THREE
    }


def many_decays() -> list[list[str]]:
    """A row for each of one decay and many: test losses, means over the splits."""
    rows = json.loads((DOCS / "tuning" / "many_decays.json").read_text(encoding="utf-8"))["rows"]
    ways = {"default": "nothing tuned", "found": "values found, fresh trainings", "the run itself": "the run itself"}
    table = [["", "splits", *ways.values(), "seconds of the run"]]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way and set(ways) <= set(row)]
        losses = (statistics.fmean(row[key]["test"] for row in mine) for key in ways)
        spent = statistics.fmean(row["the run itself"]["seconds"] for row in mine)
        table.append([way, str(len(mine)), *(f"{loss:.3f}" for loss in losses), f"{spent:.0f}"])
    return table


PARTS = {
    part.__name__: part
    for part in (one_run, batch_norm, batch_norm_runs, jobs, fashion, advice, advice_truth, many_decays)
}


def main() -> None:
    """Run the page's program up to its figure, and draw it."""
    page = (DOCS / "tuning.md").read_text(encoding="utf-8")
    before, _, tuning = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:3]
    names: dict[str, object] = {"bl": bl}
    exec(before + tuning, names)
    names["tuned"].plot(DOCS / "tuning" / "run.png")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
