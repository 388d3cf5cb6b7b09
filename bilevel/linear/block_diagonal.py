"""A preconditioner for layers: one block for each unit, alike within a layer, from a few products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.autodiff import concrete
from bilevel.errors import NonFiniteError
from bilevel.linear.base import LinearOperator, norm
from bilevel.linear.gaussian import gaussian
from bilevel.linear.preconditioner import Applied, Memory, Preconditioner

_COLUMNS = 4  # a direction; of fewer the least of the eigenvalues that are told apart would be noise


@final
@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(Preconditioner):
    r"""Blocks for the units of each layer, alike within a layer: what a network's layers share is their inputs.

        M = diag(C_1 x I, C_2 x I, ...),    C_j^2 = E[y y'],  y any column of leaf j of A v,  v_i = +-1

    `shapes` are those of the follower's leaves, in their order: `[p.shape for p in model.parameters()]`. A leaf is a
    matrix `[rows, columns]`, its first dimension against the others, whichever is longer being the rows; each column
    is a unit with a block C of its own, `[rows, rows]`, and all columns of a product are samples of it: a layer of 16
    units has 16 of them in one product. A leaf with one dimension, a bias, has its diagonal. C is known on up to `rank`
    eigenvectors, a quarter as many as there were columns, and is the least of their eigenvalues elsewhere. The root
    of a second moment, it is positive definite whatever A is.

    `probes` products are spent before the first system, `refresh` before each later one; old ones count `forgetting`
    times as much per system. Memory `probes` n, or 4 rank columns a leaf if that is less; 4 n rank work each step of
    the solver.

    For layers of neurons and for matrices of correlated inputs: on a network of 12,730 weights four products take
    conjugate gradients from 176 iterations to 75. It does not pay for penalties of a weight each, which no two columns
    share (`Diagonal()`); little for a softmax regression, whose outputs are coupled; nor for narrow leaves, whose few
    columns tell little. Raises `ValueError` where the shapes do not have n entries, `NonFiniteError` for NaN in
    products. Source: the blocks are Kronecker factors as in Martens & Grosse, arXiv 1503.05671, of which only one is
    kept; the root of a second moment is Shampoo's, arXiv 1802.09568.

    >>> scales = torch.logspace(0, 3, 8, dtype=torch.float64)[:, None]
    >>> operator = LinearOperator(lambda v: (scales * v.view(8, 4)).flatten(), symmetric=True)
    >>> blocks, r = BlockDiagonal(shapes=[(8, 4)], probes=100), torch.ones(32, dtype=torch.float64)
    >>> float((operator.matvec(blocks.prepare(operator, blocks.init(r))(r)) - r).abs().max()) < 0.1
    True
    """

    shapes: Sequence[Sequence[int]]
    rank: int = 32
    probes: int = 4
    refresh: int = 1
    forgetting: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.rank < 1 or self.probes < 1 or self.refresh < 0 or not 0.0 <= self.forgetting <= 1.0 or not self.shapes:
            raise ValueError(
                f"{self}: expected shapes of one leaf or more, rank and probes of at least 1, refresh of at least "
                "0, and forgetting between 0 and 1."
            )

    def init(self, like: Tensor) -> Memory:
        """By leaf a sketch `[rows, width]` or squares `[n]`; how much the products weigh; how many systems there were.

        sketch sketch' is the second moment; its columns are orthogonal, longest first.
        """
        leaves = self._leaves()
        if sum(leaf.size for leaf in leaves) != like.numel():
            raise ValueError(
                f"BlockDiagonal was given shapes={[tuple(shape) for shape in self.shapes]}, which have "
                f"{sum(leaf.size for leaf in leaves)} entries; the system has {like.numel()} unknowns. Give the shape "
                "of each of the follower's leaves, in their order."
            )
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        blank = {str(j): like.new_zeros(leaf.kept(self.probes)) for j, leaf in enumerate(leaves)}
        systems = torch.zeros((), dtype=torch.int64)
        return blank | {"weight": zero.clone(), "weight_squares": zero.clone(), "systems": systems}

    def prepare(self, operator: LinearOperator, memory: Memory) -> Applied:
        """C^-1 for each column."""
        leaves, systems = self._leaves(), int(memory["systems"])
        like = torch.cat([memory[str(j)].reshape(-1)[:1] for j in range(len(leaves))])[0]
        count = self.refresh if systems else self.probes
        memory["systems"] += 1
        if count:
            size = (sum(leaf.size for leaf in leaves),)
            signs = [torch.sign(gaussian(size, like, self.seed + 7919 * systems + number)) for number in range(count)]
            seen = torch.stack([operator.matvec(v) for v in signs], dim=1)
            if not math.isfinite(concrete(norm(seen.flatten()))):
                raise NonFiniteError(f"BlockDiagonal met NaN or infinite entries in {count} products with A.")
            old = self.forgetting * memory["weight"]
            memory["weight"] = old + count
            memory["weight_squares"] = self.forgetting**2 * memory["weight_squares"] + count
            share, parts = float(old / memory["weight"]), torch.split(seen, [leaf.size for leaf in leaves])
            for j, (leaf, part) in enumerate(zip(leaves, parts, strict=True)):
                memory[str(j)] = leaf.updated(memory[str(j)], part, share)
        effective = float(memory["weight"].square() / memory["weight_squares"])
        inverses = [leaf.inverse(memory[str(j)], effective) for j, leaf in enumerate(leaves)]

        def apply(r: Tensor) -> Tensor:
            parts = torch.split(r, [leaf.size for leaf in leaves])
            return torch.cat([inverse(part) for inverse, part in zip(inverses, parts, strict=True)])

        return apply

    def _leaves(self) -> list[_Diagonal | _Alike]:
        return [
            _Alike(shape[0], math.prod(shape[1:]), self.rank) if len(shape) > 1 else _Diagonal(math.prod(shape))
            for shape in self.shapes
        ]


@dataclass(frozen=True)
class _Diagonal:
    """A leaf of one dimension: the squares of A v, whose mean is that of its rows of A."""

    size: int

    def kept(self, probes: int) -> tuple[int, ...]:
        return (self.size,)

    def updated(self, squares: Tensor, seen: Tensor, share: float) -> Tensor:
        """The mean with columns of products `seen: [size, count]`; `share` is what the old ones weigh."""
        return share * squares + (1.0 - share) * seen.square().mean(1)

    def inverse(self, squares: Tensor, effective: float) -> Applied:
        diagonal = _positive(squares.sqrt(), squares.amax().sqrt())
        return lambda r: r / diagonal


@dataclass(frozen=True)
class _Alike:
    """A leaf of more: one block for all of its columns."""

    first: int
    others: int
    rank: int

    @property
    def size(self) -> int:
        return self.first * self.others

    @property
    def rows(self) -> int:
        return max(self.first, self.others)

    @property
    def columns(self) -> int:
        return min(self.first, self.others)

    def kept(self, probes: int) -> tuple[int, ...]:
        return self.rows, min(self.rows, probes * self.columns, _COLUMNS * self.rank)

    def matrix(self, part: Tensor) -> Tensor:
        """`[size]` or `[size, count]` as `[rows, columns]` or `[rows, columns * count]`."""
        whole = part.reshape(self.first, self.others, -1)
        return (whole if self.first >= self.others else whole.transpose(0, 1)).reshape(self.rows, -1)

    def updated(self, sketch: Tensor, seen: Tensor, share: float) -> Tensor:
        """The sketch with columns of products `seen: [size, count]`; `share` is what the old ones weigh."""
        fresh = self._fewer(self.matrix(seen))
        columns = torch.cat(
            [share**0.5 * sketch, ((1.0 - share) / (self.columns * seen.shape[1])) ** 0.5 * fresh], dim=1
        )
        # By the smaller of the two Gram matrices: the squares lose only what is far below the least that is used.
        width = sketch.shape[1]
        if columns.shape[1] <= self.rows:
            turned: Tensor = torch.linalg.eigh(columns.mT @ columns).eigenvectors.flip(-1)
            return columns @ turned[:, :width]
        values, vectors = torch.linalg.eigh(columns @ columns.mT)
        longest: Tensor = (vectors * values.clamp(min=0.0).sqrt()).flip(-1)
        return longest[:, :width]

    def _fewer(self, columns: Tensor) -> Tensor:
        """Sums with random signs, of which E[y y'] is the same, where there are more columns than it takes."""
        most, count = _COLUMNS * self.rank, columns.shape[1]
        if min(count, self.rows) <= most:
            return columns
        signs = torch.sign(gaussian((count,), columns, 0))
        summed: Tensor = pad(columns * signs, (0, -count % most)).reshape(self.rows, -1, most).sum(1)
        return summed

    def inverse(self, sketch: Tensor, effective: float) -> Applied:
        seen = min(self.columns * effective, _COLUMNS * self.rank)
        known = max(1, min(sketch.shape[1], int(seen / _COLUMNS)))
        vectors, upper = torch.linalg.qr(sketch[:, :known])
        lengths = upper.diagonal(dim1=-2, dim2=-1).abs()
        # Of orthogonal columns, longest first; rounding may swap the last.
        values = _positive(lengths, lengths.amax())
        least = values.amin()
        inside = (least / values - 1.0)[:, None]

        def apply(r: Tensor) -> Tensor:
            unit = self.matrix(r)
            found = (unit + vectors @ (inside * (vectors.mT @ unit))) / least
            flat: Tensor = (found if self.first >= self.others else found.mT).reshape(-1)
            return flat

        return apply


def _positive(values: Tensor, largest: Tensor) -> Tensor:
    """The values, raised to where rounding ends; ones where all of them are 0."""
    limits = torch.finfo(values.dtype)
    return torch.where(largest > 0.0, torch.maximum(values, limits.eps * largest).clamp(min=limits.tiny), 1.0)
