"""Networks that know the follower's leaves and move each layer by itself: 10 million weights, a few thousand numbers.

A dense map from m hyperparameters to n weights has m n parameters, and as many gradients and twice as many optimiser's
numbers. What hyperparameters do to a layer is mostly simpler: its rows, its columns, or a few directions of it answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

_BLOCK = 64
"""Rows that are multiplied at once: their products stay in the processor's cache."""


class LeafNetwork(ABC):
    """How each leaf of the follower's variables is moved, as configuration; the numbers are a module's parameters.

    `build(inputs, shapes)` returns a module whose `forward(u, w0)` takes a displacement of the others' variables
    `u: [inputs]`, of norm about one, and the leaves of w0, of these shapes, and returns the leaves of the answer: w0 at
    u = 0, and before any fitting w0 at every u. It may be called under `torch.func` transforms. The leaves arrive
    without a graph: the follower's own gradient is taken where the answer is, with the slope held.

    A leaf of two dimensions or more is a matrix: its first dimension numbers the rows, all others together the columns,
    as in `Linear` and convolutions. A vector or a scalar (a bias) has one row for each entry.
    """

    @abstractmethod
    def build(self, inputs: int, shapes: Sequence[torch.Size]) -> nn.Module:
        """The module, with its own initial numbers from torch's global generator."""


@final
@dataclass(frozen=True)
class RowScaled(LeafNetwork):
    """Each row of each layer grows or shrinks with the hyperparameters; a bias moves freely.

        W(x) = W0 + diag(√c A u) W0,    b(x) = b0 + B u,    u = (x - x0) / s

    for a matrix of c columns: one number for each row and hyperparameter. It is the hyper-row of self-tuning networks
    with the weights themselves as the direction, so that there is no second set of weights to keep. √c puts the
    factors in units of a weight's usual size, so that one learning rate serves both.

    It cannot turn a row, and a row of zeros does not move. Costs one pass over the weights forwards and one backwards.
    Source: MacKay et al. 2019 (arXiv 1903.03088); centred as in Bae and Grosse 2020 (arXiv 2010.13514).

    >>> shapes = [torch.Size([3, 2]), torch.Size([3])]
    >>> sum(p.numel() for p in RowScaled().build(10, shapes).parameters())  # 3 x 10 for the rows, 3 x 10 for the bias
    60
    """

    def build(self, inputs: int, shapes: Sequence[torch.Size]) -> nn.Module:
        """The module."""
        return _Rows(inputs, shapes)


@final
@dataclass(frozen=True)
class RowColumnScaled(LeafNetwork):
    """Rows and columns of each layer grow or shrink with the hyperparameters; a bias moves freely.

        W(x)_ij = W0_ij (1 + √c (A u)_i + √r (B u)_j),    b(x) = b0 + B u

    for a matrix of r rows and c columns. A decay acts along the inputs' directions, which are columns: where the inputs
    differ in size this answers what `RowScaled` cannot, for one more pass over the weights.
    """

    def build(self, inputs: int, shapes: Sequence[torch.Size]) -> nn.Module:
        """The module."""
        return _RowsAndColumns(inputs, shapes)


@final
@dataclass(frozen=True)
class SelfTuning(LeafNetwork):
    """The layer of self-tuning networks: rows of a second set of weights, added by as much as the hyperparameters say.

        W(x) = W0 + diag(A u) W',    b(x) = b0 + B u

    A row can turn, towards its row of W', alike for all hyperparameters. It has as many parameters as the follower and
    doubles the memory; all of W' is learned, from random numbers of size one.
    Source: MacKay et al. 2019 (arXiv 1903.03088), with one draw of the hyperparameters a batch.
    """

    def build(self, inputs: int, shapes: Sequence[torch.Size]) -> nn.Module:
        """The module."""
        return _SecondWeights(inputs, shapes)


