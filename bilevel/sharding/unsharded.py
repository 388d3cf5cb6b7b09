r"""The whole of a tensor, where a loss uses it: a gather over ranks as a part of the derivatives, of any order.

A rank computes its share of a loss from a tensor of which it holds a part s. `gathered` puts the parts together, and
its transpose adds up what the ranks' shares say of the whole and cuts out this rank's part again:

$$
\text{gathered}: (s_1, \dots, s_p) \mapsto (y, \dots, y); \qquad
\text{scattered}: (v_1, \dots, v_p) \mapsto \text{the parts of } \textstyle\sum_r v_r
$$

Each is the other's transpose. Where all ranks compute the same (`shared=False`), no sum is due: the transpose cuts.

`Unsharded` puts them together where an operation takes it, and no earlier: layer after layer, as a network runs. What
autograd would save of the whole for a backward pass is saved as the part, and put together again there (`Saving`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from bilevel.sharding.layout import Layout
from bilevel.sharding.tensor import Form, Peers, ShardedTensor

_SAVING: ContextVar[Saving | None] = ContextVar("saving", default=None)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(layout: Layout, shared: bool, part: Tensor) -> Tensor:
        if not isinstance(part, ShardedTensor):
            raise AssertionError("what is gathered is a part")
        return put_together(layout, part.peers, part.local)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.layout, ctx.shared, part = inputs
        ctx.peers = part.peers

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, _Scattered.apply(ctx.layout, ctx.shared, ctx.peers, cotangents[0])  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, tangent: Tensor) -> Tensor:
        return _Gathered.apply(ctx.layout, ctx.shared, tangent)  # type: ignore[no-any-return, no-untyped-call]


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(layout: Layout, shared: bool, peers: Peers, whole: Tensor) -> Tensor:
        total = peers.total(whole) if shared else whole
        return ShardedTensor(layout.cut(total, peers.rank), peers, Form((layout,), False))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.layout, ctx.shared, ctx.peers, _ = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, _Gathered.apply(ctx.layout, ctx.shared, cotangents[0])  # type: ignore[no-untyped-call]


def put_together(layout: Layout, peers: Peers, local: Tensor) -> Tensor:
    """The whole, of every rank's part."""
    sizes = [torch.Size(layout.part(rank)).numel() for rank in range(peers.size)]
    return layout.joined(peers.parts(local.detach().reshape(-1), sizes))


class Unsharded(Tensor):
    """A whole tensor of which this rank holds a part: any operation on it puts it together first.

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
        found: Tensor = _Gathered.apply(layout, self._shared, part)  # type: ignore[no-untyped-call]
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
        if func in _SQUARES and not kwargs:
            # Of a product autograd keeps the factors, and they are kept as parts; of a square it keeps the whole twice.
            func, args = torch.mul, (args[0], args[0])
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


_SQUARES = (torch.square, Tensor.square)
_OF_ITS_FORM = {
    *(Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
    *(Tensor.layout.__get__, Tensor.is_sparse.__get__, Tensor.is_quantized.__get__),  # type: ignore[attr-defined]
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
    Tensor.__repr__,
}


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
        if source.local._version != saved.version:
            raise RuntimeError("A sharded tensor that a backward pass needs was written to since.")
        whole = put_together(source.layout, source.peers, source.local)
        self.remember(whole, source)
        return whole.as_strided(*saved.form)
