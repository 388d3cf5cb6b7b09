"""What a measured run is known by: its configuration, its game and the code, the same from process to process."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import fields, is_dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bilevel.comparison import measure as measuring
from bilevel.comparison import memory
from bilevel.comparison import reference as referring
from bilevel.comparison.measure import Setting, in_own_randomness
from bilevel.comparison.rows import plain
from bilevel.game import Game
from bilevel.responses import Response
from bilevel.solving.description import Describer
from bilevel.tree import leaves


def identity(setting: Setting) -> dict[str, Any]:
    """The game by what it holds, and the code that measures."""
    game = setting.game
    start = {name: game.initial(name) for name in game.names}
    numbers = [start, {name: setting.held(name) for name in game.names}]
    with torch.no_grad():
        losses = in_own_randomness(
            setting.seed,
            game.device,
            lambda: {name: float(game.loss(name, start, setting.held(name))) for name in game.names},
        )
    describer = Describer()
    objectives = {name: describer.describe(player.objective) for name, player in game.players.items()}
    tensors = [leaf for leaf in leaves(numbers) if isinstance(leaf, torch.Tensor)]
    return {
        "game": digest(
            *(f"{t.dtype} {tuple(t.shape)}".encode() + t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)
        ),
        "known": "" if setting.known is None else repr(setting.known),
        "losses": {name: repr(loss) for name, loss in losses.items()},
        "objectives": plain(objectives),
        "follower": setting.follower,
        "seed": setting.seed,
        "code": digest(
            *(Path(str(file)).read_bytes() for file in (measuring.__file__, memory.__file__, referring.__file__))
        ),
        "versions": versions(),
    }


def configuration(thing: Any, game: Game, player: str) -> Any:
    """A response or an optimiser of a player as plain data, to be compared: all that a function captured included."""
    over = Describer(leaves(game.initial(player)), {name: game.initial(name) for name in game.names})
    is_factory = callable(thing) and not isinstance(thing, Response)
    return plain(over.optimizer(thing) if is_factory else over.describe(thing))


def described(thing: Any) -> str:
    """A configuration as one line for a reader."""
    if isinstance(thing, partial):
        parts = [*thing.args, *(f"{key}={described(value)}" for key, value in thing.keywords.items())]
        return f"{described(thing.func)}({', '.join(map(str, parts))})"
    if is_dataclass(thing) and not isinstance(thing, type):
        shown = [f"{f.name}={described(getattr(thing, f.name))}" for f in fields(thing) if f.repr]
        return f"{type(thing).__name__}({', '.join(shown)})"
    if isinstance(thing, type):
        return thing.__name__
    code = getattr(thing, "__code__", None)
    if code is not None:
        constants = [c for c in code.co_consts if isinstance(c, int | float | str | bool | None)]
        return f"{thing.__qualname__}#{digest(code.co_code, repr((constants, code.co_names)).encode())}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def digest(*parts: bytes) -> str:
    """Sixteen hexadecimal digits of the bytes and where they are parted."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of what can change a number."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("bilevel", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "not installed"
    return found


def file_name(name: str) -> str:
    """A name as a file's: what is not a letter or digit becomes _, and a digest keeps two such names apart."""
    kept = "".join(c if c.isalnum() or c in "-=" else "_" for c in name)
    return kept if kept == name else f"{kept}.{digest(name.encode())[:6]}"
