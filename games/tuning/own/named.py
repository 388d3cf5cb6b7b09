"""Functions that an option names, `path.py:function`, and their failures in one line."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import bilevel
import games
from games.experiments.console import UsageError

_OTHERS = [Path(str(module.__file__)).parent for module in (torch, bilevel, games)] + [Path(traceback.__file__).parent]
"""Where code is that the user has not written: torch's, the library's, Python's own."""


def is_named(text: str) -> bool:
    """Whether an option's value has the form `path.py:function`."""
    return ".py:" in text


def function(text: str, option: str) -> Callable[..., Any]:
    """The function `path.py:function`. The file's folder is on the path while it is read, as for a script.

    Raises `UsageError` for another form, a missing file or function, and a file that does not run.
    """
    file, _, name = text.rpartition(":")
    if not is_named(text) or not name:
        raise UsageError(f"{option} {text}: expected path.py:function, such as net.py:build.")
    module = _module(Path(file), f"{option} {text}")
    found = getattr(module, name, None)
    if not callable(found):
        own = {n: value for n, value in vars(module).items() if callable(value) and not n.startswith("_")}
        functions = [n for n, value in own.items() if getattr(value, "__module__", None) == module.__name__]
        what = "no function" if found is None else f"a {type(found).__name__}, and no function,"
        raise UsageError(f"{option} {text}: {file} has {what} {name!r}; it has {', '.join(functions) or 'none'}.")
    called: Callable[..., Any] = found
    return called


def files(*options: str | None) -> dict[str, Path]:
    """The files that options name as `path.py:function`, and what these have imported from beside or below them."""
    found: dict[str, Path] = {}
    for text in options:
        if text is None or not is_named(text):
            continue
        whole = Path(text.rpartition(":")[0]).resolve()
        found[whole.name] = whole
        for module in list(sys.modules.values()):
            path = Path(getattr(module, "__file__", None) or "")
            if path.is_relative_to(whole.parent) and path.is_file() and _is_users(str(path)):
                found[str(path.relative_to(whole.parent))] = path
    return dict(sorted(found.items()))


@contextmanager
def sent_whole(*options: str | None) -> Iterator[None]:
    """Meanwhile what `files` names is pickled with its code: other machines need none of these files."""
    import cloudpickle

    paths = {str(path) for path in files(*options).values()}
    modules = [module for module in list(sys.modules.values()) if str(getattr(module, "__file__", "")) in paths]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def called(call: Callable[..., Any], text: str, option: str) -> Any:
    """What a user's function returns; raises `UsageError` for its exceptions, with the line where they arose."""
    try:
        return call()
    except Exception as error:
        raise UsageError(f"{option} {text} failed: {told(error)}") from error


def told(error: BaseException) -> str:
    """An exception in one line, with its last place in the user's own code."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    what = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return f"{what} ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else what


def _is_users(filename: str) -> bool:
    path = Path(filename)
    installed = "site-packages" in path.parts or any(path.is_relative_to(folder) for folder in _OTHERS)
    return not filename.startswith("<") and not installed


def _module(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{what}: there is no file {path}.")
    whole = path.resolve()
    # Under its own name, by which a loader's workers find its classes.
    known = sys.modules.get(whole.stem)
    if known is not None and getattr(known, "__file__", None) == str(whole):
        return known
    name = whole.stem if known is None else f"{whole.stem}_of_the_command"
    spec = importlib.util.spec_from_file_location(name, whole)
    if spec is None or spec.loader is None:
        raise UsageError(f"{what}: {path} is no file of Python.")
    module = importlib.util.module_from_spec(spec)
    if str(whole.parent) not in sys.path:
        sys.path.insert(0, str(whole.parent))  # it imports what lies beside it, now and when it is called
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{what}: {path} does not run: {told(error)}") from error
    return module
