r"""What a loss does with tensors of which each rank holds a part, in functions that differentiate to any order.

A rank computes its share of a loss. `gathered` puts the parts s together, and its transpose adds up what the ranks'
shares say of the whole and cuts out this rank's part again:

$$
\text{gathered}: (s_1, \dots, s_p) \mapsto (y, \dots, y); \qquad
\text{scattered}: (v_1, \dots, v_p) \mapsto \text{the parts of } \textstyle\sum_r v_r
$$

Each is the other's transpose. Where all ranks compute the same (`shared=False`), no sum is due: the transpose cuts.

`multiplied` is a product with a matrix of which each rank holds a part. Its derivatives are such products again, each
of which gathers and scatters by itself. Otherwise what the derivative of a gradient says of a layer's weights in its
first half would wait, whole, for the second half: all layers at once, as much as in one process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.sharding.layout import Layout
from bilevel.sharding.tensor import Form, Peers, ShardedTensor


def put_together(layout: Layout, peers: Peers, local: Tensor) -> Tensor:
    """The whole, of every rank's part."""
    sizes = [torch.Size(layout.part(rank)).numel() for rank in range(peers.size)]
    flat = local.detach().reshape(-1)
    if flat.dtype is torch.bool:  # which gloo does not send
        return layout.joined(peers.parts(flat.view(torch.uint8), sizes)).view(torch.bool)
    return layout.joined(peers.parts(flat, sizes))


def unchanged(local: Tensor, version: int) -> None:
    """Raise where a part was written to since a backward pass was told of it."""
    if local._version != version:
        raise RuntimeError("A sharded tensor that a backward pass needs was written to since.")


def gathered(layout: Layout, shared: bool, part: ShardedTensor) -> Tensor:
    """The whole of a part."""
    return _Gathered.apply(layout, shared, part)  # type: ignore[no-any-return, no-untyped-call]


def multiplied(layout: Layout, shared: bool, rows: Tensor, part: ShardedTensor, *, turned: bool) -> Tensor:
    """`rows @ W`, or `rows @ W.T` where `turned`, of rows `[n, k]` and the part of a matrix W."""
    return _Multiplied.apply(layout, shared, turned, rows, part)  # type: ignore[no-any-return, no-untyped-call]


def opened(part: ShardedTensor) -> Tensor:
    """A part as a plain tensor, of which autograd knows all functions that act on each entry by itself."""
    return _Opened.apply(part)  # type: ignore[no-any-return, no-untyped-call]


def closed(like: ShardedTensor, local: Tensor) -> ShardedTensor:
    """A plain tensor as the part of one that is laid out like another."""
    return _Closed.apply(like.peers, like.form, local)  # type: ignore[no-any-return, no-untyped-call]


def totalled(peers: Peers, shared: bool, number: Tensor) -> Tensor:
    """The sum of all ranks' numbers."""
    return _Totalled.apply(peers, shared, True, number)  # type: ignore[no-any-return, no-untyped-call]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(layout: Layout, shared: bool, part: Tensor) -> Tensor:
        if not isinstance(part, ShardedTensor):
            raise AssertionError("what is gathered is a part")
        return put_together(layout, part.peers, part.local)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # zeros of PyTorch's would be no part
        ctx.layout, ctx.shared, part = inputs
        ctx.peers = part.peers

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if cotangents[0] is None:
            return None, None, None
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
        ctx.set_materialize_grads(False)  # zeros of PyTorch's would be no part
        ctx.layout, ctx.shared, ctx.peers, _ = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if cotangents[0] is None:
            return None, None, None, None
        return None, None, None, _Gathered.apply(ctx.layout, ctx.shared, cotangents[0])  # type: ignore[no-untyped-call]


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(layout: Layout, shared: bool, turned: bool, rows: Tensor, part: Any) -> Tensor:
        whole = put_together(layout, part.peers, part.local)
        return rows @ (whole.T if turned else whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # zeros of PyTorch's would be no part
        ctx.layout, ctx.shared, ctx.turned, rows, part = inputs
        ctx.peers, ctx.local, ctx.version = part.peers, part.local, part.local._version
        ctx.save_for_backward(rows, part)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        unchanged(ctx.local, ctx.version)
        (slope,), (rows, part) = cotangents, ctx.saved_tensors
        if slope is None:
            return None, None, None, None, None
        of_rows = of_part = None
        if ctx.needs_input_grad[3]:
            of_rows = _Multiplied.apply(ctx.layout, ctx.shared, not ctx.turned, slope, part)  # type: ignore[no-untyped-call]
        if ctx.needs_input_grad[4]:
            outer = slope.T @ rows if ctx.turned else rows.T @ slope
            of_part = _Scattered.apply(ctx.layout, ctx.shared, ctx.peers, outer)  # type: ignore[no-untyped-call]
        return None, None, None, of_rows, of_part


class _Opened(torch.autograd.Function):
    @staticmethod
    def forward(part: Any) -> Tensor:
        return part.local.detach()  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # zeros of PyTorch's would be no part
        ctx.peers, ctx.form = inputs[0].peers, inputs[0].form

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return None if cotangents[0] is None else _Closed.apply(ctx.peers, ctx.form, cotangents[0])  # type: ignore[no-untyped-call]


class _Closed(torch.autograd.Function):
    @staticmethod
    def forward(peers: Peers, form: Form | None, local: Tensor) -> Tensor:
        return ShardedTensor(local.detach().contiguous(), peers, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None if cotangents[0] is None else _Opened.apply(cotangents[0])  # type: ignore[no-untyped-call]


class _Totalled(torch.autograd.Function):
    # `summed`, or its transpose, which is a sum too where ranks compute shares.
    @staticmethod
    def forward(peers: Peers, shared: bool, summed: bool, number: Tensor) -> Tensor:
        return peers.total(number) if shared or summed else number.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # zeros of PyTorch's would be no part
        ctx.peers, ctx.shared, ctx.summed, _ = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if cotangents[0] is None:
            return None, None, None, None
        return None, None, None, _Totalled.apply(ctx.peers, ctx.shared, not ctx.summed, cotangents[0])  # type: ignore[no-untyped-call]
