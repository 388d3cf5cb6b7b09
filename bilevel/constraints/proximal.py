"""Non-smooth terms with a proximal map: absolute values, groups, and the elastic net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.constraints.base import Margins, Number, Penalty, by_leaf, check_number, number
from bilevel.constraints.projections import broadcasts
from bilevel.errors import require_kinds
from bilevel.tree import Variables, leaves, named_leaves, structure_of


def _shrunk(z: Tensor, by: Tensor) -> Tensor:
    """Each entry moved towards 0 by so much, and no further."""
    return torch.where(z > by, z - by, torch.where(z < -by, z + by, 0.0))


def _check_weights(penalty: Penalty, y: Variables, who: str, **weights: Any) -> None:
    for name, weight in weights.items():
        what = f"{who}: the {name} of its {type(penalty).__name__}"
        for (path, leaf), value in zip(named_leaves(y), by_leaf(weight, y, what), strict=True):
            check_number(value, f"{what}{path}", low=0.0)
            found = number(value, leaf)
            if not broadcasts(found.shape, leaf.shape):
                raise ValueError(
                    f"{what}{path} has shape {tuple(found.shape)}; expected one number, or a tensor that broadcasts to "
                    f"{tuple(leaf.shape)}."
                )


@final
@dataclass(frozen=True, eq=False)
class L1(Penalty):
    r"""The lasso's term $\text{weight} \sum_i |y_i|$.

    Args:
        weight: A number of at least 0, a tensor that broadcasts to the variables, a pytree of them, or a function of
            players: `L1(lambda penalty: penalty.exp())`.

    Examples:
        >>> L1(0.5).apply(torch.tensor([2.0, -0.3]), 1.0)
        tensor([1.5000, 0.0000])
    """

    weight: Number

    def __post_init__(self) -> None:
        for value in leaves(self.weight):
            check_number(value, "L1: weight", low=0.0)

    @property
    def entrywise(self) -> bool:
        """Yes."""
        return True

    def value(self, y: Variables) -> Tensor:
        """The term."""
        weights = by_leaf(self.weight, y, "L1: weight")
        terms = [(number(w, leaf) * leaf.abs()).sum() for leaf, w in zip(leaves(y), weights, strict=True)]
        return torch.stack(terms).sum()

    def apply(self, z: Variables, step: Any) -> Variables:
        """Each entry moved towards 0 by step * weight."""
        weights = by_leaf(self.weight, z, "L1: weight")
        rows = zip(leaves(z), weights, strict=True)
        return structure_of(z).build([_shrunk(leaf, step * number(w, leaf)) for leaf, w in rows])

    def margins(self, z: Variables, step: Any) -> Margins:
        """From where an entry becomes 0."""
        weights = by_leaf(self.weight, z, "L1: weight")
        pairs = zip(named_leaves(z), weights, strict=True)
        return {(path, "value 0"): leaf.abs() - step * number(w, leaf) for (path, leaf), w in pairs}

    def check(self, y: Variables, who: str) -> None:
        """Refuse weights below 0, or of another shape."""
        _check_weights(self, y, who, weight=self.weight)


@final
@dataclass(frozen=True, eq=False)
class ElasticNet(Penalty):
    r"""$\sum_i \text{l1}\, |y_i| + \tfrac12\, \text{l2}\, y_i^2$.

    Args:
        l1: As `L1`'s weight.
        l2: Likewise.

    Examples:
        >>> ElasticNet(0.5, 1.0).apply(torch.tensor([2.0, -0.3]), 1.0)
        tensor([0.7500, 0.0000])
    """

    l1: Number
    l2: Number

    def __post_init__(self) -> None:
        for name, weight in (("l1", self.l1), ("l2", self.l2)):
            for value in leaves(weight):
                check_number(value, f"ElasticNet: {name}", low=0.0)

    @property
    def entrywise(self) -> bool:
        """Yes."""
        return True

    def value(self, y: Variables) -> Tensor:
        """The term."""
        squares = by_leaf(self.l2, y, "ElasticNet: l2")
        terms = [(0.5 * number(w, leaf) * leaf.square()).sum() for leaf, w in zip(leaves(y), squares, strict=True)]
        return L1(self.l1).value(y) + torch.stack(terms).sum()

    def apply(self, z: Variables, step: Any) -> Variables:
        """L1's map, and then a division by 1 + step * l2."""
        squares = by_leaf(self.l2, z, "ElasticNet: l2")
        rows = zip(leaves(L1(self.l1).apply(z, step)), squares, strict=True)
        return structure_of(z).build([leaf / (1.0 + step * number(w, leaf)) for leaf, w in rows])

    def margins(self, z: Variables, step: Any) -> Margins:
        """From where an entry becomes 0."""
        return L1(self.l1).margins(z, step)

    def check(self, y: Variables, who: str) -> None:
        """Refuse weights below 0, or of another shape."""
        _check_weights(self, y, who, l1=self.l1, l2=self.l2)


@final
@dataclass(frozen=True, eq=False)
class GroupLasso(Penalty):
    r"""$\text{weight} \sum_g |y_g|_2$, where the groups g are the rows along a dimension of each tensor.

    Args:
        weight: A number of at least 0, or a function of players; the same for every group.
        dim: Along which dimension the entries of a group lie; None: each tensor is one group.

    Examples:
        >>> GroupLasso(1.0).apply(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """

    weight: Number
    dim: int | None = -1

    def __post_init__(self) -> None:
        require_kinds(self)
        check_number(self.weight, "GroupLasso: weight", low=0.0)

    @property
    def entrywise(self) -> bool:
        """No: the entries of a group become 0 together."""
        return False

    def _sizes(self, leaf: Tensor) -> Tensor:
        """The norm of each group, in a shape that broadcasts; with the derivative 0 at 0."""
        square = leaf.square().sum() if self.dim is None else leaf.square().sum(self.dim, keepdim=True)
        zero = square == 0.0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())

    def value(self, y: Variables) -> Tensor:
        """The term."""
        return torch.stack([(number(self.weight, leaf) * self._sizes(leaf)).sum() for leaf in leaves(y)]).sum()

    def apply(self, z: Variables, step: Any) -> Variables:
        """Each group shortened by step * weight."""

        def one(leaf: Tensor) -> Tensor:
            size, by = self._sizes(leaf), step * number(self.weight, leaf)
            above = size > by
            return torch.where(above, leaf * (1.0 - by / torch.where(above, size, 1.0)), 0.0)

        return structure_of(z).build([one(leaf) for leaf in leaves(z)])

    def margins(self, z: Variables, step: Any) -> Margins:
        """From where a group becomes 0."""
        return {
            (path, "group's value 0"): self._sizes(leaf) - step * number(self.weight, leaf)
            for path, leaf in named_leaves(z)
        }

    def check(self, y: Variables, who: str) -> None:
        """Refuse a weight that is no number, and tensors without that dimension."""
        check_number(self.weight, f"{who}: the weight of its GroupLasso", low=0.0)
        for path, leaf in named_leaves(y):
            if number(self.weight, leaf).ndim > 0:
                raise ValueError(f"{who}: the weight of its GroupLasso is a tensor of several; expected one number.")
            if self.dim is not None and not -leaf.ndim <= self.dim < leaf.ndim:
                raise ValueError(
                    f"{who}{path} has shape {tuple(leaf.shape)}, without the dimension {self.dim} of its GroupLasso. "
                    "With dim=None each tensor is one group."
                )
