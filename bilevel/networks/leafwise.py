"""Networks that know the follower's leaves and move each layer by itself: 10 million weights, a few thousand numbers.

A dense map from m hyperparameters to n weights has m n parameters, and as many gradients and twice as many optimiser's
numbers. What hyperparameters do to a layer is mostly simpler: its rows, its columns, or a few directions of it answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import require_kinds
from bilevel.networks.flat import Parameters

_BLOCK = 64
"""Rows that are multiplied at once: their products stay in the processor's cache."""


class LeafNetwork(ABC):
    r"""How each leaf of the follower's variables is moved, as configuration; its numbers are an argument.

    $$
    y(x) = \operatorname{net}\big((x - x_0) / s,\; w_0\big), \qquad \operatorname{net}(0, w_0) = w_0.
    $$

    A subclass says which numbers it starts with, for the shapes of w0's leaves, and how they move w0. It must give w0
    at u = 0, for a learned response is centred there; and w0 at every u with the numbers that it starts with, so that a
    response starts where its follower does. `Hypernetwork.init` raises `ValueError` where shapes, or the first of
    these, are wrong.

    The built-in ones take a leaf of two dimensions or more as a matrix: its first dimension numbers the rows, all
    others together the columns, as in `torch.nn.Linear` and in convolutions. Each entry of a vector or a scalar (a
    bias) moves freely.

    Examples:
        >>> class LayerScaled(LeafNetwork):  # each layer grows or shrinks as a whole
        ...     def parameters(self, inputs, shapes):
        ...         return {"factors": torch.zeros(len(shapes), inputs)}
        ...
        ...     def __call__(self, parameters, u, w0):
        ...         return [leaf * (1 + factor) for leaf, factor in zip(w0, parameters["factors"] @ u)]
    """

    @abstractmethod
    def parameters(self, inputs: int, shapes: Sequence[torch.Size]) -> dict[str, Tensor]:
        """The numbers that it starts with; random ones come from torch's global generator.

        They are brought to the follower's dtype and device. `shapes` are those of w0's leaves.
        """

    @abstractmethod
    def __call__(self, parameters: Parameters, u: Tensor, w0: Sequence[Tensor]) -> list[Tensor]:
        """The answer's leaves at a displacement `u: [inputs]` of the others' variables, of norm about one.

        Differentiable in the parameters and in u. It may be called under `torch.func` transforms. The leaves arrive
        without a graph: the follower's own gradient is taken where the answer is, with the slope held.
        """


