"""The table and the figure of docs/mixture.md: what `bilevel mixture` measured."""

import json
import statistics
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "mixture"


def read() -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    return found


def runs() -> list[list[str]]:
    """One row a run, as the command prints them."""
    from games.mixture.report import cells

    found = read()
    return cells(found["noise"], rows_of(found))


def rows_of(found: dict[str, Any]) -> list[Any]:
    """The rows as the command had them."""
    from games.mixture.run import Row

    return [Row(**row) for row in found["rows"]]


def seeds() -> list[list[str]]:
    """Medians over all seeds, with the least and the most; a row a mixture."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))]
    table = [["mixture", "noise in the end", "noise < 1 % after, steps", "test loss", "gap to the oracle closed"]]
    rows = [rows_of(one) for one in found]
    losses = [[row.loss for row in one] for one in rows]
    for each in zip(*rows, strict=True):
        noise = [sum(s for s, noisy in zip(row.shares, found[0]["noise"], strict=True) if noisy) for row in each]
        after = [row.below for row in each if row.below is not None]
        closed = [
            (uniform - row.loss) / (uniform - best) for row, (*_, uniform, best) in zip(each, losses, strict=True)
        ]
        learned = bool(each[0].curve)
        table.append([
            each[0].method,
            _spread(noise, ".1%") if learned else f"{noise[0]:.0%}",
            (_spread(after, ",.0f") if len(after) == len(each) else f"{len(after)} of {len(each)}") if learned else "",
            _spread([row.loss for row in each], ".3f"),
            _spread(closed, ".0%") if learned else "",
        ])  # fmt: skip
    return table


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def shares() -> list[list[str]]:
    """Where the shares ended, one row a source."""
    found = read()
    learned = [row for row in found["rows"] if row["curve"]]
    table = [["Source", *[row["method"] for row in learned]]]
    for index, name in enumerate(found["sources"]):
        table.append([name, *[f"{row['shares'][index]:.1%}" for row in learned]])
    return table


def settings() -> str:
    """What made the numbers."""
    found = read()
    given, machine = found["settings"], found["machine"]
    return (
        f"{given['steps']:,} training steps, {given['characters']:,} characters of each source, "
        f"{given['device']}, {machine['threads']} thread; torch {found['versions']['torch']}."
    )


PARTS = {part.__name__: part for part in (runs, seeds, shares, settings)}


def main() -> None:
    """Draw the figure anew from the committed numbers."""
    from games.experiments.style import DPI
    from games.mixture.report import figure

    found = read()
    learned = [row for row in rows_of(found) if row.curve]
    figure(found["sources"], found["noise"], learned).savefig(FOLDER / "shares.png", dpi=DPI)


if __name__ == "__main__":
    main()
