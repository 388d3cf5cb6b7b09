"""A function by what can be compared of it: its code, and what it captured."""

from __future__ import annotations

import dis
import hashlib
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

LANGUAGE = f"Python {sys.version_info.major}.{sys.version_info.minor}"


def code_of(function: FunctionType) -> str:
    """The language that a function was compiled for, and a digest of its code: instructions, constants and names."""
    return f"{LANGUAGE} {_digest(function.__code__, function.__doc__)}"


def captured(function: FunctionType) -> dict[str, Any]:
    """What a function reads from outside: its closure, its defaults, and the globals of its module that it names.

    What it writes there itself is a count or a cache, and no setting.
    """
    code = function.__code__
    found: dict[str, Any] = {}
    for name in _names(code, "LOAD_GLOBAL") - _names(code, "STORE_GLOBAL"):
        if name in function.__globals__:
            found[name] = function.__globals__[name]
    counted = _names(code, "STORE_DEREF")
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            if name not in counted:
                found[name] = cell.cell_contents
        except ValueError:  # a cell that nobody has filled yet
            continue
    positional = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    found |= dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
    return dict(sorted((found | (function.__kwdefaults__ or {})).items()))


def attributes(function: FunctionType) -> dict[str, None]:
    """The attributes that a method writes, of itself or of others."""
    return dict.fromkeys(sorted(_names(function.__code__, "STORE_ATTR")))


def _digest(code: CodeType, doc: str | None = None) -> str:
    total = hashlib.blake2b(digest_size=8)
    constants = code.co_consts[1:] if doc is not None and code.co_consts[:1] == (doc,) else code.co_consts
    for part in (code.co_code, code.co_names, code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
        total.update(repr(part).encode())
    for constant in constants:
        if isinstance(constant, CodeType):
            total.update(_digest(constant).encode())
        elif isinstance(constant, frozenset):  # its order differs from process to process
            total.update(repr(sorted(map(repr, constant))).encode())
        else:
            total.update(repr(constant).encode())
    return total.hexdigest()


def _names(code: CodeType, operation: str) -> set[str]:
    """What the instructions of one kind name, in a function and in those that it defines."""
    return {
        str(step.argval) for part in _nested(code) for step in dis.get_instructions(part) if step.opname == operation
    }


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
