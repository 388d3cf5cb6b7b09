"""The whole of a tensor, where a loss uses it.

`Unsharded` is put together where an operation takes it, and no earlier: layer after layer, as a network runs. What
autograd would save of the whole for a backward pass is saved as the part, and put together again there (`Saving`).
What acts on each entry by itself acts on the parts, and is a tensor of which each rank holds a part again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from bilevel.errors import ParallelError
from bilevel.sharding.gathers import closed, gathered, multiplied, opened, put_together, totalled, unchanged
from bilevel.sharding.layout import Layout
from bilevel.sharding.tensor import Peers, ShardedTensor

_SAVING: ContextVar[Saving | None] = ContextVar("saving", default=None)


class Unsharded(Tensor):
    """A whole tensor of which this rank holds a part: operations on it put it together first, where they need it.

    Args:
        part: The part.
        layout: Whose.
        shared: Whether each rank computes a share of what is differentiated, and not all of it.
    """

    _part: ShardedTensor
    _layout: Layout
    _shared: bool

    @staticmethod
    def __new__(cls, part: ShardedTensor, layout: Layout, shared: bool) -> Unsharded:
        """Nothing is sent."""
        made = Tensor._make_wrapper_subclass(cls, layout.shape, dtype=part.dtype, device=part.device)
        made._part, made._layout, made._shared = part, layout, shared
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        """Its form."""
        return f"Unsharded({list(self.shape)}, {self.dtype})"

    def whole(self) -> Tensor:
        """It, as a plain tensor."""
        part, layout = self._part, self._layout
        found = gathered(layout, self._shared, part)
        saving = _SAVING.get()
        if saving is not None:
            saving.remember(found, _Source(layout, part.peers, part.local))
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            return args[0]._part.requires_grad
        if func in _OF_ITS_FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        found = _on_parts(func, args, kwargs or {})
        if found is not None:
            return found
        written = args[0] if args and _writes(func) else (kwargs or {}).get("out")
        if isinstance(written, Unsharded):
            raise ParallelError(
                f"{func.__name__} writes to a tensor of which each rank holds a part, which is whole only where it is "
                "read. Make a new tensor instead: torch.where(...), torch.cat(...), w = w + step."
            )
        wholes: dict[int, Tensor] = {}  # what comes twice is put together once

        def whole(value: Unsharded) -> Tensor:
            if id(value) not in wholes:
                wholes[id(value)] = value.whole()
            return wholes[id(value)]

        args, kwargs = pytree.tree_map_only(Unsharded, whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # From where no function of torch's is seen: its own C++ code.
        args, kwargs = pytree.tree_map_only(Unsharded, Unsharded.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


_OF_ITS_FORM = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
    *(Tensor.layout.__get__, Tensor.is_sparse.__get__, Tensor.is_quantized.__get__),  # type: ignore[attr-defined]
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
    Tensor.__repr__,
}


# What needs no whole -------------------------------------------------------------------------------------------------


def _on_parts(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a function gives that acts on the parts; None of one that needs the whole."""
    if torch._C._are_functorch_transforms_active() or "out" in kwargs:
        return None
    if func in _PRODUCTS and not kwargs:
        return _PRODUCTS[func](*args)
    if func in _SUMS and len(args) == 1 and not kwargs:
        return _summed(func, args[0])
    if not _writes(func):
        return _by_entry(func, args, kwargs) if _acts_by_entry(func) else None
    plain, found = _written_anew(func), None
    if plain is not None and _acts_by_entry(plain) and isinstance(args[0], Unsharded):
        found = _by_entry(plain, args, kwargs)
    if found is None or found.dtype is not args[0].dtype:
        return None
    args[0]._part = found._part
    return args[0]


