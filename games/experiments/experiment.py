"""What an experiment is: independent parts, a figure of their results, and one line that says what it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
"""What a part returns: what `as_json` can write, so that a figure can be drawn again from its file."""

Results = Mapping[str, Result]
"""Part's name -> its result."""


@final
@dataclass(frozen=True)
class Part:
    """One piece of work, done in a process of its own: `run(source, **settings)`.

    `run` is a function of a module, `settings` are what JSON can hold. `seconds` is its rough length on one core, from
    which the remaining time is estimated.
    """

    name: str
    run: Callable[..., Result]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 10.0


@final
@dataclass(frozen=True)
class Experiment:
    """One figure: its parts, in any order, then `draw(results)` and `summarize(results)` of what they returned.

    `summarize` returns one line: what the figure shows, with its numbers. `extra_figures` are drawn from the same
    results, and written as NAME-KEY.png.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    draw: Callable[[Results], Figure]
    summarize: Callable[[Results], str]
    extra_figures: Mapping[str, Callable[[Results], Figure]] = field(default_factory=dict)
