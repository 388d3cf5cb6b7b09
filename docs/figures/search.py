"""The tables of docs/search.md from docs/search/*.json, made by benchmarks/tuning; draws its curves when it is run."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patheffects import withStroke

from games.experiments.style import BLACK, BLUE, GREEN, LARGE, ORANGE, PURPLE, RED, SKY, SMALL, empty_figure, label_axes

DOCS = Path(__file__).resolve().parents[1]
SEARCHES, METHODS = ("TPE", "Hyperband", "random", "grid"), ("unrolled", "implicit", "hypernetwork")
GREY = "0.35"
LOOKS = {
    "unrolled": (BLUE, "-"),
    "implicit": (GREEN, "-"),
    "hypernetwork": (PURPLE, "-"),
    "unrolled, longer": (BLUE, ":"),
    "unrolled, forgetful": (GREY, "-"),
    "TPE": (RED, "--"),
    "Hyperband": (ORANGE, "--"),
    "random": (SKY, "--"),
    "grid": (BLACK, "--"),
}
OWN, FORGETS = "unrolled, own weights", "unrolled, forgetful"
LATER = (FORGETS,)
"""Measured in a run of its own: its seconds are not beside the others'."""
Runs = dict[str, list[dict[str, Any]]]
Rows = list[list[str]]


def read(name: str) -> dict[str, Any]:
    """A file of docs/search."""
    return json.loads((DOCS / "search" / f"{name}.json").read_text(encoding="utf-8"))


def by_method(found: dict[str, Any], problem: str, methods: Iterable[str] = LOOKS) -> Runs:
    """Method -> its results, seed by seed."""
    runs: Runs = {method: [] for method in methods}
    for key, result in found["results"].items():
        name, rest = key.split(" ", 1)
        method = rest.rsplit(" ", 1)[0]
        if name == problem and method in runs:
            runs[method].append(result)
    return {method: results for method, results in runs.items() if results}


def reached(curve: list[list[float]], loss: float) -> float:
    """The work at which a falling curve is first at or below a loss; infinite when it never is."""
    return next((work for work, _, value in curve if value <= loss), float("inf"))


