"""What an object is, as plain data: the same from one process to the next, and compared entry by entry.

Numbers, strings and None stand for themselves, tensors for their form and a digest, dataclasses for their fields. A
torch.optim factory is known by what it builds, so that a lambda and a partial that build the same are the same. Any
other function is known by its name, its code, and what it captured: plain numbers, strings, tensors, modules,
functions of its own module.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bilevel.inner import InnerSolver
from bilevel.inner.torch_optim import OptimizerFactory, SchedulerFactory, build
from bilevel.randomness import random_kept
from bilevel.solving.functions import LANGUAGE, attributes, captured, code_of
from bilevel.tree import Variables

Description = Any
"""None, numbers, strings, and lists and string-keyed dicts of them."""

_PLAIN = (bool, int, float, str, type(None))
_SHOWN_ENTRIES = 4  # a tensor of so few entries is told by them, and not by a digest
_HASHED_ENTRIES = 2**24  # of a larger tensor, about so many evenly spaced entries are hashed
_OF_OPTIMIZER = ("optimizer", "base_lrs", "_last_lr")  # what a scheduler holds of its optimiser, which is told there


class Describer:
    """Describes what a run is made of.

    Args:
        parameters: leaves in the form of those that optimisers will step; their numbers are not read.
        players: everybody's variables, for factories that take some.
    """

    def __init__(self, parameters: Sequence[Tensor] = (), players: Mapping[str, Variables] | None = None) -> None:
        self._parameters, self._players = parameters, players
        self._open: set[int] = set()

    def describe(self, value: Any) -> Description:
        """A configuration; everything in it counts."""
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            return value
        if isinstance(value, Tensor | np.ndarray):
            return _numbers(value)
        if id(value) in self._open:  # it holds itself
            return f"this {type(value).__name__}"
        self._open.add(id(value))
        try:
            return self._described(value)
        finally:
            self._open.remove(id(value))

    def _described(self, value: Any) -> Description:
        if isinstance(value, nn.Module):
            layers = {path or "class": f"{_name(type(m))}({m.extra_repr()})" for path, m in value.named_modules()}
            return {path: _without_addresses(told) for path, told in layers.items()}
        if isinstance(value, LRScheduler):
            own = {key: entry for key, entry in vars(value).items() if key not in _OF_OPTIMIZER}
            return {"class": _name(type(value))} | {key: self.describe(entry) for key, entry in own.items()}
        if isinstance(value, Mapping):
            return {str(key): self.describe(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.describe(entry) for entry in value]
        if isinstance(value, set | frozenset):
            return sorted(_without_addresses(repr(entry)) for entry in value)
        if is_dataclass(value) and not isinstance(value, type):
            return self._dataclass(value)
        if callable(value):
            return self._function(value)
        return _without_addresses(repr(value))

    # What optimises ---------------------------------------------------------------------------------------------------

    def optimizer(self, factory: OptimizerFactory) -> Description:
        """A torch.optim factory, by the class that it builds and the hyperparameters of every group."""
        try:
            built = self._build(factory)
        except Exception:  # it wants other parameters than these
            return self.describe(factory)
        return {"class": _name(type(built)), **self._groups(built)}

    def scheduler(self, factory: SchedulerFactory, optimizer: OptimizerFactory) -> Description:
        """A scheduler's factory, by the class and the state of what it builds over such an optimiser."""
        try:
            over = self._build(optimizer)
            before = self._groups(over)
            with random_kept():
                built = factory(over)
        except Exception:
            return self.describe(factory)
        # Some schedulers keep what they were told in the optimiser's groups.
        added = {key: entry for key, entry in self._groups(over).items() if key not in before and key != "initial_lr"}
        return {**self.describe(built), **added}

    def _build(self, factory: OptimizerFactory) -> torch.optim.Optimizer:
        # Of the right shapes, dtype and device, and no memory.
        like = [leaf.detach().new_zeros(()).expand(leaf.shape).requires_grad_() for leaf in self._parameters]
        with random_kept():
            return build(factory, like, self._players)

    def _groups(self, optimizer: torch.optim.Optimizer) -> dict[str, Description]:
        """The groups' hyperparameters, which hold the optimiser's defaults; of a single group directly."""
        groups = []
        for group in optimizer.param_groups:
            settings = {key: self.describe(entry) for key, entry in group.items() if key != "params"}
            groups.append(settings | {"params": len(group["params"])})
        return groups[0] if len(groups) == 1 else {"groups": groups}

    # What is configured -----------------------------------------------------------------------------------------------

    def _dataclass(self, value: Any) -> Description:
        """The fields that its repr shows; what does not change the numbers is declared `repr=False`."""
        try:
            declared = get_type_hints(type(value))
        except NameError:  # a name that only a type checker imports
            declared = {}
        told: dict[str, Description] = {"class": _name(type(value))}
        optimizer: OptimizerFactory | None = None
        for field in fields(value):
            entry, hint = getattr(value, field.name), declared.get(field.name)
            if not field.repr:
                continue
            if _declares(hint, OptimizerFactory) and callable(entry) and not isinstance(entry, InnerSolver):
                optimizer = entry
                told[field.name] = self.optimizer(entry)
            elif _declares(hint, SchedulerFactory) and callable(entry) and optimizer is not None:
                told[field.name] = self.scheduler(entry, optimizer)
            else:
                told[field.name] = self.describe(entry)
        return told

    def _function(self, function: Callable[..., Any]) -> Description:
        if isinstance(function, partial):
            held = {"arguments": self.describe(function.args), "keywords": self.describe(function.keywords)}
            return {"function": self.describe(function.func), **{key: part for key, part in held.items() if part}}
        if isinstance(function, type):
            return _name(function)
        if isinstance(function, FunctionType):
            held = self._captured(captured(function), function)
            return {"function": _name(function), "code": code_of(function), **held}
        method: Any = function if inspect.ismethod(function) else getattr(function, "__call__")  # noqa: B004, B009
        body = getattr(method, "__func__", None)
        if not isinstance(body, FunctionType):  # written in C, or a wrapper that says what it wraps
            inner = inspect.unwrap(function)
            return _without_addresses(repr(function)) if inner is function else self.describe(inner)
        owner = method.__self__
        settings = {} if isinstance(owner, type) else getattr(owner, "__dict__", {})
        kept = {key: entry for key, entry in settings.items() if key not in attributes(body)}
        return {"class": _name(type(owner)), "method": self.describe(body), **self._captured(kept, body)}

    def _captured(self, values: Mapping[str, Any], function: FunctionType) -> dict[str, Description]:
        """Of what a function captured, that which is a setting; a list or a dict may as well be a record of calls."""
        settings = {name: value for name, value in values.items() if _is_setting(value, function.__module__)}
        return {"captured": self.describe(settings)} if settings else {}


