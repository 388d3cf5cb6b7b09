"""A module whose parameters are spread over processes, without what spread them: its own forward alone."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

from torch import nn


def without_hooks(module: nn.Module) -> nn.Module:
    """The same module without the hooks of `fully_shard` and `parallelize_module`; it shares the tensors.

    These gather and free parameters, and have no second derivative. The module that came stays as it is.
    """
    return _without(module, {})


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _without(module: nn.Module, seen: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in seen:
        return seen[module]
    # fully_shard gives a module a class of its own, of FSDPModule and of the one that it had.
    kind: type[Any] = type(module).__bases__[1] if is_fully_sharded(module) else type(module)
    made: nn.Module = object.__new__(kind)
    seen[module] = made
    own = dict(vars(module))
    for name, entry in own.items():
        if name.endswith("_hooks") and isinstance(entry, dict):
            own[name] = type(entry)((key, hook) for key, hook in entry.items() if not _spreads(hook))
        elif name in ("_parameters", "_buffers", "_modules"):
            own[name] = OrderedDict(entry) if isinstance(entry, OrderedDict) else dict(entry)
    vars(made).update(own)
    for name, part in made._modules.items():
        made._modules[name] = None if part is None else _without(part, seen)
    return made


def _spreads(hook: Any) -> bool:
    function = getattr(hook, "__func__", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")
