"""Which of a follower's batches an implicit derivative is of: the last one, a new one a product, or all of them."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel._root import Products
from bilevel.autodiff import EVERY, Pullback, pullback
from bilevel.errors import require_kinds
from bilevel.game import Follower, Game, HeldResidual
from bilevel.game.data import Batch, Position
from bilevel.game.residual import Kinks
from bilevel.game.situation import GameOfLosses
from bilevel.linear import LinearOperator, LinearSolution, LinearSolver
from bilevel.linear.base import SolvesLinearSystems
from bilevel.tree import join

Judge = Callable[[LinearSolution, Tensor, Sequence[Tensor], Pullback], tuple[float, int, str]]
"""From a backward solve, its right-hand side, its mixed products and what made them: error, products, warning."""


Pull = Callable[[HeldResidual, Tensor, Sequence[Tensor], Sequence[int]], Pullback]
"""Makes the products of one batch, at y `[n]` and for the wanted of the others' leaves."""


class FixedResidual(Protocol):
    """F(y, *xs) for ever on the same batches, buffers and random numbers."""

    @property
    def loss(self) -> float:
        """The loss at the last call."""

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """F there."""

    def kinks(self, y: Tensor, *xs: Tensor) -> Kinks:
        """Where F has no derivative at y `[n]`, as far as is known."""


class Batches(ABC):
    """Which batches an `Implicit` response's linear solve and mixed product see; a configuration without state.

    The follower's own steps take a new batch each, whatever this is. A batch that is given to the call is all there is,
    and so is a loss without data.
    """

    def require(self, game: Game, start: Follower, linear_solver: LinearSolver) -> None:  # noqa: B027
        """Raise, before any work, for a game or a solver that this does not suit."""

    @abstractmethod
    def residual(self, follower: Follower, state: Mapping[str, Any]) -> FixedResidual:
        """F as the answer is judged by it; `state` is the one that the call was given."""

    @abstractmethod
    def products(self, follower: Follower, residual: FixedResidual, pull: Pull | None) -> Products | None:
        """What makes the products of the derivative; None: one graph of `residual`.

        `pull` makes those of one batch, where they are not F's own.
        """

    def judge(
        self, follower: Follower, residual: FixedResidual, y: Tensor, solver: SolvesLinearSystems
    ) -> Judge | None:
        """What tells a backward solve's error at y `[n]` by other batches; None where none is asked."""
        return None


@final
@dataclass(frozen=True)
class HeldBatch(Batches):
    """The last batch of the follower's steps, for every product: one fixed matrix, which any solver takes.

    The answer is the derivative of the optimum of that batch. What this leaves out is told where `against` other
    batches, the next ones, are asked: with u the held batch's adjoint, and the mean left of their equations,
    r = c - mean(A_i u), one solve with the held matrix for r and their mean mixed product correct the indirect part of
    the hypergradient. The report's `error` is how much of it the correction is; the leader's batch is another matter.

    Args:
        against: So many other batches are asked, at a product each and one more solve; 0: none, and nothing is told.
        tolerance: Above this relative error it warns, if `against` any.
    """

    against: int = 0
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if not isinstance(self.against, int) or self.against < 0:
            raise ValueError(f"HeldBatch: against={self.against!r}; expected a number of batches, at least 0.")
        if not self.tolerance > 0.0:
            raise ValueError(f"HeldBatch: tolerance={self.tolerance}; expected a relative error above 0.")

    def require(self, game: Game, start: Follower, linear_solver: LinearSolver) -> None:
        """Others to be held against must exist, for one game and an unconstrained follower."""
        if self.against:
            _require_plain(self, game, start)

    def residual(self, follower: Follower, state: Mapping[str, Any]) -> FixedResidual:
        """On the last batch."""
        return follower.held_residual()

    def products(self, follower: Follower, residual: FixedResidual, pull: Pull | None) -> Products | None:
        """Of that."""
        return _of_one(residual, pull)

    def judge(
        self, follower: Follower, residual: FixedResidual, y: Tensor, solver: SolvesLinearSystems
    ) -> Judge | None:
        """By the next batches."""
        if not self.against or follower.fixed or follower.position is None:
            return None
        assert isinstance(residual, HeldResidual)
        others, place = [], follower.position
        for number in range(self.against):
            batch, place = follower.game.draw(follower.name, place)
            others.append(residual.on(batch, number + 1))
        mean = _MeanProducts(MeanResidual(others, [1.0 / self.against] * self.against), None)
        xs = [x.detach() for x in follower.xs]
        wanted = [index for index, x in enumerate(follower.xs) if x.requires_grad]

        def judged(
            found: LinearSolution, rhs: Tensor, mixed: Sequence[Tensor], products: Pullback
        ) -> tuple[float, int, str]:
            everywhere, u = mean.pull(y, xs, wanted), found.solution
            product, *theirs = everywhere(u)
            held = LinearOperator(
                lambda v: products(v, slice(1))[0], follower.symmetric, shapes=follower.unknowns.shapes
            )
            step = solver.solve(held, rhs - product)
            moved = everywhere(step.solution, slice(1, None))
            corrected = join([a + b for a, b in zip(theirs, moved, strict=True)])
            size = float(torch.linalg.vector_norm(corrected))
            change = float(torch.linalg.vector_norm(corrected - join(list(mixed))))
            error = change / size if size > 0.0 else change
            told = (
                f"{self.against} other batches correct the indirect part of the held batch's hypergradient by "
                f"{error:.0%}; HeldBatch allows {self.tolerance:.0%}. Use larger batches, AllBatches(), or "
                "FreshBatches() with Neumann(rtol=None)."
            )
            return error, step.products + 2 * self.against, told if error > self.tolerance else ""

        return judged