class _LayerNetwork(LeafNetwork):
    """Vectors answer by a dense slope of their own, zero at the start; what matrices do is the subclass's."""

    def parameters(self, inputs: int, shapes: Sequence[torch.Size]) -> dict[str, Tensor]:
        """Those of the vectors, and of the matrices; each named by its kind and the number of its leaf."""
        sizes = {str(i): (shape[0], shape[1:].numel()) for i, shape in enumerate(shapes) if len(shape) > 1}
        free = {f"free.{i}": torch.zeros(s.numel(), inputs) for i, s in enumerate(shapes) if len(s) < 2}
        return free | self._start(inputs, sizes)

    def __call__(self, parameters: Parameters, u: Tensor, w0: Sequence[Tensor]) -> list[Tensor]:
        """Leaf by leaf."""
        moved = []
        for index, leaf in enumerate(w0):
            if leaf.ndim < 2:
                moved.append(leaf + (parameters[f"free.{index}"] @ u).reshape(leaf.shape))
            else:
                moved.append(self._move(parameters, str(index), u, leaf.flatten(1)).reshape(leaf.shape))
        return moved

    @abstractmethod
    def _start(self, inputs: int, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """The parameters of the matrices, whose rows and columns are numbered by their leaves."""

    @abstractmethod
    def _move(self, parameters: Parameters, index: str, u: Tensor, matrix: Tensor) -> Tensor:
        """The matrix `[r, c]` of one leaf in answer to u."""


@final
@dataclass(frozen=True)
class RowScaled(_LayerNetwork):
    r"""Each row of each layer grows or shrinks with the hyperparameters; a bias moves freely.

    $$
    W(x) = W_0 + \operatorname{diag}(\sqrt c A u)\, W_0, \qquad b(x) = b_0 + B u, \qquad u = (x - x_0) / s
    $$

    for a matrix of c columns: one number for each row and hyperparameter. It is the hyper-row of self-tuning networks
    with the weights themselves as the direction, so that there is no second set of weights to keep. √c puts the
    factors in units of a weight's usual size, so that one learning rate serves both.

    It cannot turn a row, and a row of zeros does not move. Costs one pass over the weights forwards and one backwards.
    Source: MacKay et al. 2019 (arXiv 1903.03088); centred as in Bae and Grosse 2020 (arXiv 2010.13514).

    Examples:
        >>> shapes = [torch.Size([3, 2]), torch.Size([3])]
        >>> {name: tuple(p.shape) for name, p in RowScaled().parameters(10, shapes).items()}
        {'free.1': (3, 10), 'rows.0': (3, 10)}
    """

    def _start(self, inputs: int, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        return {f"rows.{i}": torch.zeros(r, inputs) for i, (r, _) in sizes.items()}

    def _move(self, parameters: Parameters, index: str, u: Tensor, matrix: Tensor) -> Tensor:
        factors = (parameters[f"rows.{index}"] @ u) * matrix.shape[1] ** 0.5
        return _RowScale.apply(matrix, matrix, factors)  # type: ignore[no-any-return, no-untyped-call]


@final
@dataclass(frozen=True)
class RowColumnScaled(_LayerNetwork):
    r"""Rows and columns of each layer grow or shrink with the hyperparameters; a bias moves freely.

    $$
    W(x)_{ij} = W_{0,ij} \big(1 + \sqrt c\,(A u)_i + \sqrt r\,(B u)_j\big), \qquad b(x) = b_0 + C u
    $$

    for a matrix of r rows and c columns. A decay acts along the inputs' directions, which are columns: where the inputs
    differ in size this answers what `RowScaled` cannot, for one more pass over the weights.
    """

    def _start(self, inputs: int, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        rows = {f"rows.{i}": torch.zeros(r, inputs) for i, (r, _) in sizes.items()}
        return rows | {f"columns.{i}": torch.zeros(c, inputs) for i, (_, c) in sizes.items()}

    def _move(self, parameters: Parameters, index: str, u: Tensor, matrix: Tensor) -> Tensor:
        rows = (parameters[f"rows.{index}"] @ u) * matrix.shape[1] ** 0.5
        columns = (parameters[f"columns.{index}"] @ u) * matrix.shape[0] ** 0.5
        return _RowColumnScale.apply(matrix, rows, columns)  # type: ignore[no-any-return, no-untyped-call]


@final
@dataclass(frozen=True)
class SelfTuning(_LayerNetwork):
    r"""The layer of self-tuning networks: rows of a second set of weights, added by as much as the hyperparameters say.

    $$
    W(x) = W_0 + \operatorname{diag}(A u)\, W', \qquad b(x) = b_0 + B u
    $$

    A row can turn, towards its row of W', alike for all hyperparameters. It has as many parameters as the follower and
    doubles the memory; all of W' is learned, from random numbers of size one.
    Source: MacKay et al. 2019 (arXiv 1903.03088), with one draw of the hyperparameters a batch.
    """

    def _start(self, inputs: int, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        rows = {f"rows.{i}": torch.zeros(r, inputs) for i, (r, _) in sizes.items()}
        return rows | {f"directions.{i}": torch.randn(r, c) for i, (r, c) in sizes.items()}

    def _move(self, parameters: Parameters, index: str, u: Tensor, matrix: Tensor) -> Tensor:
        factors = parameters[f"rows.{index}"] @ u
        return _RowScale.apply(matrix, parameters[f"directions.{index}"], factors)  # type: ignore[no-any-return, no-untyped-call]


@final
@dataclass(frozen=True)
class LowRankLayers(_LayerNetwork):
    r"""Each layer moves by a matrix of low rank; a bias moves freely.

    $$
    W(x) = W_0 + P \operatorname{diag}(S u)\, Q^\top, \qquad b(x) = b_0 + B u,
    $$

    P `[r, k]`, S `[k, inputs]`, Q `[c, k]` for a matrix of r rows and c columns and rank k: a Kronecker-like slope of
    (r + c + inputs) k numbers that does not depend on the weights. P starts at zero. Costs four products of a layer
    with k vectors. Raises `ValueError` for a rank below 1.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.rank < 1:
            raise ValueError(f"LowRankLayers: rank={self.rank}; expected at least 1.")

    def _start(self, inputs: int, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        left = {f"left.{i}": torch.zeros(r, self.rank) for i, (r, _) in sizes.items()}
        middle = {f"middle.{i}": torch.randn(self.rank, inputs) / self.rank**0.5 for i in sizes}
        return left | middle | {f"right.{i}": torch.randn(c, self.rank) for i, (_, c) in sizes.items()}

    def _move(self, parameters: Parameters, index: str, u: Tensor, matrix: Tensor) -> Tensor:
        scaled = parameters[f"left.{index}"] * (parameters[f"middle.{index}"] @ u)
        return torch.addmm(matrix, scaled, parameters[f"right.{index}"].T)


class _RowScale(torch.autograd.Function):
    """matrix + diag(factors) direction; the slope of the factors needs no other matrix.

    torch's own derivative of the same expression writes two, for each layer and step.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, direction: Tensor, factors: Tensor) -> Tensor:
        return torch.addcmul(matrix, factors[:, None], direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, direction, factors = inputs
        ctx.save_for_backward(direction, factors)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        direction, factors = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        pairs = zip(torch.split(slope, _BLOCK), torch.split(direction, _BLOCK), strict=True)
        return (
            slope if wanted[0] else None,
            slope * factors[:, None] if wanted[1] else None,
            torch.cat([(a * b).sum(1) for a, b in pairs]) if wanted[2] else None,
        )


class _RowColumnScale(torch.autograd.Function):
    """matrix * (1 + rows 1ᵀ + 1 columnsᵀ), differentiable in rows and columns alone, in one pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return torch.addcmul(torch.addcmul(matrix, rows[:, None], matrix), columns, matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        by_row, by_column = [], slope.new_zeros(matrix.shape[1])
        for a, b in zip(torch.split(slope, _BLOCK), torch.split(matrix, _BLOCK), strict=True):
            product = a * b
            by_row.append(product.sum(1))
            by_column = by_column + product.sum(0)
        return None, torch.cat(by_row), by_column
