"""A preconditioner for layers: one block for each unit, alike within a layer, from a few products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel.autodiff import concrete
from bilevel.errors import NonFiniteError, require_kinds
from bilevel.linear.gaussian import gaussian
from bilevel.linear.norms import norm
from bilevel.linear.operator import LinearOperator, Shapes, entries
from bilevel.linear.preconditioner import Applied, Preconditioner
from bilevel.linear.system import Memory

_COLUMNS = 4  # a direction; of fewer the least of the eigenvalues that are told apart would be noise


@final
@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(Preconditioner):
    r"""Blocks for the units of each layer, alike within a layer: what a network's layers share is their inputs.

    $$
    M = \operatorname{diag}(C_1 \otimes I, C_2 \otimes I, \dots), \qquad C_j^2 = \mathbb E[y y^\top]
    $$

    Here y is any column of leaf j of $A v$, for random signs $v_i = \pm 1$. A leaf is a matrix, its first dimension
    against the others, whichever is longer being the rows; each column is a unit with a block C of its own, `[rows,
    rows]`, and all columns of a product are samples of it. A leaf with one dimension, a bias, has its diagonal. The
    root of a second moment, C is positive definite whatever A is.

    For layers of neurons and for matrices of correlated inputs. It does not pay for penalties of a weight each
    (`Diagonal()`), for a softmax regression, or for narrow leaves, whose few columns tell little. Memory `probes` n, or
    4 rank columns a leaf if that is less; 4 n rank work each step. Source: one of the Kronecker factors of Martens &
    Grosse (arXiv 1503.05671), as a root like Shampoo's (arXiv 1802.09568).

    Args:
        shapes: Those of the follower's leaves, in their order, where the operator does not bring them: `Implicit`'s and
            `root`'s do.
        rank: Eigenvectors on which C is known, a quarter as many as there were columns; elsewhere it is the least of
            their eigenvalues.
        probes: Products spent before the first system.
        refresh: Products spent before each later one.
        forgetting: So much of what a product weighs is left a system later.
        seed: Of the signs.

    Raises:
        ValueError: If nobody gives shapes, or they do not have n entries.
        NonFiniteError: For NaN in products.

    Examples:
        >>> scales = torch.logspace(0, 3, 8, dtype=torch.float64)[:, None]
        >>> operator = LinearOperator(lambda v: (scales * v.view(8, 4)).flatten(), True, shapes=[(8, 4)])
        >>> blocks, r = BlockDiagonal(probes=100), torch.ones(32, dtype=torch.float64)
        >>> apply, memory = blocks.prepare(operator, blocks.init(r, operator.shapes))
        >>> float((operator.matvec(apply(r)) - r).abs().max()) < 0.1
        True
    """

    shapes: Shapes | None = None
    rank: int = 32
    probes: int = 4
    refresh: int = 1
    forgetting: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        empty = self.shapes is not None and not self.shapes
        if self.rank < 1 or self.probes < 1 or self.refresh < 0 or not 0.0 <= self.forgetting <= 1.0 or empty:
            raise ValueError(
                f"{self}: expected shapes of one leaf or more, rank and probes of at least 1, refresh of at least "
                "0, and forgetting between 0 and 1."
            )

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """By leaf a sketch `[rows, width]` or squares `[n]`; how much the products weigh; how many systems there were.

        sketch sketch' is the second moment; its columns are orthogonal, longest first.
        """
        layout = self._layout(shapes)
        if entries(layout) != like.numel():
            raise ValueError(
                f"BlockDiagonal was given shapes={[tuple(shape) for shape in layout]}, which have {entries(layout)} "
                f"entries; the system has {like.numel()} unknowns. Give the shape of each of the follower's leaves, in "
                "their order."
            )
        leaves = self._leaves(layout)
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        blank = {str(j): like.new_zeros(leaf.kept(self.probes)) for j, leaf in enumerate(leaves)}
        systems = torch.zeros((), dtype=torch.int64)
        return blank | {"weight": zero.clone(), "weight_squares": zero.clone(), "systems": systems}

    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """C^-1 for each column."""
        leaves, systems = self._leaves(self._layout(operator.shapes)), int(memory["systems"])
        like = torch.cat([memory[str(j)].reshape(-1)[:1] for j in range(len(leaves))])[0]
        count = self.refresh if systems else self.probes
        memory = memory | {"systems": memory["systems"] + 1}
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

        return apply, memory

    def _layout(self, shapes: Shapes | None) -> Shapes:
        """Its own if it was given one, else the system's."""
        known = shapes if self.shapes is None else self.shapes
        if known is None:
            raise ValueError(
                "BlockDiagonal does not know the layout of the unknowns. Inside Implicit and root the system brings "
                "it; by hand give LinearOperator(..., shapes=[p.shape for p in model.parameters()])."
            )
        return known

    def _leaves(self, layout: Shapes) -> list[_Diagonal | _Alike]:
        return [
            _Alike(shape[0], math.prod(shape[1:]), self.rank) if len(shape) > 1 else _Diagonal(math.prod(shape))
            for shape in layout
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
