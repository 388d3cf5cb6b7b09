"""What a comparison found: rows of plain data, shown as a table, JSON or one page of HTML."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from bilevel._printed import printed
from bilevel.comparison.charts import charts
from bilevel.comparison.measurements import Measurements
from bilevel.comparison.report import page
from bilevel.comparison.rows import Reference, Row, Spread, number, plain, size
from bilevel.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@final
@dataclass(frozen=True, eq=False)
class Comparison(Measurements):
    """Games x responses x seeds, side by side.

    Attributes:
        rows: One `Row` a run.
        references: What the hypergradients of each game and seed were held against.
        settings: The arguments of `compare` that made it, as plain data.
        versions: Of Python and the packages.
        machine: Where it was measured.
        laws: Which laws each response obeys, if anybody checked.

    Examples:
        >>> row = Row("ridge", "one step", 0, failure="solve: too bad")
        >>> print(Comparison(rows=(row,)).warnings[0])
        one step on ridge: failed with seed 0: solve: too bad
    """

    def table(self) -> Table:
        """One line for each game and response: medians over the seeds, with the range where there is one."""
        from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - only where something is printed
        from rich.table import Table  # noqa: PLC0415

        shown = Table(
            title=", ".join(
                f"{len(found)} {noun if len(found) == 1 else noun + 's'}"
                for noun, found in (("game", self.games), ("response", self.responses), ("seed", self.seeds))
            ),
            caption="Medians over the seeds. error: of one hypergradient at the start, relative. value: the leader's "
            "loss at the end, the follower converged. above: that above the optimum, where it is known. work: "
            "gradients and Hessian-vector products of the run. memory: peak of the tensors of one hypergradient.",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        shown.add_column("")
        for column in ("error", "value", "above", "work", "seconds", "memory", "warnings"):
            shown.add_column(column, justify="right", no_wrap=True)
        before = None
        for summary in self.summaries:
            if summary.game != before:
                shown.add_section()
                shown.add_row(summary.game, style="bold")
            shown.add_row(
                f" {summary.response}",
                _median(summary.error),
                _median(summary.value),
                _median(summary.excess),
                _median(summary.total),
                _median(summary.seconds),
                size(summary.memory.median) if summary.memory else "",
                f"{summary.failures} failed" if summary.failures else str(summary.warnings or ""),
            )
            before = summary.game
        return shown

    def __str__(self) -> str:
        """The table, and how many warnings there are to read."""
        told = self.warnings
        first = [f"{len(told)} warnings, in .warnings; the first: {told[0]}"] if told else []
        return printed(self.table(), *first)

    def to_json(self, path: str | Path) -> None:
        """Write all of it; `from_json` reads it again."""
        content = {
            "settings": self.settings,
            "versions": self.versions,
            "machine": self.machine,
            "laws": {name: [list(law) for law in laws] for name, laws in self.laws.items()},
            "references": list(self.references),
            "rows": list(self.rows),
        }
        lines = json.dumps(_short(plain(content)), allow_nan=False, indent=None)
        # One run a line: a diff of two files says which of them changed.
        write_whole(Path(path), (lines.replace('{"game": ', '\n{"game": ') + "\n").encode())

    @staticmethod
    def from_json(path: str | Path) -> Comparison:
        """What `to_json` wrote, to seven digits."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return Comparison(
            rows=tuple(Row.load(row) for row in content["rows"]),
            references=tuple(Reference(**reference) for reference in content["references"]),
            settings=content["settings"],
            versions=content["versions"],
            machine=content["machine"],
            laws={name: [(law[0], law[1], law[2]) for law in laws] for name, laws in content["laws"].items()},
        )

    def figures(self) -> dict[str, Figure]:
        """By name: "error" and "value" against work, and "memory".

        Raises:
            ImportError: Without matplotlib.
        """
        return {name: chart.figure for name, chart in charts(self).items()}

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs no other file and no network.

        Raises:
            ImportError: Without matplotlib.
        """
        write_whole(Path(path), page(self).encode())


def _median(spread: Spread | None) -> str:
    return "" if spread is None else number(spread.median)


def _short(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _short(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_short(value) for value in tree]
    return float(f"{tree:.7g}") if isinstance(tree, float) else tree
