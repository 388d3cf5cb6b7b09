"""Hooks on gradients inside a loss: those that look are let be, and those that give another gradient are refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock, local
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as _modules
from torch.utils.hooks import RemovableHandle

from bilevel.autodiff import transforms_active
from bilevel.errors import BilevelError
from bilevel.tree import leaves

_RECOMPUTED = "torch.utils.checkpoint"


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks stand on the gradients of a module's inputs or outputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def hooked_parts(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The parts of a module that have such hooks, by what they are called."""
    return {
        f"{path!r} in the module of {name!r}" if path else f"the module of {name!r}": part
        for path, part in module.named_modules()
        if has_hooks(part)
    }


@dataclass(eq=False)
class GradientHooks:
    """Lets the hooks that a loss sets, or that modules have, run under a guard which lets them look alone.

    A hook that returns another gradient, or writes into the one that it is given, raises `BilevelError` in the backward
    pass: what it would do is no part of the loss, and would be taken once more by each further derivative. Hooks of a
    module are guarded while it runs, and found by `modules`; `Tensor.register_hook` is met where it is called. Those of
    `grad_fn` are not seen.

    Args:
        player: Whose loss it is.
        dtype: Of the variables.
        modules: Those with hooks, by what they are called.
        met: Whether the loss has set a hook itself.
        lossy: What hooks on saved tensors give back otherwise than it was saved, in words.
    """

    player: str
    dtype: torch.dtype
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    met: bool = False
    lossy: str = ""

    def __post_init__(self) -> None:
        self._tried: list[Any] = []

    def registered(self, tensor: Tensor, hook: Callable[..., Any]) -> Any:
        """What `tensor.register_hook(hook)` returns."""
        self.met = True
        if not tensor.requires_grad:  # an evaluation for its value alone: there will be no gradient to look at
            return RemovableHandle(OrderedDict())
        return _REGISTER(tensor, partial(self.guarded, hook, f"a tensor of shape {tuple(tensor.shape)}", 0))

    def guarded(self, hook: Callable[..., Any], what: str, place: int, *given: Any) -> Any:
        """What a hook returns, which has to be nothing, or what it was given."""
        gradients = [g for g in leaves(given[place]) if isinstance(g, Tensor)]
        # Inside a transform nobody can say whether two tensors are equal.
        before = [g.detach().clone() for g in gradients] if not transforms_active() else []
        returned = hook(*given)
        kept, came = leaves(returned), leaves(given[place])
        same = returned is None or (len(kept) == len(came) and all(map(_is, kept, came)))
        written = any(not torch.equal(g.detach(), was) for g, was in zip(gradients, before, strict=False))
        if same and not (written and not any(bool(was.isnan().any()) for was in before)):
            return None
        did = "writes into the gradient that it is given" if same else "returns another gradient than it is given"
        raise BilevelError(
            f"Player {self.player!r}: the hook {_name(hook)} on {what} {did}. What reaches the variables is then not "
            "the derivative of the loss, and hypergradients would be wrong in silence. Take the hook away, "
            "handle.remove(), and scale the loss itself; a clip of a follower's steps is TorchOptimizer(..., "
            "clip_norm=), one of the leader's solve(..., clip_norm=). A hook that returns nothing may stay."
        )

    def saved_by(self, pack: Callable[..., Any], unpack: Callable[..., Any], dtype: torch.dtype) -> None:
        """Try hooks on saved tensors, once each: what they give back has to be what was saved."""
        if self.lossy or any(one is pack for one in self._tried) or getattr(pack, "__module__", "") == _RECOMPUTED:
            return
        self._tried.append(pack)
        try:
            with torch.no_grad():
                # Of no power of two, and far from 0.
                sample = torch.linspace(0.7, 1.3, 7, dtype=dtype)
                back = unpack(pack(sample.clone()))
                if not torch.equal(back, sample):
                    self.lossy = f"{_name(pack)} and {_name(unpack)}, by up to {float((back - sample).abs().max()):.2g}"
        except Exception:
            pass

    @contextmanager
    def around(self) -> Iterator[None]:
        """Guard all hooks of what is run inside, and of its backward pass."""
        if self.modules and transforms_active():
            raise BilevelError(
                f"Player {self.player!r}: {next(iter(self.modules))} has backward hooks, which torch.func does not "
                "run, and by it many games at once, Hypernetwork(...) and derivatives by torch.func are computed. Take "
                "them away, handle.remove(), or use another response and plain autograd."
            )
        tables = [(what, table) for what, module in self.modules.items() for table in _tables(module)]
        tables += [("every module", _modules._global_backward_hooks)]
        tables += [("every module", _modules._global_backward_pre_hooks)]
        kept = [(table, dict(table)) for _, table in tables]
        try:
            for what, table in tables:
                for key, hook in list(table.items()):
                    table[key] = partial(self.guarded, hook, what, 1)
            with _installed(self):
                yield
        finally:
            for table, before in kept:
                for key, hook in before.items():
                    if key in table:
                        table[key] = hook


