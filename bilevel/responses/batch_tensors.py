"""The tensors of a batch, which under a `torch.func` transform are inputs as the leader's variables are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.game.data import Batch


class BatchTensors:
    """A batch taken apart into its tensors, and put together with others in their place.

    Under vmap a batch may have a row for each task: who solves below the transforms must be given the row.
    """

    def __init__(self, batch: Batch) -> None:
        self._leaves, self._spec = pytree.tree_flatten(batch)
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def put(self, tensors: Sequence[Tensor]) -> Batch:
        """The batch with these tensors in the place of its own."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)