def _by_entry(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Unsharded | None:
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    first = next(leaf for leaf in given if isinstance(leaf, Unsharded))
    kind = (first._layout, first._shared, first._part.peers)
    for leaf in given:
        if isinstance(leaf, Unsharded):
            alike = (leaf._layout, leaf._shared, leaf._part.peers) == kind
        else:  # the derivative by a number of everybody's would be the sum over this rank's entries alone
            alike = leaf.ndim == 0 and not leaf.requires_grad
        if not alike:
            return None
    if any(leaf is True for leaf in pytree.tree_leaves((args, kwargs))):  # inplace=True would write to the part
        return None
    own, named = pytree.tree_map_only(Unsharded, lambda leaf: opened(leaf._part), (args, dict(kwargs)))
    found = func(*own, **named)
    if not isinstance(found, Tensor) or found.shape != first._part.shape:
        return None
    return Unsharded(closed(first._part, found), first._layout, first._shared)


def _summed(func: Callable[..., Any], tensor: Unsharded) -> Tensor:
    total = totalled(tensor._part.peers, tensor._shared, opened(tensor._part).sum())
    return total / tensor._layout.entries if func in _MEANS else total


def _times(rows: Any, matrix: Any) -> Tensor | None:
    return _multiplied(rows, matrix, turned=False)


def _linear(rows: Any, weight: Any, bias: Any = None) -> Tensor | None:
    found = _multiplied(rows, weight, turned=True)
    return found if found is None or bias is None else found + bias


def _multiplied(rows: Any, matrix: Any, *, turned: bool) -> Tensor | None:
    if isinstance(rows, Unsharded) or not isinstance(matrix, Unsharded) or matrix.ndim != 2 or rows.ndim < 1:
        return None
    if rows.dtype is not matrix.dtype or torch.is_autocast_enabled(rows.device.type):
        return None
    flat = rows.reshape(-1, rows.shape[-1])
    found = multiplied(matrix._layout, matrix._shared, flat, matrix._part, turned=turned)
    return found.reshape(*rows.shape[:-1], found.shape[-1])


@functools.cache
def _acts_by_entry(func: Callable[..., Any]) -> bool:
    """Whether torch says so of a function, or of an operator like `__rsub__`."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        name = {"truediv": "div", "rtruediv": "div", "rdiv": "div"}.get(name.strip("_"), name.strip("_"))
        if not hasattr(torch.ops.aten, name):
            name = name.removeprefix("r")
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "dim" in packet.overloads():  # torch.max is by entry of two tensors, and a reduction of one
        return False
    tags = [getattr(packet, which).tags for which in packet.overloads()]
    drawn = any(torch.Tag.nondeterministic_seeded in each for each in tags)
    return not drawn and any(torch.Tag.pointwise in each for each in tags)


@functools.cache
def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function or an operator writes to its first tensor."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"))
    packet = getattr(torch.ops.aten, name, None) if name.endswith("_") and name != "requires_grad_" else None
    return packet is not None and bool(getattr(packet, packet.overloads()[0])._schema.is_mutable)


@functools.cache
def _written_anew(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that returns a new tensor instead."""
    name = func.__name__
    return getattr(Tensor, f"__{name[3:]}" if name.startswith("__i") else name[:-1], None)


_PRODUCTS: Mapping[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _times),
    torch.nn.functional.linear: _linear,
}
_MEANS = (torch.mean, Tensor.mean)
_SUMS = (torch.sum, Tensor.sum, *_MEANS)


# What is saved -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Source:
    layout: Layout
    peers: Peers
    local: Tensor


@dataclass(frozen=True, eq=False)
class _Saved:
    source: _Source
    version: int
    form: tuple[Any, ...]


class Saving:
    """`with Saving():` what autograd saves of a tensor that was put together is this rank's part of it.

    Inside another one nothing changes, nor where somebody else watches what is saved.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, _Source]] = {}
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Saving:
        watched = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        if not watched and allowed and not torch._C._are_functorch_transforms_active():
            self._token = _SAVING.set(self)
            self._hooks = saved_tensors_hooks(self._pack, self._unpack)
            self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks = None
            _SAVING.reset(self._token)

    def remember(self, whole: Tensor, source: _Source) -> None:
        """Where a whole came from. A storage that has gone is told by its reference, not by its place in memory."""
        self._known = {place: pair for place, pair in self._known.items() if not pair[0].expired()}  # type: ignore[no-untyped-call]
        storage = whole.untyped_storage()
        self._known[storage._cdata] = (StorageWeakRef(storage), source)  # type: ignore[no-untyped-call]

    def _pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, Unsharded):
            return tensor
        plain = not isinstance(tensor, ShardedTensor) and tensor.layout == torch.strided
        found = self._known.get(tensor.untyped_storage()._cdata) if plain else None
        if found is None:
            # An output that an operation saves as it is would hold the operation, and that the output, for ever.
            return tensor.detach()
        form = (tensor.size(), tensor.stride(), tensor.storage_offset())
        return _Saved(found[1], found[1].local._version, form)

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved  # type: ignore[no-any-return]
        source = saved.source
        unchanged(source.local, saved.version)
        whole = put_together(source.layout, source.peers, source.local)
        self.remember(whole, source)
        return whole.as_strided(*saved.form)
