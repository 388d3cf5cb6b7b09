"""The tables of docs/gan.md from docs/gan/*.json.

`python docs/figures/gan.py FOLDER` takes these files, and the figures, from a folder that
`bilevel gan tuning finals ring grid digits mnist --output FOLDER` has filled; samples stay there. Without
a folder it draws tuning.png anew from the committed file.
"""

import json
import shutil
import statistics
import sys
from functools import partial
from pathlib import Path

from games.experiments.style import DPI
from games.gan import tuning_experiment
from games.gan.mixture_experiment import rows
from games.gan.run import by_method, final_moment, mixtures

DOCS = Path(__file__).resolve().parents[1]


def lines_of(name: str) -> list[dict[str, str]]:
    """One experiment's runs as they ended, method by method."""
    results = json.loads((DOCS / "gan" / f"{name}.json").read_text(encoding="utf-8"))["results"]
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


def table(name: str) -> list[list[str]]:
    """One experiment's table."""
    lines = lines_of(name)
    return [list(lines[0]), *([line.get(key, "") for key in lines[0]] for line in lines)]


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


PARTS = {name: partial(table, name) for name in ("ring", "grid", "digits", "mnist")}


def draw() -> None:
    """The figure of settings, which needs no samples."""
    results = json.loads((DOCS / "gan" / "tuning.json").read_text(encoding="utf-8"))["results"]
    tuning_experiment.draw(results).savefig(DOCS / "gan" / "tuning.png", dpi=DPI)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(Path(sys.argv[1]))
    draw()
