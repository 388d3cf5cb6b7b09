"""Five sources of text that every installation has, two of which are noise: their characters are shuffled."""

from __future__ import annotations

import math
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import Tensor

from games.errors import DataError

PRINTABLE = "\n" + "".join(chr(code) for code in range(32, 127))
"""The alphabet; any other character is read as a space."""
_CODES = {character: index for index, character in enumerate(PRINTABLE)}
_LICENSED = ("torch", "numpy", "scipy")
_STRETCH = 1000


@dataclass(frozen=True, eq=False)
class Source:
    """A text as codes of characters, `[n]` each: what is trained on, and what is held out.

    Attributes:
        name: What it is.
        train: For the model.
        held_out: For the mixture.
        test: For the last word.
        noise: Whether its characters were shuffled, so that only their frequencies are left.
    """

    name: str
    train: Tensor
    held_out: Tensor
    test: Tensor
    noise: bool = False


def sources(characters: int = 200_000, *, seed: int = 0) -> list[Source]:
    """Python's own modules, its documentation, licences; and the first two shuffled. Of each so many characters.

    Raises `DataError` where an installation has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for name, read in _TEXTS.items():
        codes = read()
        if len(codes) < characters:
            raise DataError(f"The source {name!r} has {len(codes):,} characters here; asked for were {characters:,}.")
        made.append(_parted(name, codes[:characters]))
    for clean in made[:2]:
        whole = torch.cat([clean.train, clean.held_out, clean.test])
        order = torch.randperm(len(whole), generator=generator)
        made.append(_parted(f"{clean.name}, shuffled", whole[order], noise=True))
    return made


def encoded(text: str) -> Tensor:
    """Codes of its characters `[n]`, with runs of one character, such as rules and tables have, cut to eight."""
    kept: list[int] = []
    run = 0
    for character in text:
        code = _CODES.get(character, _CODES[" "])
        run = run + 1 if kept and kept[-1] == code else 1
        if run <= 8:
            kept.append(code)
    return torch.tensor(kept)


def decoded(codes: Tensor) -> str:
    """The text that codes `[n]` stand for."""
    return "".join(PRINTABLE[code] for code in codes.tolist())


def fewest_characters(length: int) -> int:
    """Of a source, such that each of its parts has a piece of `length + 1`: one stretch in ten is held out."""
    return 10 * _STRETCH * math.ceil((length + 1) / _STRETCH)


def windows(codes: Tensor, count: int, length: int) -> Tensor:
    """Pieces `[count, length + 1]` from random places, by PyTorch's global random numbers."""
    starts = torch.randint(len(codes) - length, (count,))
    return codes[starts[:, None] + torch.arange(length + 1)]


def drawn(draw: Callable[[], Tensor], *, batches: int = 50) -> Callable[[], Iterator[Tensor]]:
    """The data of a player: passes of so many drawn batches."""
    return lambda: (draw() for _ in range(batches))


def _parted(name: str, codes: Tensor, *, noise: bool = False) -> Source:
    # Held out are stretches all over the text: its end is on other subjects than its start.
    stretches = codes[: len(codes) // _STRETCH * _STRETCH].reshape(-1, _STRETCH)
    tenth = torch.arange(len(stretches)) % 10
    train, held_out, test = (stretches[which].reshape(-1) for which in (tenth < 8, tenth == 8, tenth == 9))
    return Source(name, train, held_out, test, noise)


@cache
def _code() -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path for path in folder.glob("*.py") if not path.name.startswith(("_", "this")))
    # From all over the alphabet: modules that begin alike are about the same.
    return encoded("\n".join(path.read_text(encoding="utf-8", errors="replace") for path in found[::5]))


@cache
def _documentation() -> Tensor:
    return encoded("\n".join(pydoc_data.topics.topics.values()))


@cache
def _licences() -> Tensor:
    texts = []
    for package in _LICENSED:
        try:
            found = files(package) or []
        except PackageNotFoundError:
            continue
        named = sorted((path for path in found if "licen" in path.name.lower()), key=str)
        texts += [Path(str(path.locate())).read_text(encoding="utf-8", errors="replace") for path in named]
    return encoded("\n".join(dict.fromkeys(texts)))


_TEXTS: dict[str, Callable[[], Tensor]] = {"code": _code, "documentation": _documentation, "licences": _licences}