# Torch's own methods, which are another's while a loss is watched. A mode of torch functions would see the same calls,
# but torch.compile traces what a mode does.
_REGISTER: Callable[..., Any] = Tensor.register_hook
_ENTER: Callable[..., Any] = saved_tensors_hooks.__enter__
_WATCHING = RLock()
_watched: list[GradientHooks | list[object]] = []
_here = local()


@contextmanager
def _installed(watch: GradientHooks | list[object]) -> Iterator[None]:
    """Let a watch see the hooks that this thread sets; a list sees those of other threads."""
    mine = isinstance(watch, GradientHooks)
    before = getattr(_here, "watch", None)
    with _WATCHING:
        if not _watched:
            Tensor.register_hook = _register  # type: ignore[method-assign]
            saved_tensors_hooks.__enter__ = _enter  # type: ignore[method-assign]
        _watched.append(watch)
    _here.watch = watch if mine else before
    _here.looks = True
    try:
        yield
    finally:
        _here.watch, _here.looks = before, before is not None
        with _WATCHING:
            _watched[:] = [one for one in _watched if one is not watch]
            if not _watched:
                Tensor.register_hook = _REGISTER  # type: ignore[method-assign]
                saved_tensors_hooks.__enter__ = _ENTER  # type: ignore[method-assign]


def _register(tensor: Tensor, hook: Callable[..., Any]) -> Any:
    watch = getattr(_here, "watch", None)
    if watch is not None:
        return watch.registered(tensor, hook)
    if not getattr(_here, "looks", False):
        for one in list(_watched):
            if isinstance(one, list):
                one.append(hook)
    return _REGISTER(tensor, hook)


def _enter(self: saved_tensors_hooks) -> Any:
    watch = getattr(_here, "watch", None)
    if watch is not None:
        watch.saved_by(self.pack_hook, self.unpack_hook, watch.dtype)
    return _ENTER(self)


@contextmanager
def hooks_elsewhere(met: list[object]) -> Iterator[None]:
    """Note the hooks on tensors that other threads than this one set."""
    with _installed(met):
        yield


def _tables(module: nn.Module) -> list[dict[int, Any]]:
    return [module._backward_hooks, module._backward_pre_hooks]


def hooks_of_every_module() -> bool:
    """Whether hooks stand on the gradients of whatever module is run."""
    return bool(_modules._global_backward_hooks or _modules._global_backward_pre_hooks)


def _is(one: Any, other: Any) -> bool:
    return one is other


def _name(function: Any) -> str:
    found = function.func if isinstance(function, partial) else function
    return (
        str(getattr(found, "__qualname__", type(found).__name__))
        .replace("<locals>.", "")
        .replace("<", "")
        .replace(">", "")
    )
