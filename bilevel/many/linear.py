"""One solver for many independent systems at once, each with its own scalars and its own end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import BilevelError, LinearNonConvergenceWarning
from bilevel.linear import LinearOperator, LinearSolution, LinearSolver, Memory
from bilevel.linear.operator import Shapes
from bilevel.many.numbering import told_of
from bilevel.tree import join


@final
@dataclass(frozen=True, kw_only=True)
class BatchedLinearSolver:
    """Solves a block-diagonal system, one block a game, by running `solver` on all blocks at once under vmap.

        A = diag(A_1, ..., A_count),    A v is one product for all blocks together

    Vectors `[count n]` are those of variables with leaves `[count, ...]`, leaf after leaf; `widths` are the leaves'
    sizes in one game; `noun` is what messages call one, and `offset` the number of the first. Each block ends where
    `solver` would end it alone: its step lengths are its own, and one that is done stands still. The solution's
    `memory` is the blocks' relative residuals `[count]`. Preconditioners start afresh with each system. An error names
    the first game that raises it by itself.

    Costs the products of the block that takes the most.
    """

    solver: LinearSolver
    count: int
    widths: tuple[int, ...] = field(repr=False)
    noun: str = field(default="game", repr=False)
    offset: int = field(default=0, repr=False)

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """The relative residual of each block in the last system."""
        return {"residuals": like.new_full((self.count,), torch.nan)}

    @property
    def from_optimizer(self) -> bool:
        """No: preconditioners start afresh."""
        return False

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """It takes no note."""
        return memory

    def solve(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        initial: Tensor | None = None,
        *,
        memory: Mapping[str, Tensor] | None = None,
    ) -> LinearSolution:
        """u `[count n]` with A u = rhs."""
        rows, start = self._rows(rhs), None if initial is None else self._rows(initial)
        try:
            found, norms, wanted, beats_zero, products = self._all(operator, rows, start)
        except BilevelError as error:
            raise type(error)(
                f"{self.noun.capitalize()} {self.offset + self._first_wrong(operator, rows, type(error))}: {error}"
            ) from error
        sizes = torch.linalg.vector_norm(rows, dim=1)
        relative = torch.where(sizes > 0.0, norms / sizes, norms)
        missed = norms > wanted
        if self.solver.rtol is not None and bool(missed.any()):
            worst = int(torch.where(missed, relative, -1.0).argmax())
            told = (
                f"{type(self.solver).__name__} stopped after {products} products short of its tolerance in "
                f"{int(missed.sum())} of {self._told}, the worst being {self.noun} {self.offset + worst} with "
                f"a residual of {float(norms[worst]):.3g} (|b| = {float(sizes[worst]):.3g}); wanted "
                f"max({self.solver.rtol:g} |b|, {self.solver.atol:g}). Give it more steps, more damping, or a larger "
                "rtol."
            )
            warnings.warn(LinearNonConvergenceWarning(told, games=self._numbers(missed)), stacklevel=2)
        elif not bool(beats_zero.all()):
            worst = int(torch.where(beats_zero, -1.0, relative).argmax())
            told = (
                f"{type(self.solver).__name__} answered after {products} products no better than by 0 in "
                f"{int((~beats_zero).sum())} of {self._told}, the worst being {self.noun} {self.offset + worst} with "
                f"a residual of {float(relative[worst]):.3g} |b|; the answer 0 has |b|. Give it {self.solver.remedy}, "
                "more damping, or use another solver."
            )
            warnings.warn(LinearNonConvergenceWarning(told, games=self._numbers(~beats_zero)), stacklevel=2)
        whole = torch.linalg.vector_norm(norms)
        learned = {} if memory is None else {"residuals": relative}
        return LinearSolution(self._flat(found), whole, products, not bool(missed.any()), memory=learned)

    @property
    def _told(self) -> str:
        return told_of(self.count, self.noun, self.offset)

    def _numbers(self, chosen: Tensor) -> list[int]:
        found: list[int] = (chosen.nonzero().flatten() + self.offset).tolist()
        return found

    def _all(
        self, operator: LinearOperator, rows: Tensor, start: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Solutions `[count, n]`, residual norms, tolerances and whether they beat 0 `[count]`, and the products.

        Where `mask: [count]` is False, the block is the identity.
        """
        taken = 0
        shapes = None if operator.shapes is None else [shape[1:] for shape in operator.shapes]

        def product(vectors: Tensor) -> Tensor:
            result = self._rows(operator.matvec(self._flat(vectors)))
            return result if mask is None else torch.where(mask[:, None], result, vectors)

        def one(rhs: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            nonlocal taken
            single = LinearOperator(
                lambda v: _Product.apply(v, rhs, product),  # type: ignore[no-untyped-call]
                operator.symmetric,
                shapes=shapes,
            )
            found = self.solver.solve(single, rhs, start)
            taken = found.products
            return found.solution, found.residual_norm, self.solver.tolerance(rhs), found.beats_zero

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LinearNonConvergenceWarning)  # told by the caller, with the game's number
            dims = (0, None if start is None else 0)
            solutions, norms, wanted, beats_zero = torch.func.vmap(one, in_dims=dims)(rows, start)
        return solutions, norms, wanted, beats_zero, taken

    def _first_wrong(self, operator: LinearOperator, rows: Tensor, kind: type[BilevelError]) -> int:
        """The first block that raises by itself, by halving: log2(count) solves, in case of an error only."""
        low, high = 0, self.count
        places = torch.arange(self.count, device=rows.device)
        while high - low > 1:
            middle = (low + high) // 2
            mask = (places >= low) & (places < middle)
            try:
                self._all(operator, torch.where(mask[:, None], rows, 0.0), None, mask)
            except kind:
                high = middle
            else:
                low = middle
        return low

    def _rows(self, vector: Tensor) -> Tensor:
        """`[count n]`, leaf after leaf, to `[count, n]`, game after game."""
        if len(self.widths) == 1:
            return vector.reshape(self.count, -1)
        parts = torch.split(vector, [self.count * width for width in self.widths])
        return torch.cat([part.reshape(self.count, -1) for part in parts], dim=1)

    def _flat(self, rows: Tensor) -> Tensor:
        """`[count, n]` to `[count n]`."""
        return join(torch.split(rows, list(self.widths), dim=1))


class _Product(torch.autograd.Function):
    """A product with all blocks, called with one block's vector under vmap.

    The graph that products are taken from is kept outside vmap, which cannot enter it; so they leave vmap for it.
    `like` varies from block to block: it brings the rule below to bear on a vector that does not.
    """

    @staticmethod
    def forward(vector: Tensor, like: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        raise AssertionError("one block has no product by itself")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        raise AssertionError("products in a solve are not differentiated; root attaches the solve's derivatives")

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], vector: Tensor, like: Tensor, product: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, int]:
        dim = in_dims[0]
        return product(vector.expand(info.batch_size, *vector.shape) if dim is None else vector.movedim(dim, 0)), 0
