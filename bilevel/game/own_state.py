"""What data keep in themselves from pass to pass: generators of their own, counters, an order, a place.

A sampler that shuffles with its own NumPy generator, or counts its passes, makes a pass that depends on those before
it. Here every generator begins a pass from the pass's seed, and the rest is part of the position in the data.
"""

from __future__ import annotations

import copy
import random
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

Kept = dict[str, dict[str, Any]]
"""What differs from the beginning, as plain data: by the object's number and the attribute's name."""

_STASH: Final = "_bilevel_own_state"
_DEEP, _MANY = 4, 1000  # how far it is looked for generators
_COPIED, _KEPT = 64 * 2**20, 2**20  # bytes of an array that is copied for each reader, and that goes into a position
_LONG = 100_000  # entries of a list that goes into a position
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
_CLOSED = (int, float, complex, str, bytes, type(None), Tensor, np.ndarray, nn.Module, type, ModuleType, *_FUNCTIONS)


class Generating(Protocol):
    """A generator of random numbers, of whatever library."""

    def get_state(self) -> Any:
        """Where it is."""

    def set_state(self, state: Any, /) -> Any:
        """Put it there."""

    def manual_seed(self, seed: int, /) -> Any:
        """Begin anew."""


class _Python:
    def __init__(self, generator: random.Random) -> None:
        self.get_state, self.set_state, self.manual_seed = generator.getstate, generator.setstate, generator.seed


class _NumPy:
    def __init__(self, generator: np.random.Generator | np.random.RandomState) -> None:
        old = isinstance(generator, np.random.RandomState)
        self._bits: Any = generator._bit_generator if old else generator.bit_generator  # type: ignore[union-attr]

    def get_state(self) -> Any:
        return copy.deepcopy(self._bits.state)

    def set_state(self, state: Any, /) -> None:
        self._bits.state = state

    def manual_seed(self, seed: int, /) -> None:
        self._bits.state = type(self._bits)(seed).state


def generators_in(parts: Iterable[object]) -> list[Generating]:
    """Every generator that data hold, in the order in which they are found; each once."""
    found: dict[int, Generating] = {}
    for value in _within(parts):
        if isinstance(value, torch.Generator):
            found[id(value)] = value
        elif isinstance(value, random.Random):
            found[id(value)] = _Python(value)
        elif isinstance(value, np.random.Generator | np.random.RandomState):
            found[id(value)] = _NumPy(value)
    return list(found.values())


def _within(parts: Iterable[object]) -> Iterator[object]:
    """Data, and what they hold, down to some depth; no tensors, modules or functions are looked into."""
    seen: dict[int, object] = {}
    todo = [(part, 0) for part in parts]
    while todo and len(seen) < _MANY:
        value, depth = todo.pop(0)
        if id(value) not in seen:
            seen[id(value)] = value
            yield value
            if depth < _DEEP:
                todo += [(held, depth + 1) for held in _held(value) if not isinstance(held, _CLOSED)]


def _held(value: object) -> Iterable[object]:
    if isinstance(value, DataLoader):  # and not its iterator
        return [value.dataset, value.sampler, value.batch_sampler, value.generator]
    if isinstance(value, Mapping):
        return list(value.values())[:_MANY] if type(value) is dict else []
    if isinstance(value, list | tuple):
        return value[:_MANY]
    return list(_attributes(value).values())


def _attributes(value: object) -> dict[str, Any]:
    """What an object holds; nothing where it has no attributes of its own, as a generator has none."""
    try:
        return vars(value)
    except TypeError:
        return {}


@runtime_checkable
class _Counting(Protocol):
    """Who is told the number of each pass, by which it goes."""

    def set_epoch(self, epoch: int, /) -> object: ...


@runtime_checkable
class _Resuming(Protocol):
    """Who says that it has a state."""

    def load_state_dict(self, state: Any, /) -> object: ...


def keepers(source: object, parts: Iterable[object]) -> list[Any]:
    """Those among the parts of data that may keep something in themselves, in the order in which they are found.

    They are users' samplers, iterable data sets that are read in this process, and iterables of a user's own.
    """
    parts = list(parts)
    direct = {id(part) for part in parts if not isinstance(part, (DataLoader, Dataset, *_FUNCTIONS))}
    here = not isinstance(source, DataLoader) or source.num_workers == 0
    found = []
    for value in _within(parts):
        own = id(value) in direct or isinstance(value, Sampler) or (here and isinstance(value, IterableDataset))
        library = type(value).__module__.startswith(("torch.", "torchdata."))
        if own and not library and _has_attributes(value):
            found.append(value)
    return found


def _has_attributes(value: object) -> bool:
    try:
        vars(value)
    except TypeError:
        return False
    return True