def differences(saved: Description, present: Description, path: str = "") -> list[tuple[str, str, str]]:
    """Where two descriptions differ: the path, and in words what is saved and what is present.

    Of two classes, or two functions, only that they are two. Code of another Python cannot be compared.
    """
    if isinstance(saved, dict) and isinstance(present, dict):
        for kind in ("class", "function"):
            if kind in saved and kind in present and saved[kind] != present[kind] and isinstance(saved[kind], str):
                return [(path, _shown(saved[kind]), _shown(present[kind]))]
        found = []
        for key in dict.fromkeys((*saved, *present)):
            inner = f"{path}.{key}" if path else key
            found += differences(saved.get(key, _NOTHING), present.get(key, _NOTHING), inner)
        return found
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        pairs = enumerate(zip(saved, present, strict=True))
        return [found for index, (one, other) in pairs for found in differences(one, other, f"{path}[{index}]")]
    if saved == present or repr(saved) == repr(present):  # NaN is NaN
        return []
    codes = isinstance(saved, str) and isinstance(present, str) and saved.startswith("Python ")
    if codes and path.endswith(".code"):
        return [(path, saved, present)] if saved.startswith(f"{LANGUAGE} ") else []
    return [(path, _shown(saved), _shown(present))]


_NOTHING = "nothing"


def _shown(told: Description) -> str:
    if isinstance(told, dict):
        return str(told.get("class", told.get("function", "other settings")))
    text = told if isinstance(told, str) else repr(told)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_setting(value: Any, module: str) -> bool:
    if isinstance(value, tuple):
        return all(_is_setting(entry, module) for entry in value)
    if isinstance(value, FunctionType):
        return value.__module__ == module
    if isinstance(value, type):
        return False
    return isinstance(value, (*_PLAIN, Tensor, np.ndarray, nn.Module, partial)) or is_dataclass(value)


def _declares(hint: Any, wanted: Any) -> bool:
    return hint == wanted or wanted in get_args(hint)


def _numbers(value: Tensor | np.ndarray[Any, Any]) -> str:
    tensor = (torch.as_tensor(value) if isinstance(value, Tensor) else torch.from_numpy(np.array(value))).detach()
    form = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.numel() <= _SHOWN_ENTRIES:
        return f"{tensor.tolist()} {form}"
    flat = tensor.reshape(-1)[:: -(-tensor.numel() // _HASHED_ENTRIES)]
    data = flat.contiguous().cpu().view(torch.uint8).numpy().data
    return f"{form} {hashlib.blake2b(data, digest_size=8).hexdigest()}"


def _name(thing: Any) -> str:
    return str(thing.__qualname__)


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
