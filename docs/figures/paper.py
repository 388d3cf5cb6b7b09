"""The line under each picture of docs/paper.md, as `bilevel paper --output docs/paper` printed it."""

import json
from collections.abc import Callable
from pathlib import Path

PAPER = Path(__file__).resolve().parents[1] / "paper"


def seen(file: Path) -> Callable[[], str]:
    """What an experiment's file says that its picture shows, as a quotation."""
    return lambda: "> " + json.loads(file.read_text(encoding="utf-8"))["summary"].replace("|", r"\|")


PARTS = {file.stem.replace("-", "_"): seen(file) for file in sorted(PAPER.glob("*.json"))}