@final
@dataclass(frozen=True)
class LowRankLayers(LeafNetwork):
    """Each layer moves by a matrix of low rank; a bias moves freely.

        W(x) = W0 + P diag(S u) Qᵀ,    P: [r, k], S: [k, inputs], Q: [c, k],    b(x) = b0 + B u

    for a matrix of r rows and c columns and rank k: a Kronecker-like slope of (r + c + inputs) k numbers that does not
    depend on the weights. P starts at zero. Costs four products of a layer with k vectors. Raises `ValueError` for
    a rank below 1.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LowRankLayers: rank={self.rank}; expected at least 1.")

    def build(self, inputs: int, shapes: Sequence[torch.Size]) -> nn.Module:
        """The module."""
        return _Factors(inputs, shapes, self.rank)


class _Layers(nn.Module):
    """Vectors answer by a dense slope of their own, zero at the start; what matrices do is the subclass's."""

    def __init__(self, inputs: int, shapes: Sequence[torch.Size]) -> None:
        super().__init__()
        self.matrices = [(shape[0], shape[1:].numel()) for shape in shapes if len(shape) > 1]
        self.free = nn.ParameterList(torch.zeros(shape.numel(), inputs) for shape in shapes if len(shape) < 2)

    def forward(self, u: Tensor, w0: Sequence[Tensor]) -> list[Tensor]:
        free, index, moved = iter(self.free), 0, []
        for leaf in w0:
            if leaf.ndim < 2:
                moved.append(leaf + (next(free) @ u).reshape(leaf.shape))
            else:
                moved.append(self.layer(index, leaf.flatten(1), u).reshape(leaf.shape))
                index += 1
        return moved

    def layer(self, index: int, matrix: Tensor, u: Tensor) -> Tensor:
        """The matrix `[r, c]`, the follower's `index`-th, in answer to u."""
        raise NotImplementedError


class _Rows(_Layers):
    def __init__(self, inputs: int, shapes: Sequence[torch.Size]) -> None:
        super().__init__(inputs, shapes)
        self.rows = nn.ParameterList(torch.zeros(r, inputs) for r, _ in self.matrices)

    def layer(self, index: int, matrix: Tensor, u: Tensor) -> Tensor:
        factors = (self.rows[index] @ u) * matrix.shape[1] ** 0.5
        return _RowScale.apply(matrix, matrix, factors)  # type: ignore[no-any-return, no-untyped-call]


class _RowsAndColumns(_Layers):
    def __init__(self, inputs: int, shapes: Sequence[torch.Size]) -> None:
        super().__init__(inputs, shapes)
        self.rows = nn.ParameterList(torch.zeros(r, inputs) for r, _ in self.matrices)
        self.columns = nn.ParameterList(torch.zeros(c, inputs) for _, c in self.matrices)

    def layer(self, index: int, matrix: Tensor, u: Tensor) -> Tensor:
        rows = (self.rows[index] @ u) * matrix.shape[1] ** 0.5
        columns = (self.columns[index] @ u) * matrix.shape[0] ** 0.5
        return _RowColumnScale.apply(matrix, rows, columns)  # type: ignore[no-any-return, no-untyped-call]


class _SecondWeights(_Layers):
    def __init__(self, inputs: int, shapes: Sequence[torch.Size]) -> None:
        super().__init__(inputs, shapes)
        self.rows = nn.ParameterList(torch.zeros(r, inputs) for r, _ in self.matrices)
        self.directions = nn.ParameterList(torch.randn(r, c) for r, c in self.matrices)

    def layer(self, index: int, matrix: Tensor, u: Tensor) -> Tensor:
        return _RowScale.apply(matrix, self.directions[index], self.rows[index] @ u)  # type: ignore[no-any-return, no-untyped-call]


class _Factors(_Layers):
    def __init__(self, inputs: int, shapes: Sequence[torch.Size], rank: int) -> None:
        super().__init__(inputs, shapes)
        self.left = nn.ParameterList(torch.zeros(r, rank) for r, _ in self.matrices)
        self.middle = nn.ParameterList(torch.randn(rank, inputs) / rank**0.5 for _ in self.matrices)
        self.right = nn.ParameterList(torch.randn(c, rank) for _, c in self.matrices)

    def layer(self, index: int, matrix: Tensor, u: Tensor) -> Tensor:
        return torch.addmm(matrix, self.left[index] * (self.middle[index] @ u), self.right[index].T)


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
