"""Pytrees of tensors, and the flat vector that the solvers see.

A player's variables are a tensor or any nest of dicts, lists and tuples of tensors. Solvers work on one vector of
all entries; users never see it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # the pytrees that torch.func itself understands

Variables = Any
"""A tensor, or a nest of dicts, lists and tuples of tensors."""


@final
class Made(Mapping[str, Any]):
    """Entries that are made, once, when they are first asked for: what nobody looks at costs nothing."""

    def __init__(self, names: Collection[str], make: Callable[[str], Any]) -> None:
        self._names, self._make = names, make
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            if name not in self._names:
                raise KeyError(name)
            self._made[name] = self._make(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Structure:
    """How a pytree is laid out in a flat vector: its treespec and the shapes of its leaves."""

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as an empty pytree: unpickling torch's own treespec warns."""
        return structure_of, (self.build([torch.empty(shape, device="meta") for shape in self.shapes]),)

    @property
    def size(self) -> int:
        """How many scalars the flat vector has."""
        return sum(shape.numel() for shape in self.shapes)

    def split(self, vector: Tensor) -> list[Tensor]:
        """The leaves, as views of `vector: [n]`."""
        return cut(vector, self.shapes)

    def unflatten(self, vector: Tensor) -> Variables:
        """The pytree whose leaves are views of `vector: [n]`."""
        return self.build(self.split(vector))

    def build(self, leaves: Sequence[Tensor]) -> Variables:
        """The pytree with these leaves."""
        spec = self.spec
        if spec.type is dict and spec.num_nodes == len(self.shapes) + 1:  # a module's parameters, as a rule
            return dict(zip(spec.context, leaves, strict=True))
        if spec.num_nodes == spec.num_leaves == 1:  # a tensor by itself
            (leaf,) = leaves
            return leaf
        return pytree.tree_unflatten(list(leaves), spec)

    def fits(self, tree: Variables) -> bool:
        """Whether a pytree is laid out like this."""
        spec = self.spec
        if type(tree) is dict and spec.type is dict and spec.num_nodes == len(self.shapes) + 1:
            given = tree.values()
            if not _TENSORS.issuperset(map(type, given)):
                return self == structure_of(tree)
            return list(tree) == spec.context and all(map(_of_shape, given, self.shapes))
        if type(tree) in _TENSORS:
            return spec.num_nodes == spec.num_leaves == 1 and tree.shape == self.shapes[0]
        return self == structure_of(tree)


def _of_shape(tensor: Tensor, shape: torch.Size) -> bool:
    return tensor.shape == shape


def structure_of(tree: Variables) -> Structure:
    """The layout of a pytree."""
    if type(tree) in _TENSORS:
        return Structure(_ONE, (tree.shape,))
    values, spec = pytree.tree_flatten(tree)
    return Structure(spec, tuple(leaf.shape for leaf in values))


def leaves(tree: Variables) -> list[Any]:
    """The leaves of a pytree, in its order."""
    found: list[Any] = []
    _gather(tree, found)
    return found


# A step of a small follower walks some thirty trees, nearly all of them plain dicts of tensors. PyTorch's own walk,
# which looks each node's kind up in a registry, took a fifth of the step.
_TENSORS = frozenset((Tensor, nn.Parameter))
_LEAVES = _TENSORS | frozenset((int, float, bool, str, type(None)))
_ONE = pytree.tree_structure(0)


def _gather(tree: Variables, found: list[Any]) -> None:
    kind = type(tree)
    if kind in _LEAVES:
        found.append(tree)
    elif kind is dict or kind is list or kind is tuple:
        for part in tree.values() if kind is dict else tree:
            if type(part) in _LEAVES:
                found.append(part)
            else:
                _gather(part, found)
    else:
        found.extend(pytree.tree_leaves(tree))


def rebuilt(like: Variables, leaves: Iterable[Any]) -> Variables:
    """The pytree that is laid out as `like`, with these leaves."""
    following = iter(leaves)
    return map_leaves(lambda _: next(following), like)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One flat vector `[n]` of all tensors, each in row-major order."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    if all(tensor.numel() for tensor in tensors):
        return torch.cat([tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors])
    # Of a vector without entries PyTorch's derivative of `cat` is a new tensor, cut off from all others; of a column
    # it is not. A rank's part of a small tensor may be empty, and must take part in the derivatives as others do.
    return torch.cat([tensor.reshape(-1, 1) for tensor in tensors]).reshape(-1)


def cut(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Tensors of these shapes, as views of the flat vector `[n]` that they make up."""
    if len(shapes) == 1:
        return [vector.reshape(shapes[0])]
    sizes = [shape.numel() for shape in shapes]
    parts = (vector if all(sizes) else vector.reshape(-1, 1)).split_with_sizes(sizes)  # in columns, as `join` says
    pairs = zip(parts, shapes, strict=True)
    return [part if part.ndim == len(shape) == 1 else part.reshape(shape) for part, shape in pairs]


def flatten(tree: Variables) -> Tensor:
    """One flat vector `[n]` of all the leaves of a pytree."""
    return join(leaves(tree))


def map_leaves(function: Callable[..., Any], tree: Variables, *others: Variables) -> Variables:
    """The pytree of `function(leaf, ...)`."""
    if others:
        return pytree.tree_map(function, tree, *others)
    kind = type(tree)
    if kind in _LEAVES:
        return function(tree)
    if kind is dict:
        return {k: function(part) if type(part) in _LEAVES else map_leaves(function, part) for k, part in tree.items()}
    if kind is list or kind is tuple:
        return kind([function(part) if type(part) in _LEAVES else map_leaves(function, part) for part in tree])
    return pytree.tree_map(function, tree)


def detached(tree: Variables) -> Variables:
    """The same values, outside any graph, sharing no memory."""
    return map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def named_leaves(tree: Variables) -> list[tuple[str, Any]]:
    """Each leaf with its path as a user would write it: `['bias']`, `[0]`; an empty path for a bare tensor."""
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return [(pytree.keystr(path), leaf) for path, leaf in pairs]


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, by torch's own count, which views and detached aliases share."""
    return -1 if tensor.is_inference() else tensor._version


def leaf_names(tree: Variables, bare: str) -> list[str]:
    """Each leaf's path with dots, as `model.named_parameters()` names them; `bare` for a tensor by itself."""
    if type(tree) is dict and _TENSORS.issuperset(map(type, tree.values())):
        return [str(key) or bare for key in tree]
    if type(tree) in _TENSORS:
        return [bare]
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return [".".join(str(_step_of(key)) for key in path) or bare for path, _ in pairs]


def _step_of(key: Any) -> object:
    if isinstance(key, pytree.MappingKey):
        return key.key
    return key.idx if isinstance(key, pytree.SequenceKey) else key.name