@final
@dataclass(frozen=True)
class FreshBatches(Batches):
    """A new batch for each product: no inverse of a single batch is taken, and the noise averages out.

    With batches that are drawn independently the hypergradient's mean, at the answer y, is that of all of the data
    after as many steps of the linear solver: StocBiO's and AmIGO's estimate. A pass without replacement draws nearly
    so.
    Suits `Neumann(rtol=None)` and `linear.StochasticGradient(...)`; who needs one matrix is refused by name. The
    report's `residual` is that of one more batch. First derivatives alone, outside torch.func.

    Reads as many batches a call as there are products; `after_backward` moves the state on to the ones after them.
    Source: arXiv 2010.07962 (StocBiO), arXiv 2111.14580 (AmIGO).
    """

    def require(self, game: Game, start: Follower, linear_solver: LinearSolver) -> None:
        """A solver that takes random products, and an unconstrained follower of one game."""
        _require_plain(self, game, start)
        linear_solver.require_random()

    def residual(self, follower: Follower, state: Mapping[str, Any]) -> FixedResidual:
        """On the last batch."""
        return follower.held_residual()

    def products(self, follower: Follower, residual: FixedResidual, pull: Pull | None) -> Products | None:
        """Of a new batch each."""
        if follower.fixed or follower.position is None:
            return _of_one(residual, pull)
        assert isinstance(residual, HeldResidual)
        return _FreshProducts(follower, residual, pull or _own)