def saved(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    """How many times our whole work theirs took to the validation loss that ours ended with, seed by seed."""
    ends = [run["curve"][-1] for run in ours]
    return [reached(their["curve"], end[2]) / end[0] for end, their in zip(ends, theirs, strict=True)]


def beaten(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int:
    """In how many seeds ours ended at or below the validation loss that theirs ended with."""
    return sum(a["curve"][-1][2] <= b["curve"][-1][2] for a, b in zip(ours, theirs, strict=True))


def spread(values: list[float], middle: Callable[[list[float]], float] = statistics.median) -> str:
    """Median, or another middle, lowest and highest."""
    return f"{middle(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def times(ratios: list[float], most: float) -> str:
    """The median of ratios; those that are infinite are only known to be above `most`."""
    median = statistics.median(ratios)
    return f"over {most:.0f}" if median == float("inf") else f"{median:.1f}"


def main_table(found: dict[str, Any], problem: str) -> Rows:
    """What each method spent and found."""
    runs = by_method(found, problem)
    heads = [
        "method",
        "steps",
        "CPU s",
        "validation",
        "test",
        "accuracy",
        "seeds that match TPE",
        "TPE steps to the same loss",
    ]
    rows = []
    for method, results in runs.items():
        ends = [run["curve"][-1] for run in results]
        most = runs["TPE"][0]["curve"][-1][0] / statistics.median(end[0] for end in ends)
        ours = method not in SEARCHES
        rows.append(
            [
                method,
                f"{statistics.median(end[0] for end in ends):,.0f}",
                f"{statistics.median(end[1] for end in ends):.1f}" if method not in LATER else "",
                spread([run["standard"]["valid"] for run in results]),
                spread([run["standard"]["test"] for run in results]),
                f"{statistics.median(run['standard']['accuracy'] for run in results):.3f}",
                f"{beaten(results, runs['TPE'])} of {len(results)}" if method != "TPE" else "",
                f"{times(saved(results, runs['TPE']), most)} times" if ours else "",
            ]
        )
    return [heads, *rows]


def slopes_table(found: dict[str, Any], theirs: dict[str, Any]) -> Rows:
    """The search that takes hypergradients, and what is left of it without a part: beside TPE on the same seeds."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for key, result in [*found["results"].items(), *theirs["results"].items()]:
        method, seed = key.split(" ", 1)[1].rsplit(" ", 1)
        if key.startswith("ten ") and (method == "TPE" or key in found["results"]):
            runs.setdefault(method, {})[seed] = result
    aims = {seed: run["curve"][-1][2] for seed, run in runs["TPE"].items()}
    rows = []
    for method, results in runs.items():
        ends = {seed: run["curve"][-1] for seed, run in results.items()}
        at = sum(end[2] <= aims[seed] for seed, end in ends.items())
        near = sum(end[2] <= 1.01 * aims[seed] for seed, end in ends.items())
        rows.append(
            [
                method,
                f"{statistics.median(end[0] for end in ends.values()):,.0f}",
                f"{statistics.median(end[1] for end in ends.values()):.1f}",
                spread([run["standard"]["valid"] for run in results.values()]),
                spread([run["standard"]["test"] for run in results.values()]),
                f"{at} of {len(ends)}" if method != "TPE" else "",
                f"{near} of {len(ends)}" if method != "TPE" else "",
            ]
        )
    return [["method", "steps", "CPU s", "validation", "test", "seeds at TPE's loss", "within 1 %"], *rows]


def slopes_by_seed(found: dict[str, Any], theirs: dict[str, Any]) -> Rows:
    """The validation loss of each seed."""
    methods = ("TPE", "slopes, a tenth", "slopes, a twentieth")
    merged = {**theirs["results"], **found["results"]}
    seeds = sorted({int(key.rsplit(" ", 1)[1]) for key in found["results"]})
    rows = [
        [method, *[f"{merged[f'ten {method} {seed}']['curve'][-1][2]:.4f}" for seed in seeds]] for method in methods
    ]
    return [["seed", *map(str, seeds)], *rows]


def converged_table(found: dict[str, Any], problem: str) -> Rows:
    """The same hyperparameters after a training of five times the steps."""
    rows = [
        [method, *[spread([run["converged"][key] for run in results]) for key in ("valid", "test", "accuracy")]]
        for method, results in by_method(found, problem).items()
    ]
    if problem == "many":
        for method, results in by_method(found, problem).items():
            if "both" in results[0]:
                told = [spread([run["both"][key] for run in results]) for key in ("test", "accuracy")]
                rows.append([f"{method}, trained on both", "", *told])
    return [["method", "validation", "test", "accuracy"], *rows]


def own_table(found: dict[str, Any], problem: str) -> Rows:
    """The weights of a run that tunes while it trains, beside trainings that do not, with all steps that led there."""
    runs = by_method(found, problem, (*LOOKS, OWN, "start"))
    trial, long = 200, 1000
    rows = []

    def row(name: str, steps: float, ends: list[dict[str, float]]) -> None:
        told = [spread([end[key] for end in ends]) for key in ("valid", "test", "accuracy")]
        rows.append([name, f"{steps:,.0f}", *told])

    row(OWN, statistics.median(run["work"] for run in runs[OWN]), [run["own"] for run in runs[OWN]])
    for label, part, steps in (("a trial", "standard", trial), (f"{long:,} steps", "converged", long)):
        for method in ("start", FORGETS if FORGETS in runs else "unrolled", "grid", "TPE"):
            spent = 0.0 if method == "start" else statistics.median(run["curve"][-1][0] for run in runs[method])
            more = steps if method == "start" or part == "converged" else 0
            where = "the start's" if method == "start" else f"{method.split(',')[0]}'s"
            row(f"{label} at {where}", spent + more, [run[part] for run in runs[method]])
    return [["weights of", "steps", "validation", "test", "accuracy"], *rows]


def tried(choice: dict[str, Any]) -> Rows:
    """Every setting that was tried: its mean validation loss on the seeds of the choice."""
    losses: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for key, result in choice["results"].items():
        problem, s = key.split(" ", 1)[0], result["setting"]
        betas = f"{s['momentum']}, {s['memory']}"
        row = (s["method"], str(s["inner"]), str(s["lr"]), betas, str(s["strength"] or ""))
        losses.setdefault(row, {}).setdefault(problem, []).append(result["valid"])
    rows = []
    for row in sorted(losses, key=lambda row: METHODS.index(row[0])):
        ten, many = losses[row]["ten"], losses[row].get("many")
        rows.append([*row, spread(ten, middle=statistics.fmean), f"{statistics.fmean(many):.3f}" if many else ""])
    return [["method", "inner steps", "rate", "betas", "damping or scale", "ten", "many"], *rows]


def measured(found: dict[str, Any]) -> str:
    """How often, and by what versions."""
    seeds, made = len(by_method(found, "ten")["TPE"]), found["versions"]
    return f"{seeds} seeds; python {made['python']}, torch {made['torch']}, Optuna {made['optuna']}"


def suggesting(found: dict[str, Any]) -> str:
    """The CPU seconds that TPE takes to suggest as many numbers as `many` has, once its random trials are over."""
    return f"{found['seconds to suggest']['7850']:.1f}"


def of(name: str, part: Callable[[dict[str, Any]], Rows | str]) -> Callable[[], Rows | str]:
    """The part, made of a committed file."""
    return lambda: part(read(name))


PARTS = {
    "measured": of("results", measured),
    "suggesting": of("results", suggesting),
    "tried": of("choice", tried),
    "slopes": of("slopes", lambda found: slopes_table(found, read("results"))),
    "slopes_by_seed": of("slopes", lambda found: slopes_by_seed(found, read("results"))),
    "slope_seeds": of("slopes", lambda found: str(len({key.rsplit(" ", 1)[1] for key in found["results"]}))),
    **{problem: of("results", partial(main_table, problem=problem)) for problem in ("ten", "many")},
    **{f"{p}_converged": of("results", partial(converged_table, problem=p)) for p in ("ten", "many")},
    **{f"{p}_own": of("results", partial(own_table, problem=p)) for p in ("ten", "many")},
}


def along(run: dict[str, Any], axis: int, at: np.ndarray, stepwise: bool) -> np.ndarray:
    """A curve's loss at places along work (axis 0) or seconds (1); nothing outside it, but the best so far stays."""
    x, y = (np.array([point[i] for point in run["curve"]]) for i in (axis, 2))
    if stepwise:
        place = np.searchsorted(x, at * (1 + 1e-9), side="right") - 1
        return np.where((place >= 0) & (at <= x[-1] * 1.001), y[np.maximum(place, 0)], np.nan)
    return np.interp(at, x, y, left=np.nan, right=np.nan)


def figure(found: dict[str, Any]) -> Any:
    """Validation loss over training steps and over seconds, a row for each problem."""
    drawn = empty_figure(13.5, 10.5)
    panels = drawn.subplots(2, 2, sharey="row")
    titles = {"ten": "10 hyperparameters of a network", "many": "7,850 decays of a softmax classifier"}
    names = ("training steps (gradients + Hessian-vector products)", "CPU seconds")
    for row, problem in zip(panels, titles, strict=True):
        runs = by_method(found, problem)
        tips: dict[Any, list[tuple[float, float, str]]] = {panel: [] for panel in row}
        for axis, panel in enumerate(row):
            for method, results in runs.items():
                if axis == 1 and method in LATER:
                    continue
                colour, line = LOOKS[method]
                starts, ends = ([run["curve"][i][axis] for run in results] for i in (0, -1))
                at = np.geomspace(max(starts), min(ends), 400)
                lines = np.array([along(run, axis, at, method in SEARCHES) for run in results])
                middle = np.median(lines, axis=0)
                if method in ("unrolled", "TPE"):  # more bands than two hide each other
                    panel.fill_between(at, lines.min(0), lines.max(0), color=colour, alpha=0.13, linewidth=0)
                panel.plot(at, middle, line, color=colour, linewidth=2.4)
                panel.plot(at[-1], middle[-1], "o", color=colour, markersize=6)
                tips[panel].append((float(at[-1]), float(middle[-1]), method))
            if axis == 0:
                twentieth = runs["TPE"][0]["curve"][-1][0] / 20
                panel.axvline(twentieth, color="0.55", linewidth=1.2, linestyle=":")
                panel.annotate(
                    "a twentieth of TPE's", (twentieth, 1.0), (5, -4), xycoords=("data", "axes fraction"), va="top",
                    textcoords="offset points", fontsize=SMALL, color="0.35",
                )  # fmt: skip
            panel.set_xscale("log")
            label_axes(panel, x=names[axis], y="validation loss (nats)" if axis == 0 else "")
        low = min(run["curve"][-1][2] for results in runs.values() for run in results)
        high = max(np.median([run["curve"][0][2] for run in results]) for results in runs.values())
        row[0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        row[0].set_title(titles[problem], fontsize=LARGE, loc="left")
        for panel, ends in tips.items():
            name_lines(panel, ends)
    return drawn


def name_lines(panel: Any, ends: list[tuple[float, float, str]]) -> None:
    """Each line's name beside its end; names that would meet are moved apart, upwards and downwards alike."""
    low, high = panel.get_ylim()
    gap = 0.052 * (high - low)
    panel.set_xlim(right=max(x for x, _, _ in ends) * 3.5)
    ends = sorted(ends, key=lambda end: end[1])
    places = [y for _, y, _ in ends]
    for _ in range(200):
        for i, j in itertools.combinations(range(len(ends)), 2):
            lack = gap - (places[j] - places[i])
            if lack > 0 and abs(np.log(ends[i][0] / ends[j][0])) < np.log(6.0):
                places[i], places[j] = places[i] - lack / 2, places[j] + lack / 2
    for (x, _, method), place in zip(ends, places, strict=True):
        name = panel.text(1.12 * x, place, method, color=LOOKS[method][0], fontsize=SMALL, va="center")
        name.set_path_effects([withStroke(linewidth=4, foreground="white")])


if __name__ == "__main__":
    figure(read("results")).savefig(DOCS / "search" / "curves.png", dpi=100)
