"""The table and the figure of docs/mixture.md: what `bilevel mixture` measured."""

import json
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


PARTS = {part.__name__: part for part in (runs, shares, settings)}


def main() -> None:
    """Draw the figure anew from the committed numbers."""
    from games.experiments.style import DPI
    from games.mixture.report import figure

    found = read()
    learned = [row for row in rows_of(found) if row.curve]
    figure(found["sources"], found["noise"], learned).savefig(FOLDER / "shares.png", dpi=DPI)


if __name__ == "__main__":
    main()