def rows(batch: Batch) -> float:
    """How many examples a batch has: the length of its tensors, where it is the same for all of them."""
    found = {len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(found) != 1:
        raise ValueError(
            f"AllBatches weighs each batch by its examples, the length of its tensors, and one has lengths "
            f"{sorted(found)}. Give AllBatches(size=...), a function from a batch to its weight: lambda batch: 1.0 "
            "where all count alike."
        )
    return float(found.pop())


_FIRST = ", or take the first so many, AllBatches(most=100)"


@final
@dataclass(frozen=True)
class AllBatches(Batches):
    """All batches of the present pass, one graph at a time: the derivative of the mean loss over the data.

    For a loss that is a mean over its batch's examples this is the hypergradient of the whole data set, whatever the
    size of the batches; the answer is judged by that mean, too. Its memory is that of one batch's graph, and the
    batches themselves. Inside torch.func, or differentiated twice, it holds the graph of all.

    Costs a pass over the data for the residual and another for each product, each with its graph anew.

    Args:
        most: At most so many batches, from the pass's first; None: all of them.
        size: A batch's weight in the mean; by default the number of its examples.

    Raises:
        ValueError: Before any work, for data that are known to have no end, without `most`.
        DataError: For data without a length whose pass has not ended after 10,000 batches, likewise.
    """

    most: int | None = None
    size: Callable[[Batch], float] = rows

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if self.most is not None and (not isinstance(self.most, int) or self.most < 1):
            raise ValueError(f"AllBatches: most={self.most!r}; expected a number of batches, at least 1, or None.")

    def require(self, game: Game, start: Follower, linear_solver: LinearSolver) -> None:
        """One follower's own data, of one game, without constraints."""
        _require_plain(self, game, start)
        if start.position is not None:
            self.size(next(self._pass(game, start.name, start.position)))
            if self.most is None:  # asked once the data have been begun
                game.require_end(start.name, "AllBatches()", _FIRST)

    def _pass(self, game: GameOfLosses, name: str, position: Position | None) -> Iterator[Batch]:
        return itertools.islice(game.whole_pass(name, position, "AllBatches()", _FIRST), self.most)

    def residual(self, follower: Follower, state: Mapping[str, Any]) -> FixedResidual:
        """The mean over the pass that the call begins in."""
        held = follower.held_residual()
        if follower.fixed or state["data"] is None:
            return held
        batches: list[HeldResidual] = []
        weights: list[float] = []
        for batch in self._pass(follower.game, follower.name, state["data"]):
            batches.append(held.on(batch, len(batches)))
            weights.append(float(self.size(batch)))
        total = sum(weights)
        if not total > 0.0:
            raise ValueError(
                f"AllBatches: size= gives the batches of player {follower.name!r} weights {weights[:3]}..."
            )
        return MeanResidual(batches, [weight / total for weight in weights])

    def products(self, follower: Follower, residual: FixedResidual, pull: Pull | None) -> Products | None:
        """A batch at a time."""
        if not isinstance(residual, MeanResidual):
            return _of_one(residual, pull)
        follower.count(len(residual.parts) - 1)
        return _MeanProducts(residual, pull)


def _require_plain(batches: Batches, game: Game, start: Follower) -> None:
    name = f"Implicit(batches={type(batches).__name__}(...))"
    game.require_one(name)
    if start.rests.projects or start.multipliers:
        raise TypeError(
            f"{name}: player {start.name!r} is constrained, and what binds it is told by one batch. Use "
            "HeldBatch(), on batches that hold all of the data."
        )


class MeanResidual:
    """The mean of F over batches, with their weights."""

    def __init__(self, parts: Sequence[HeldResidual], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, weights

    @property
    def loss(self) -> float:
        """The mean loss at the last call."""
        return sum(weight * part.loss for part, weight in zip(self.parts, self.weights, strict=True))

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """F there."""
        return sum(weight * part(y, *xs) for part, weight in zip(self.parts, self.weights, strict=True))  # type: ignore[return-value]

    def kinks(self, y: Tensor, *xs: Tensor) -> Kinks:
        """None: who is constrained has been refused."""
        return []


def exact_products(
    residual: FixedResidual, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor, Pullback]:
    """F, and its products in y and the wanted of xs, by one graph."""

    def partial(y: Tensor, *some: Tensor) -> Tensor:
        every = list(xs)
        for index, x in zip(wanted, some, strict=True):
            every[index] = x
        return residual(y, *every)

    return pullback(partial, y, *(xs[index] for index in wanted))


def _own(residual: HeldResidual, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
    return exact_products(residual, y, xs, wanted)[1]


def _of_one(residual: FixedResidual, pull: Pull | None) -> Products | None:
    if pull is None:
        return None
    assert isinstance(residual, HeldResidual)
    return _HeldProducts(residual, pull)


_ESTIMATED = (
    "A derivative with another matrix than the Hessian, by curvature=, is an estimate, which is not differentiated "
    "again, nor taken inside torch.func. Leave curvature= out."
)


class _HeldProducts(Products):
    refusal = _ESTIMATED

    def __init__(self, residual: HeldResidual, pull: Pull) -> None:
        self._residual, self._pull = residual, pull

    def pull(self, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
        """Of the one batch."""
        return self._pull(self._residual, y, xs, wanted)


class _MeanProducts(Products):
    def __init__(self, residual: MeanResidual, pull: Pull | None) -> None:
        self._residual, self._pull = residual, pull or _own
        self._refusal = "" if pull is None else _ESTIMATED

    @property
    def refusal(self) -> str:
        """None of F's own products."""
        return self._refusal

    def pull(self, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
        """A batch's graph at a time."""
        residual = self._residual
        y, xs = y.detach(), [x.detach() for x in xs]

        def products(vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
            total: list[Tensor] | None = None
            with torch.no_grad():
                for one, weight in zip(residual.parts, residual.weights, strict=True):
                    some = () if part == slice(1) else wanted  # in y alone the graph is smaller
                    found = self._pull(one, y, xs, some)(vector, part)
                    scaled = [weight * entry for entry in found]
                    total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
            return tuple(total or ())

        return products


class _FreshProducts(Products):
    def __init__(self, follower: Follower, residual: HeldResidual, pull: Pull) -> None:
        self._game, self._name, self._held, self._pull = follower.game, follower.name, residual, pull
        self._position: Position | None = follower.position
        self._turn = 0

    random = True
    refusal = (
        "A derivative with FreshBatches() is a sample, which has no derivative of its own, nor is it taken inside "
        "torch.func. Use HeldBatch() or AllBatches()."
    )

    def pull(self, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
        """A new batch each time."""
        y, xs = y.detach(), [x.detach() for x in xs]

        def products(vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
            batch, self._position = self._game.draw(self._name, self._position)
            self._turn += 1
            with torch.no_grad():
                some = () if part == slice(1) else wanted
                return self._pull(self._held.on(batch, self._turn), y, xs, some)(vector, part)

        return products

    def learned(self) -> dict[str, Any]:
        """The place after the batches that were seen."""
        return {"data": self._position}
