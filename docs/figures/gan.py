"""Writes the tables of docs/gan.md from docs/gan/*.json.

`python docs/figures/gan.py FOLDER` first takes them, and the figures, from a folder that
`bilevel gan tuning finals ring grid digits mnist --output FOLDER` has filled; samples stay there.
"""

import json
import re
import shutil
import statistics
import sys
from pathlib import Path

from games.gan.mixture_experiment import rows
from games.gan.run import by_method, final_moment, mixtures

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"<!-- (?P<name>\w+) -->\n(?:(?!<!-- /).*\n)*<!-- /\w+ -->\n")


def lines_of(name: str, results: dict) -> list[dict[str, str]]:
    """One experiment's table."""
    if name in mixtures():
        return rows(mixtures()[name], results)
    found = []
    for method, runs in by_method(results).items():
        ends = [end for end in map(final_moment, runs) if end is not None]
        values = sorted(end["frechet"] for end in ends)
        found.append(
            {
                "discriminator": method,
                "Frechet distance": f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})",
                "digits made": f"{statistics.median(end['classes'] for end in ends):.0f}",
                "seconds": f"{statistics.median(end['seconds'] for end in ends):.0f}",
            }
        )
    return [*found, {"discriminator": "real images", "Frechet distance": f"{runs[0]['floor']:.2f}"}]


def told(page: str) -> str:
    """The page with the files' numbers in its tables."""

    def table(match: re.Match) -> str:
        name = match["name"]
        file = DOCS / "gan" / f"{name}.json"
        if not file.exists():
            return match[0]
        lines = lines_of(name, json.loads(file.read_text(encoding="utf-8"))["results"])
        head = list(lines[0])
        body = ["| " + " | ".join(line.get(key, "") for key in head) + " |" for line in lines]
        whole = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *body]
        return "\n".join([f"<!-- {name} -->", *whole, f"<!-- /{name} -->", ""])

    return PLACE.sub(table, page)


def take(folder: Path) -> None:
    """Figures as they are; results without the samples, which are most of the bytes."""
    target = DOCS / "gan"
    target.mkdir(exist_ok=True)
    for figure in folder.glob("*.png"):
        shutil.copy(figure, target / figure.name)
    for file in folder.glob("*.json"):
        whole = json.loads(file.read_text(encoding="utf-8"))
        for result in whole["results"].values():
            for moment in result["moments"]:
                moment.pop("samples", None)
        (target / file.name).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        take(Path(sys.argv[1]))
    target = DOCS / "gan.md"
    target.write_text(told(target.read_text(encoding="utf-8")), encoding="utf-8")
