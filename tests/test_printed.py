"""What objects print and draw is there in a notebook too."""

import pytest
import torch

import bilevel as bl
from bilevel._drawn import blank


@pytest.fixture
def notebook(monkeypatch):
    """As rich sees the world from a notebook's kernel."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)


@pytest.fixture(scope="module")
def solution():
    x = bl.Player(lambda y: (y - 3) ** 2, torch.tensor(0.0))
    y = bl.Player(lambda x, y: (y - 2 * x) ** 2, torch.tensor(0.0))
    return bl.solve(bl.Game(x=x, y=y), y=bl.Implicit(bl.ClosedForm(lambda x: 2 * x)), steps=2)


def test_a_table_is_in_its_text_and_the_same_there(solution, request):
    outside = str(solution)
    request.getfixturevalue("notebook")
    assert str(solution) == outside
    assert "loss at start" in outside


def test_no_object_of_the_library_prints_by_a_console_of_its_own():
    """Rich would show the table beside the cell and leave the text empty; `_printed` knows of it."""
    from pathlib import Path

    sources = Path(bl.__file__).parent.rglob("*.py")
    held = [
        path.name for path in sources if "Console(file=" in path.read_text() or "Console(record=" in path.read_text()
    ]
    assert held == ["_printed.py"]


def test_square_brackets_in_names_stay():
    from rich.table import Table

    from bilevel._printed import printed

    table = Table("name")
    table.add_row("weights[bold]")
    assert "weights[bold]" in printed(table, "[red] is no colour")
    assert "[red] is no colour" in printed(table, "[red] is no colour")


def test_a_figure_shows_itself():
    pytest.importorskip("matplotlib")
    assert blank(2.0, 1.0)._repr_png_().startswith(b"\x89PNG")
