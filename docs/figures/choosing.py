"""The tables of docs/choosing.md from docs/choosing/comparison.json, which `bilevel compare` measured."""

import statistics
from collections.abc import Callable
from pathlib import Path

from bilevel.comparison import Comparison
from bilevel.comparison.rows import number, size

DOCS = Path(__file__).resolve().parents[1]
Rows = list[list[str]]


def costs(found: Comparison) -> Rows:
    """One row a response on the larger tuning game: what its hypergradient and its run took."""
    heads = ["On `mnist`", "error", "gradients + products", "peak memory", "loss after the run", "work of the run"]
    rows = []
    for s in found.summaries:
        if s.game == "mnist":
            # A rule of play has no hypergradient of its own: its run alone.
            error = number(s.error.median) if s.error else ""
            memory, work = size(s.memory.median) if s.memory else "", f"{s.work.median:,.0f}" if s.work else ""
            rows.append([s.response, error, work, memory, f"{s.value.median:.3f}", number(s.total.median)])
    return [heads, *rows]


def errors(found: Comparison) -> Rows:
    """One row a response, one column a game: the error of one hypergradient, and in how much work."""
    cells = {(s.response, s.game): number(s.error.median) for s in found.summaries if s.error}
    return [
        ["Error", *found.games],
        *[
            [name, *[cells.get((name, game), "") for game in found.games]]
            for name in found.responses
            if any((name, game) in cells for game in found.games)
        ],
    ]


def ratios(found: Comparison) -> Rows:
    """One row a response: work and memory of one hypergradient against implicit CG's, medians over the games."""
    by = {(s.response, s.game): s for s in found.summaries}
    rows = []
    for name in found.responses:
        pairs = [(by[name, game], by["implicit CG", game]) for game in found.games]
        ratio = [
            f"{statistics.median(getattr(one, key).median / getattr(base, key).median for one, base in pairs):.1f}"
            if all(getattr(one, key) for one, _ in pairs)
            else ""
            for key in ("work", "total", "memory")
        ]
        right = [s.error.median < 1e-2 for s in found.summaries if s.response == name and s.error]
        rows.append([name, *ratio, f"{sum(right)} of {len(found.games)}" if right else ""])
    heads = ["Against implicit CG", "work of a hypergradient", "work of a run", "peak memory", "error below 1 %"]
    return [heads, *rows]


def settings(found: Comparison) -> str:
    """What made the numbers."""
    versions = ", ".join(f"{name} {found.versions[name]}" for name in ("python", "torch", "numpy", "scipy"))
    return (
        f"{len(found.games)} games, {len(found.responses)} responses, {len(found.seeds)} seeds, "
        f"{found.settings['steps']} leader steps, float64; {versions}; {found.machine}."
    )


def measured(part: Callable[[Comparison], Rows | str]) -> Callable[[], Rows | str]:
    """The part, made of the committed file."""
    return lambda: part(Comparison.from_json(DOCS / "choosing" / "comparison.json"))


PARTS = {part.__name__: measured(part) for part in (costs, errors, ratios, settings)}
