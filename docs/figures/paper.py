"""Writes under each picture of docs/paper.md the line that `bilevel paper --output docs/paper` printed for it."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
PLACE = re.compile(r"<!-- see (?P<name>[\w-]+) -->\n(?:> .*\n<!-- /see -->\n)?")


def told(page: str) -> str:
    """The page with each line as its JSON has it."""

    def line(match: re.Match[str]) -> str:
        see = json.loads((DOCS / "paper" / f"{match['name']}.json").read_text())["summary"].replace("|", r"\|")
        return f"<!-- see {match['name']} -->\n> {see}\n<!-- /see -->\n"

    return PLACE.sub(line, page)


if __name__ == "__main__":
    path = DOCS / "paper.md"
    path.write_text(told(path.read_text()))
