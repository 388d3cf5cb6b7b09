"""Runs the suite, or some of it, and writes what it found: a table, JSON, one page of HTML and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bilevel as bl
from bilevel.files import write_whole
from bilevel.workers import on_cluster, require_workers
from games.compare.laws import check_laws
from games.compare.suite import cases, responses
from games.errors import MissingExtraError
from games.experiments.style import empty_figure, save_figure

DPI = 120


def run_suite(
    *,
    games: Sequence[str],
    names: Sequence[str],
    seeds: int,
    steps: int,
    jobs: int,
    folder: Path,
    resume: bool,
    data: Path | None = None,
    cluster: str | None = None,
    examples: int = 0,
) -> bl.comparison.Comparison:
    """The responses of these names on these games, with seeds 0 to `seeds` - 1; finished runs are kept in `folder`.

    With `examples` each response is held to the laws as well, on so many small games a law. Raises
    `MissingExtraError` without joblib or matplotlib, before any work.
    """
    empty_figure()
    try:
        require_workers("compare", max(2, jobs), cluster)
    except ImportError as error:
        raise MissingExtraError(str(error)) from error
    suite = {name: case for name, case in cases(data).items() if name in games}
    answers = {name: given for name, given in responses(suite).items() if name in names}
    with on_cluster(cluster, jobs if jobs > 1 else None):  # one for the laws and the runs
        laws = (
            check_laws(list(answers), examples=examples, jobs=jobs, folder=folder, resume=resume, cluster=cluster)
            if examples
            else {}
        )
        return bl.compare(
            {name: case.play for name, case in suite.items()},
            answers,
            optimizer={name: case.optimizer for name, case in suite.items()},
            steps=steps,
            seeds=range(seeds),
            jobs=jobs,
            cluster=cluster,
            folder=folder,
            resume=resume,
            progress=True,
            laws=laws,
        )


def write_report(comparison: bl.comparison.Comparison, folder: Path) -> list[str]:
    """Write comparison.json, comparison.html, table.txt and a PNG a figure; their names."""
    comparison.to_json(folder / "comparison.json")
    comparison.to_html(folder / "comparison.html")
    write_whole(folder / "table.txt", f"{comparison}\n".encode())
    names = ["table.txt", "comparison.json", "comparison.html"]
    for name, figure in comparison.figures().items():
        save_figure(figure, folder / f"{name}.png", dpi=DPI, facecolor="white")
        names.append(f"{name}.png")
    return names
