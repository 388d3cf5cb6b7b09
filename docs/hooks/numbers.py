"""Measured numbers come into the pages as the site is built, by this hook of mkdocs.yml and no other way.

`{{ performance.growth }}` on a page becomes what `PARTS["growth"]()` of docs/figures/performance.py returns. A list of
rows, the first of them its heads, becomes a table; a string stays as it is, and may stand within a sentence. A part
reads the committed files each time, so measuring anew changes the page and nothing else. A part that is not there
stops the build.
"""

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[1] / "figures"
PLACE = re.compile(r"\{\{ *(?P<figures>\w+)\.(?P<part>\w+) *\}\}")
NUMBER = re.compile(r"([-+]?[\d.,]+(e[-+]?\d+)?( ?[a-zA-Z%]{1,2})?)?")


def filled(page: str) -> str:
    """The page with each part in its place. Raises `KeyError` for a part that no program has."""
    return PLACE.sub(lambda match: _part(match["figures"], match["part"]), page)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What MkDocs calls with each page."""
    return filled(markdown)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of bare numbers, with their unit or without, are right-aligned."""
    heads, *body = rows
    numeric = [all(NUMBER.fullmatch(row[column]) for row in body) for column in range(len(heads))]
    rule = ["---:" if right else "---" for right in numeric]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (heads, *body)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (escaped[0], rule, *escaped[1:]))


def _part(figures: str, part: str) -> str:
    if not (FIGURES / f"{figures}.py").exists():
        raise KeyError(f"{{{{ {figures}.{part} }}}}: there is no docs/figures/{figures}.py")
    sys.path.insert(0, str(FIGURES))
    try:
        parts = importlib.import_module(figures).PARTS
    finally:
        sys.path.remove(str(FIGURES))
    if part not in parts:
        raise KeyError(f"{{{{ {figures}.{part} }}}}: docs/figures/{figures}.py makes {', '.join(parts)}")
    found = parts[part]()
    return found if isinstance(found, str) else table(found)
