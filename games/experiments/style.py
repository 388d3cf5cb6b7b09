"""How the figures look: matplotlib's objects without pyplot, colours for the colour-blind, legible at half size."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.files import write_whole
from games.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow, which is lost on white.
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
LINES = ("-", "--", "-.", ":", "-", "--", "-.")
SMALL, LARGE, DPI = 13, 15, 150


def empty_figure(width: float = 8.0, height: float = 5.5) -> Figure:
    """An empty figure of `width` by `height` inches; raises `MissingExtraError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(f"Figures need matplotlib ({error}). pip install 'bilevel[data]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = DPI, **options: Any) -> None:
    """Write a figure whole or not at all, in the format that the path's suffix names."""
    target, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=target.suffix.removeprefix(".") or "png", dpi=dpi, **options)
    write_whole(target, buffer.getvalue())


def label_axes(axes: Axes, *, x: str, y: str, title: str = "", grid: bool = True) -> None:
    """Axis names with their units, sizes to be read at half size, no box."""
    axes.set_xlabel(x, fontsize=LARGE)
    axes.set_ylabel(y, fontsize=LARGE)
    if title:
        axes.set_title(title, fontsize=LARGE)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(color="0.88", linewidth=0.8)
        axes.set_axisbelow(True)
