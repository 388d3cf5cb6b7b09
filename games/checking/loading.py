"""A game, and how it is solved, from FILE:NAME."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bilevel import Game, Response
from games.experiments.console import UsageError


@dataclass(frozen=True)
class Loaded:
    """What FILE:NAME holds.

    Attributes:
        game: The game.
        options: What `bilevel.solve` is to be called with besides; {} where the file does not say.
        module: The file, run.
    """

    game: Game
    options: Mapping[str, Any] = field(default_factory=dict)
    module: ModuleType = field(default_factory=lambda: ModuleType("none"))

    def responses(self) -> dict[str, Response]:
        """The responses among the options, by the name of their player."""
        return {n: v for n, v in self.options.items() if n in self.game.names and isinstance(v, Response)}


def loaded(target: str) -> Loaded:
    """Run the file, and take the game out of it.

    NAME is a `Game`, or a function that takes no argument and returns one, or returns a pair of a game and a dict: the
    options that `bilevel.solve(game, **options)` takes.

    Raises:
        UsageError: For a target that is not FILE:NAME, a file that is not there or raises, a name that it has not, or
            that stands for something else.
    """
    file, _, name = target.rpartition(":")
    if not file or not name.isidentifier():
        raise UsageError(f"{target}: expected FILE:NAME, such as mine.py:game.")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{target}: there is no file {file}.")
    module = _run(path)
    if not hasattr(module, name):
        found = vars(module).items()
        games = [key for key, value in found if isinstance(value, Game)]
        functions = [key for key, value in found if inspect.isfunction(value) and _may_return_a_game(value, module)]
        told = {"its games are": games, "its functions without arguments": functions}
        said = "".join(f"; {what} {', '.join(known)}" for what, known in told.items() if known)
        raise UsageError(f"{target}: {file} has no {name}{said}.")
    made = getattr(module, name)
    if inspect.isfunction(made):
        needed = [p.name for p in inspect.signature(made).parameters.values() if p.default is p.empty]
        if needed:
            raise UsageError(f"{target}: the function needs {', '.join(needed)}; expected one without arguments.")
        with _told(path):
            made = made()
    game, options = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
    if not isinstance(game, Game) or not isinstance(options, Mapping):
        raise UsageError(
            f"{target}: is a {type(made).__name__}; expected a bilevel.Game, a function that returns one, or one that "
            "returns a pair (game, options of bilevel.solve)."
        )
    return Loaded(game, dict(options), module)


def _may_return_a_game(function: Callable[..., object], module: ModuleType) -> bool:
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    return function.__module__ == module.__name__ and not needed


def response_for(found: Loaded, name: str | None, follower: str | None) -> tuple[Response, str | None]:
    """The response to be judged and, where the options say it, whose it is.

    It is the file's response of that name; else the one among the options; else the only response in the file.

    Raises:
        UsageError: Where there is none, or more than one.
    """
    if name is not None:
        chosen = getattr(found.module, name, None)
        if not isinstance(chosen, Response):
            raise UsageError(f"--response {name}: expected the name of a bilevel.Response in the file.")
        return chosen, follower
    own = found.responses()
    if follower is not None and follower in own:
        return own[follower], follower
    if len(own) == 1 and follower is None:
        ((follower, response),) = own.items()
        return response, follower
    inside = {key: value for key, value in vars(found.module).items() if isinstance(value, Response)}
    if len(inside) == 1 and not own:
        return next(iter(inside.values())), follower
    names = ", ".join(own or inside) or "none"
    way = "--follower" if own else "--response"
    raise UsageError(f"Which response? The file has {names}. Define one, or say {way} NAME.")


def _run(path: Path) -> ModuleType:
    """The file as a module; it may import what lies beside it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: expected a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look for the module of their annotations there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _told(path):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of the user's own code in one line, with the last line of the file that was reached."""
    try:
        yield
    except Exception as error:
        trace, line = error.__traceback__, None
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(path.resolve()) or trace.tb_frame.f_code.co_filename == str(
                path
            ):
                line = trace.tb_lineno
            trace = trace.tb_next
        where = f"{path}:{line}" if line else str(path)
        raise UsageError(f"{where}: {type(error).__name__}: {error}") from error
