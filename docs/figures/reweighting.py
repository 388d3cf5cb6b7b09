"""Writes the table of docs/reweighting.md from docs/reweighting/results.json, made by `bilevel reweight --seeds 3`."""

import re
from pathlib import Path

from games.reweighting.run import figure, medians, read

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"<!-- results -->\n(?:(?!<!-- /).*\n)*<!-- /results -->\n")


def told(page: str) -> str:
    """The page with the file's medians in its table."""
    lines = ["| labels | method | accuracy | AUC | recovered | seconds |", "|---|---|---|---|---|---|"]
    for case, methods in medians(read(DOCS / "reweighting" / "results.json")).items():
        for method, n in methods.items():
            auc = "" if n["auc"] is None else f"{n['auc']:.3f}"
            recovered = "" if n["recovered"] is None else f"{100 * n['recovered']:.0f} %"
            seconds = f"{n['seconds']:.0f}" if n["seconds"] else ""
            shown = case if method == "plain" else ""
            lines.append(f"| {shown} | {method} | {n['accuracy']:.3f} | {auc} | {recovered} | {seconds} |")
    table = "\n".join(lines)
    return PLACE.sub(lambda _: f"<!-- results -->\n{table}\n<!-- /results -->\n", page)


if __name__ == "__main__":
    target = DOCS / "reweighting.md"
    target.write_text(told(target.read_text(encoding="utf-8")), encoding="utf-8")
    figure(read(DOCS / "reweighting" / "results.json")).savefig(DOCS / "reweighting" / "accuracy.png", dpi=100)
