"""The pytrees of a game in the forms that other libraries take: a module, a derivative that is a pytree again."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.tree import Variables, leaves, structure_of


class Holder(torch.nn.Module):
    """A module whose parameters are the leaves of a pytree; calling it gives the pytree."""

    def __init__(self, tree: Variables) -> None:
        super().__init__()
        self.structure = structure_of(tree)
        self.names = [f"leaf{i}" for i in range(len(self.structure.shapes))]
        for name, leaf in zip(self.names, leaves(tree), strict=True):
            self.register_parameter(name, torch.nn.Parameter(leaf.detach().clone()))

    def forward(self) -> Variables:
        """The pytree of the present parameters."""
        return self.structure.build([getattr(self, name) for name in self.names])


def slope(loss: Tensor, x: Variables) -> Variables:
    """The derivative by plain autograd, differentiable again, as a pytree like x."""
    slopes = torch.autograd.grad(loss, leaves(x), create_graph=True, allow_unused=True, materialize_grads=True)
    return structure_of(x).build(list(slopes))
