"""A rank's part of a vector, whose sums are over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.errors import ParallelError
from bilevel.sharding.layout import Layout

_aten = torch.ops.aten


class Peers(Protocol):
    """The ranks that hold the other parts."""

    @property
    def rank(self) -> int:
        """The number of this one."""

    @property
    def size(self) -> int:
        """How many there are."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of as many numbers."""

    def greatest(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks of each number."""

    def parts(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every rank's vector, of the given lengths."""


@dataclass(frozen=True)
class Form:
    """What the parts make up: whole tensors, in their own shapes or one after the other in a flat vector."""

    layouts: tuple[Layout, ...]
    flat: bool


class ShardedTensor(Tensor):
    """The part of a tensor that this rank holds; sums, norms and dot products of it are over all ranks.

    What acts on each entry by itself, or only arranges entries, acts on the part; what adds entries up adds up all of
    them; everything else raises `ParallelError`, for its result would be of one rank's part. So whatever works on a
    follower's variables, an optimiser, a linear solver, a rule for when to stop, is right without knowing of it, or is
    refused by name. All ranks must ask the same in the same order.

    Args:
        local: The part. It is shared, not copied.
        peers: Who holds the others.
        form: What they make up; None where that is no longer known.
    """

    local: Tensor
    peers: Peers
    form: Form | None

    @staticmethod
    def __new__(cls, local: Tensor, peers: Peers, form: Form | None = None) -> ShardedTensor:
        """A part; it requires no gradient yet."""
        made = Tensor._make_wrapper_subclass(
            cls, local.shape, local.stride(), local.storage_offset(), dtype=local.dtype, device=local.device
        )
        made.local, made.peers, made.form = local, peers, form
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        """The part."""
        return f"ShardedTensor({self.local!r}, rank {self.peers.rank} of {self.peers.size})"

    @property
    def entries(self) -> int:
        """How many the whole has."""
        if self.form is not None:
            return sum(layout.entries for layout in self.form.layouts)
        return int(self.peers.total(torch.tensor(self.local.numel(), device=self.local.device)))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.split_with_sizes and not torch._C._are_functorch_transforms_active():
                return _Cut.apply(*args)  # type: ignore[no-untyped-call]
            found = func(*args, **(kwargs or {}))
        if func is Tensor.expand_as and isinstance(args[1], cls) and not isinstance(found, cls):
            return cls(found, args[1].peers, args[1].form)
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _REDUCTIONS:
            return _REDUCTIONS[packet](func, *args, **kwargs)
        if not (torch.Tag.pointwise in func.tags or packet in _ARRANGING or _foreach(func)):
            raise ParallelError(
                f"{packet} was asked of a tensor of which each rank holds a part; it would act on this rank's alone. "
                "What acts on each entry by itself, sums, norms and dot products are known there. Use another solver "
                "or optimiser, or variables that each rank holds whole."
            )
        wrapped: dict[int, ShardedTensor] = {}
        first: list[ShardedTensor] = []

        def unwrap(value: Any) -> Any:
            if isinstance(value, ShardedTensor):
                wrapped[id(value.local)] = value
                first.append(value)
                return value.local
            # A number alone: of a tensor with one entry the derivative would be summed along this rank's dimensions.
            if isinstance(value, Tensor) and value.ndim:
                raise ParallelError(
                    f"{packet} was asked of a tensor {list(value.shape)} that each rank holds whole and another of "
                    "which each holds a part. Give both the same way."
                )
            return value

        given, named = pytree.tree_map(unwrap, (args, kwargs))
        found = func(*given, **named)
        like = first[0]

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in wrapped and func._schema.is_mutable:
                return wrapped[id(value)]
            if value.ndim == 0:
                return value
            return cls(value, like.peers, like.form if value.shape == like.shape else None)

        if packet in _NEW and tuple(found.shape) != tuple(like.shape):
            if found.numel() <= 1:
                return found
            raise ParallelError(
                f"{packet} was asked for a tensor {list(found.shape)} beside a part {list(like.shape)}; whether that "
                "is another part or a whole is not known."
            )
        made = pytree.tree_map(wrap, found)
        return _formed(packet, made, first, args)


class _Cut(torch.autograd.Function):
    """Pieces of a part. The derivative by one that nobody uses is a part of zeros; PyTorch's own would be a whole."""

    @staticmethod
    def forward(vector: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return vector.split_with_sizes(list(sizes))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[ShardedTensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.pieces = [(piece.shape, piece.dtype, piece.device, piece.peers, piece.form) for piece in output]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, None]:
        found = [
            ShardedTensor(torch.zeros(shape, dtype=dtype, device=device), peers, form) if given is None else given
            for given, (shape, dtype, device, peers, form) in zip(cotangents, ctx.pieces, strict=True)
        ]
        return torch.cat(found), None


def _formed(packet: Any, made: Any, given: Sequence[ShardedTensor], args: Sequence[Any]) -> Any:
    """What the results make up, where they only arrange what came."""
    forms = [each.form for each in given]
    if any(form is None for form in forms):
        if packet is _aten.cat:
            made.form = None  # of empty parts it has the first one's shape, and would have taken its form
        return made
    known = [form for form in forms if form is not None]
    if packet is _aten.slice:
        # By what was asked, for a slice of an empty part has its shape: what ranks hold of it they must know alike.
        asked: list[Any] = [*args[2:], *[None, None, 1][len(args[2:]) :]]
        begin, end, step = asked
        if begin or step != 1 or (end is not None and end < 2**62):
            made.form = None
    elif packet in (_aten.view, _aten._unsafe_view, _aten._reshape_alias) and isinstance(made, ShardedTensor):
        (form,) = known
        if made.ndim == 1 and given[0].numel() == made.numel():
            made.form = Form(form.layouts, True)
        elif len(form.layouts) == 1 and tuple(made.shape) == form.layouts[0].part(made.peers.rank):
            made.form = Form(form.layouts, False)
        elif _in_line(made):
            made.form = Form(form.layouts, True)
    elif packet is _aten.cat and isinstance(made, ShardedTensor):
        vectors = _in_line(made) and all(_in_line(part) for part in given)
        made.form = Form(tuple(layout for form in known for layout in form.layouts), True) if vectors else None
    elif packet in (_aten.split, _aten.split_with_sizes) and known[0].flat:
        rank = given[0].peers.rank
        sizes = [math.prod(layout.part(rank)) for layout in known[0].layouts]
        if [part.numel() for part in made] == sizes:
            for part, layout in zip(made, known[0].layouts, strict=True):
                part.form = Form((layout,), True)
        else:
            for part in made:
                part.form = None
    return made


def _in_line(part: Tensor) -> bool:
    """Whether its entries are one after the other, in a vector or in a column."""
    return part.ndim == 1 or (part.ndim == 2 and part.shape[1] == 1)


def noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers beside a tensor; of one that is spread, each rank draws for its part."""
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)
    return ShardedTensor(noise, tensor.peers, tensor.form) if isinstance(tensor, ShardedTensor) else noise


def part_of(whole: Tensor, like: ShardedTensor) -> ShardedTensor:
    """The part of a flat vector of all entries that this rank holds, laid out as `like`."""
    if like.form is None:
        raise ParallelError("How a vector is spread over the ranks is not known, and which part of another is due.")
    own, place = [], 0
    for layout in like.form.layouts:
        piece = whole[place : place + layout.entries]
        own.append(layout.cut(piece.reshape(layout.stacked), like.peers.rank).reshape(-1))
        place += layout.entries
    return ShardedTensor(torch.cat(own).reshape(like.shape), like.peers, like.form)


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Where this rank's entries are."""
    return (tensor.local if isinstance(tensor, ShardedTensor) else tensor).untyped_storage()


def entries(tensor: Tensor) -> int:
    """How many a tensor has, over all ranks."""
    return tensor.entries if isinstance(tensor, ShardedTensor) else tensor.numel()


def shape_of(tensor: Tensor) -> list[int]:
    """The shape of the whole."""
    if isinstance(tensor, ShardedTensor) and tensor.form is not None and len(tensor.form.layouts) == 1:
        return list(tensor.form.layouts[0].shape)
    return list(tensor.shape)


# What adds up ------------------------------------------------------------------------------------------------------


def _both(a: Any, b: Any, what: object) -> tuple[Tensor, Tensor, Peers]:
    if not (isinstance(a, ShardedTensor) and isinstance(b, ShardedTensor)):
        raise ParallelError(
            f"{what} was asked of a tensor that each rank holds whole and another of which each holds a part."
        )
    return a.local, b.local, a.peers


def _dot(func: Any, a: Any, b: Any) -> Tensor:
    x, y, peers = _both(a, b, func)
    return peers.total(torch.dot(x, y))


def _require_all(func: Any, x: ShardedTensor, dim: Any, keepdim: bool) -> None:
    dims = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if keepdim or (dims and {d % x.ndim for d in dims} != set(range(x.ndim))):
        raise ParallelError(f"{func} along one dimension of a tensor of which each rank holds a part is not known.")


def _vector_norm(
    func: Any, x: ShardedTensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    _require_all(func, x, dim, keepdim)
    if ord == math.inf:
        return x.peers.greatest(_largest(x.local.abs()))
    if ord != 2:
        raise ParallelError(f"A norm of order {ord} of a tensor of which each rank holds a part is not known.")
    own: Tensor = torch.linalg.vector_norm(x.local, dtype=dtype)
    return x.peers.total(own.square()).sqrt()


def _sum(func: Any, x: ShardedTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    _require_all(func, x, dim, keepdim)
    return x.peers.total(x.local.sum(dtype=dtype))


def _mean(func: Any, x: ShardedTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    _require_all(func, x, dim, keepdim)
    return x.peers.total(x.local.sum(dtype=dtype)) / x.entries


def _max(func: Any, x: ShardedTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    _require_all(func, x, dim, keepdim)
    return x.peers.greatest(_largest(x.local))


def _min(func: Any, x: ShardedTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return -_max(func, ShardedTensor(-x.local, x.peers), dim, keepdim)


def _aminmax(func: Any, x: ShardedTensor, *, dim: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _min(func, x, dim, keepdim), _max(func, x, dim, keepdim)


def _all(func: Any, x: ShardedTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    _require_all(func, x, dim, keepdim)
    return x.peers.greatest((~x.local.bool()).any().to(torch.int32)) == 0


def _any(func: Any, x: ShardedTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    _require_all(func, x, dim, keepdim)
    return x.peers.greatest(x.local.bool().any().to(torch.int32)) != 0


def _equal(func: Any, a: Any, b: Any) -> bool:
    x, y, peers = _both(a, b, func)
    return int(peers.greatest(torch.tensor(int(not torch.equal(x, y)), device=x.device))) == 0


def _largest(local: Tensor) -> Tensor:
    """The largest entry; of none less than any."""
    if local.numel():
        return local.amax()
    return local.new_full((), -math.inf if local.is_floating_point() else torch.iinfo(local.dtype).min)


def _foreach(func: Any) -> bool:
    name = func._schema.name
    return name.startswith("aten::_foreach_") and not name.startswith(("aten::_foreach_norm", "aten::_foreach_max"))


_REDUCTIONS: dict[Any, Callable[..., Any]] = {
    _aten.dot: _dot,
    _aten.vdot: _dot,
    _aten.linalg_vector_norm: _vector_norm,
    _aten.sum: _sum,
    _aten.mean: _mean,
    _aten.amax: _max,
    _aten.amin: _min,
    _aten.max: _max,
    _aten.min: _min,
    _aten.aminmax: _aminmax,
    _aten.all: _all,
    _aten.any: _any,
    _aten.equal: _equal,
}
_NEW = {_aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty, _aten.new_empty_strided}
_ARRANGING = _NEW | {
    *(_aten.view, _aten._unsafe_view, _aten._reshape_alias, _aten.alias, _aten.detach, _aten.clone, _aten.copy_),
    *(_aten._to_copy, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.empty_like, _aten.fill_, _aten.zero_),
    *(
        _aten.cat,
        _aten.split,
        _aten.split_with_sizes,
        _aten.slice,
        _aten.slice_backward,
        _aten.where,
        _aten.lift_fresh,
        _aten.masked_fill,
        _aten.masked_fill_,
    ),
}
