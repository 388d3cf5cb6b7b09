"""What an object prints as: tables and lines as one text, the same in a terminal, a file and a notebook."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def printed(*parts: Table | str, width: int = 100) -> str:
    """The parts under each other, of so many columns; square brackets are no markup."""
    from rich.console import Console  # noqa: PLC0415 - only where something is printed

    text = io.StringIO()
    # In a notebook a console of rich shows what it is given beside the cell, and leaves its file empty.
    console = Console(file=text, width=width, force_jupyter=False, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part, highlight=False, markup=False)
    return text.getvalue().rstrip()
