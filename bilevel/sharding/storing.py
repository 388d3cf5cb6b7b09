"""What spread tensors are in a file: whole, so that as many ranks as there are then can read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.errors import CheckpointError
from bilevel.sharding.layout import Layout
from bilevel.sharding.tensor import Form, Peers, ShardedTensor

_MARK = "of a spread tensor"


def has_parts(tree: Any) -> bool:
    """Whether a tree holds parts of tensors."""
    return any(isinstance(leaf, ShardedTensor) for leaf in pytree.tree_leaves(tree))


def whole(tree: Any, *, keep: bool) -> Any:
    """A tree without parts: each is put together, one after the other, and kept where `keep` says so.

    All ranks must take part. The wholes are plain tensors in the main memory.
    """

    def stored(leaf: Any) -> Any:
        if not isinstance(leaf, ShardedTensor):
            return leaf
        form, peers = leaf.form, leaf.peers
        flat = leaf.local.detach().reshape(-1)
        if form is None:
            sizes = [int(size) for size in peers.total(_one(peers, flat.numel(), flat)).tolist()]
            parts = [part.cpu().clone() for part in peers.parts(flat, sizes)]
            shape = list(leaf.shape)
            return {_MARK: [], "flat": False, "values": parts, "shape": shape} if keep else None
        pieces = torch.split(flat, [_count(layout, peers.rank) for layout in form.layouts])
        found = []
        for layout, piece in zip(form.layouts, pieces, strict=True):
            parts = peers.parts(piece, [_count(layout, rank) for rank in range(peers.size)])
            found.append(layout.joined(parts).cpu() if keep else None)
        layouts = [[list(layout.shape), layout.dim] for layout in form.layouts]
        return {_MARK: layouts, "flat": form.flat, "values": found} if keep else None

    return pytree.tree_map(stored, tree)


def parted(tree: Any, peers: Peers | None, device: torch.device) -> Any:
    """A tree from a file as this rank holds it; plain tensors where there is one process.

    Raises:
        CheckpointError: For what only as many ranks as wrote it can read.
    """

    def read(leaf: Any) -> Any:
        if not _is_stored(leaf):
            return leaf
        values = [value.to(device) for value in leaf["values"]]
        size = 1 if peers is None else peers.size
        layouts = tuple(Layout(tuple(shape), dim, size) for shape, dim in leaf[_MARK])
        if not layouts:
            if peers is None or len(values) != size:
                raise CheckpointError(
                    f"The checkpoint holds parts of a vector by {len(values)} ranks whose place in it is not known, "
                    f"and is read by {size}. Go on with {len(values)} ranks."
                )
            return ShardedTensor(values[peers.rank].reshape(leaf["shape"]), peers)
        if peers is None:
            return torch.cat([value.reshape(-1) for value in values]) if leaf["flat"] else values[0]
        own = _own(layouts, values, peers)
        return ShardedTensor(
            own if leaf["flat"] else own.reshape(layouts[0].part(peers.rank)), peers, Form(layouts, leaf["flat"])
        )

    return pytree.tree_map(read, tree, is_leaf=_is_stored)


def _own(layouts: Sequence[Layout], values: Sequence[Tensor], peers: Peers) -> Tensor:
    pairs = zip(layouts, values, strict=True)
    return torch.cat([layout.cut(value, peers.rank).reshape(-1) for layout, value in pairs])


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, dict) and _MARK in leaf


def _count(layout: Layout, rank: int) -> int:
    return torch.Size(layout.part(rank)).numel()


def _one(peers: Peers, number: int, like: Tensor) -> Tensor:
    """A number in this rank's place."""
    found = torch.zeros(peers.size, dtype=torch.int64, device=like.device)
    found[peers.rank] = number
    return found
