"""Figures that stand by themselves: no window, no global state, and shown by a notebook whatever its backend is."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches on a clear ground; raises `ImportError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(f"Figures need matplotlib ({error}). pip install 'bilevel[data]'") from error

    class Drawn(Figure):
        """A figure that a notebook shows although nobody has imported pyplot there."""

        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png", dpi=100)
            return content.getvalue()

    figure = Drawn(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return cast("Figure", figure)