class _Stash:
    """Beside an object's attributes: what they were before anybody read it, and whose reading they are of now."""

    def __init__(self, first: dict[str, Any]) -> None:
        self.first = first
        self.reader: weakref.ref[OwnState] | None = None
        self.left: dict[str, Any] | None = None
        """The attributes after the last reading; None before the first."""

    def __getstate__(self) -> dict[str, Any]:
        return {"first": self.first, "reader": None, "left": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stash:
        return _Stash(copy.deepcopy(self.first, memo))


class OwnState:
    """One reader's view of what some objects keep in themselves: it goes on where it was, whoever else has read since.

    Each object has the state of who read it last. An attribute that its user sets meanwhile stays as it was set.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._objects = list(objects)
        self._mine: list[dict[str, Any]] = [{} for _ in self._objects]
        for held in self._objects:
            if _STASH not in vars(held):
                vars(held)[_STASH] = _Stash(_copied(vars(held)))

    def enter(self) -> None:
        """Put this reader's state into the objects."""
        for held, mine in zip(self._objects, self._mine, strict=True):
            if self._take(held):
                _install(held, mine)

    def leave(self) -> None:
        """Note what this reader leaves behind."""
        for held in self._objects:
            vars(held)[_STASH].left = dict(vars(held))

    def begin(self, kept: Kept) -> None:
        """Begin at the first pass, or at the one whose beginning was `kept`; before anything is read."""
        for number, held in enumerate(self._objects):
            stash: _Stash = vars(held)[_STASH]
            if stash.left is not None:
                left = stash.left
                theirs = {name: value for name, value in vars(held).items() if left.get(name, _ABSENT) is not value}
                stash.first = stash.first | _copied(theirs)  # a user has set them since
            self._take(held)
            changed = {name: _opened(value) for name, value in kept.get(str(number), {}).items()}
            if stash.left is not None or changed:
                _install(held, _copied(stash.first) | changed | {_STASH: stash})

    def kept(self) -> Kept:
        """What is not as it was before anybody read, as plain data; nothing of those who are told the pass."""
        found: Kept = {}
        for number, held in enumerate(self._objects):
            if isinstance(held, _Counting) and not isinstance(held, _Resuming):
                continue
            first = vars(held)[_STASH].first
            for name, value in vars(held).items():
                closed = None if name == _STASH else _closed(value)
                if closed is not None and closed != _closed(first.get(name, _ABSENT)):
                    found.setdefault(str(number), {})[name] = closed
        return found

    def _take(self, held: Any) -> bool:
        """Make an object this reader's, and give who had it his state; whether it was somebody else's."""
        stash: _Stash = vars(held)[_STASH]
        other = None if stash.reader is None else stash.reader()
        if other is self:
            return False
        if other is not None:
            place = next(i for i, one in enumerate(other._objects) if one is held)
            other._mine[place] = dict(vars(held))
        stash.reader = weakref.ref(self)
        return True


_ABSENT = object()


def _install(held: object, state: Mapping[str, Any]) -> None:
    present = dict(state)
    vars(held).clear()
    vars(held).update(present)


def _copied(value: Any) -> Any:
    """A copy of what may be changed in place; generators and all other objects are shared."""
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items() if key != _STASH}
    if type(value) in (list, tuple, set):
        return type(value)(_copied(part) for part in value)
    if type(value) is deque:
        return deque((_copied(part) for part in value), value.maxlen)
    if isinstance(value, np.ndarray) and value.nbytes <= _COPIED and value.dtype != object:
        return value.copy()
    if type(value) is Tensor and value.nbytes <= _COPIED:
        return value.clone()
    return value


def _closed(value: Any) -> Any:
    """A value as a checkpoint can hold it; None where it cannot. Two are equal where the values are."""
    if type(value) in (bool, int, float, str, type(None)):
        return [type(value).__name__, value]
    if type(value) in (list, tuple, set, deque, dict) and len(value) <= _LONG:
        entries = [list(pair) for pair in value.items()] if type(value) is dict else list(value)
        parts = [_closed(part) for part in (sorted(entries, key=repr) if type(value) is set else entries)]
        return None if any(part is None for part in parts) else [type(value).__name__, parts]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.nbytes <= _KEPT:
        return ["array", str(value.dtype), list(value.shape), value.tobytes().decode("latin-1")]
    if type(value) is Tensor and value.device.type == "cpu" and value.dtype in _NUMBERS and value.nbytes <= _KEPT:
        return ["tensor", *_closed(value.detach().numpy())[1:]]
    return None


_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float32)


def _opened(closed: Any) -> Any:
    kind, *parts = closed
    if kind == "dict":
        return {_opened(key): _opened(value) for key, value in (pair[1] for pair in parts[0])}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_opened(part) for part in parts[0])
    if kind in ("array", "tensor"):
        dtype, shape, data = parts
        found = np.frombuffer(data.encode("latin-1"), dtype=dtype).reshape(shape).copy()
        return found if kind == "array" else torch.from_numpy(found)
    return parts[0]


_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
