"""Writes the tables of docs/choosing.md from docs/choosing/comparison.json, which `bilevel compare` measured."""

import re
import statistics
from pathlib import Path

from bilevel.comparison import Comparison
from bilevel.comparison.rows import number, size

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"<!-- (?P<name>\w+) -->\n(?:(?!<!-- /).*\n)*<!-- /(?P=name) -->\n")
TUNING = ("digits", "mnist")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and the others numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def costs(found: Comparison) -> str:
    """One row a response on the larger tuning game: what its hypergradient and its run took."""
    heads = ["On `mnist`", "error", "gradients + products", "peak memory", "loss after the run", "work of the run"]
    rows = []
    for s in found.summaries:
        if s.game == "mnist":
            memory, work = size(s.memory.median), f"{s.work.median:,.0f}"
            rows.append(
                [s.response, number(s.error.median), work, memory, f"{s.value.median:.3f}", number(s.total.median)]
            )
    return table(heads, rows)


def errors(found: Comparison) -> str:
    """One row a response, one column a game: the error of one hypergradient, and in how much work."""
    cells = {(s.response, s.game): number(s.error.median) for s in found.summaries if s.error}
    return table(
        ["Error", *found.games],
        [[name, *[cells.get((name, game), "") for game in found.games]] for name in found.responses],
    )


def ratios(found: Comparison) -> str:
    """One row a response: work and memory of one hypergradient against implicit CG's, medians over the games."""
    by = {(s.response, s.game): s for s in found.summaries}
    rows = []
    for name in found.responses:
        pairs = [(by[name, game], by["implicit CG", game]) for game in found.games]
        ratio = [
            statistics.median([getattr(one, key).median / getattr(base, key).median for one, base in pairs])
            for key in ("work", "total", "memory")
        ]
        count = sum(s.error.median < 1e-2 for s in found.summaries if s.response == name)
        rows.append([name, *[f"{value:.1f}" for value in ratio], f"{count} of {len(found.games)}"])
    return table(
        ["Against implicit CG", "work of a hypergradient", "work of a run", "peak memory", "error below 1 %"], rows
    )


def settings(found: Comparison) -> str:
    """What made the numbers."""
    versions = ", ".join(f"{name} {found.versions[name]}" for name in ("python", "torch", "numpy", "scipy"))
    return (
        f"{len(found.games)} games, {len(found.responses)} responses, {len(found.seeds)} seeds, "
        f"{found.settings['steps']} leader steps, float64; {versions}; {found.machine}.\n"
    )


def told(page: str) -> str:
    """The page with each table as the JSON has it."""
    found = Comparison.from_json(DOCS / "choosing" / "comparison.json")
    makers = {"costs": costs, "errors": errors, "ratios": ratios, "settings": settings}

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name} -->\n{makers[name](found)}<!-- /{name} -->\n"

    return PLACE.sub(one, page)


if __name__ == "__main__":
    path = DOCS / "choosing.md"
    path.write_text(told(path.read_text(encoding="utf-8")), encoding="utf-8")
