"""The page's table is the benchmark's file, and the words about it hold there."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_the_file(page_script):
    page = (ROOT / "docs/many-games.md").read_text(encoding="utf-8")
    assert page_script("many_games").told(page) == page, "run python docs/figures/many_games.py"
    found = json.loads((ROOT / "docs/many-games/batch.json").read_text(encoding="utf-8"))
    ratios = [row["ratio"] for row in found["results"] if row["games"] == 1000]
    # "50 to 300 times sooner", in the page, README and CHANGELOG.
    assert len(ratios) == 9
    assert min(ratios) >= 50
    assert max(ratios) <= 300
