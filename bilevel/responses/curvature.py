"""The matrix of an implicit derivative's equation: the follower's Hessian, or Gauss and Newton's, which is definite."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import EVERY, Pullback, gradient, pullback, pushforward
from bilevel.errors import require_kinds
from bilevel.game import Follower, HeldResidual
from bilevel.linear import KroneckerFactors, LinearOperator, LinearSolution
from bilevel.linear.base import SolvesLinearSystems
from bilevel.linear.kronecker import FactoredProducts
from bilevel.responses.batches import FixedResidual, Judge, MeanResidual, exact_products
from bilevel.responses.layers import kronecker_factors, layers_seen, unsuited
from bilevel.responses.promise import Estimate, Optimum, Promise
from bilevel.tree import Structure, Variables, flatten, join, structure_of

_AGREE = 1e-2
"""How far the parts' gradient may be from the loss's own, of both sizes: float32's rounding and no missing term."""
_ROUNDINGS = 100.0
"""So many times the rounding of a gradient of the size at the start may one at the optimum be off."""
_FAR = 1.0
"""A correction that is worth a warning; on trained networks it was measured at two to four times the error."""


class Curvature(ABC):
    """Which matrix stands for dF/dy in an `Implicit` response's linear solve; a configuration without state."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether it is dF/dy itself."""

    @property
    def promise(self) -> Promise:
        """What the derivative with it is of."""
        return Optimum()

    @abstractmethod
    def require(self, start: Follower) -> None:
        """Raise, before any work, for a follower that it does not suit; its state is fresh."""

    def check(self, residual: FixedResidual, y: Tensor, xs: Sequence[Tensor], unit: float = 0.0) -> int:
        """Raise `ValueError` where it is not that of this F at y `[n]`; returns how many gradients that took.

        `unit` is the norm of F where the game began: where it is 0 next to that, it is rounding.
        """
        return 0

    def without_factors(self, start: Follower) -> str:
        """Why a preconditioner gets no Kronecker factors from it, in words; empty where it does."""
        return f"{type(self).__name__} has none"

    def judge(
        self, follower: Follower, residual: FixedResidual, y: Tensor, solver: SolvesLinearSystems
    ) -> Judge | None:
        """What tells a backward solve's error at y `[n]`; None where nobody asks."""
        return None

    @abstractmethod
    def pull(self, residual: HeldResidual, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
        """The products with it, and with (dF/dx)^T for the wanted of xs, at y `[n]` on one batch."""


@final
@dataclass(frozen=True)
class Hessian(Curvature):
    """dF/dy itself: the Hessian of the follower's loss, or the Jacobian of its residual."""

    @property
    def exact(self) -> bool:
        """Yes."""
        return True

    def require(self, start: Follower) -> None:
        """Every follower has one."""

    def pull(self, residual: HeldResidual, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
        """By one graph of F."""
        return exact_products(residual, y, xs, wanted)[1]


class _Products(FactoredProducts):
    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        mixed: Pullback | None,
        count: int,
        factors: Callable[[], tuple[Sequence[KroneckerFactors], int]],
    ) -> None:
        self._product, self._mixed, self._count, self._factors = product, mixed, count, factors

    def __call__(self, vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
        """G's product, and F's own with (dF/dx)^T."""
        places = range(1 + self._count)[part]
        found = [self._product(vector)] if 0 in places else []
        others = [place for place in places if place > 0]
        if others:
            assert self._mixed is not None
            found += self._mixed(vector, slice(others[0], others[-1] + 1))
        return tuple(found)

    def factors(self) -> tuple[Sequence[KroneckerFactors], int]:
        """Of the layers of the follower's module."""
        return self._factors()


@final
@dataclass(frozen=True)
class GaussNewton(Curvature):
    r"""The generalised Gauss-Newton matrix: the Hessian of a loss of a network's outputs without the network's own.

    For a follower's loss $\ell(z(y)) + r(y)$, with the outputs z of its batch,

    $$
    G = J^\top\, \ell_{zz}\, J + r_{yy}, \qquad J = \frac{dz}{dy}, \qquad
    \nabla^2 (\ell \circ z + r) = G + \sum_i \ell_{z_i} \nabla^2 z_i
    $$

    G is positive semi-definite where $\ell$ and r are convex, as cross-entropy and squares are, whatever the network:
    `ConjugateGradient(damping=...)` solves with it where the Hessian is indefinite, without large damping. The mixed
    products stay exact. It leaves out the last sum, which vanishes where outputs are linear in y or fit their targets:
    the derivative is an estimate. With `measure=True` one correction is tried, $u + G^{-1} (c - H u)$ with the Hessian
    H itself; the report's `error` is what it would change of the hypergradient, on trained networks two to four times
    the error, and above 1 it warns. First derivatives alone, outside torch.func.

    Costs a product and a half or so of the Hessian's, and two gradients a call to check that the parts make up the
    loss.

    Args:
        outputs: z: parameters named after players and `batch`, as a loss has; returns tensors.
        loss: $\ell$: the same, and `outputs` receives z.
        rest: r: penalties, and whatever does not go through the outputs; its whole Hessian is taken.
        bias: The relative error of the response's Jacobian that it stands for; 0 for outputs that are linear in y, NaN
            where none is known beforehand.
        measure: Whether a second solve tells the error.

    Raises:
        ValueError: Where the gradient of the parts is not that of the player's own loss.

    Source: Schraudolph 2002; Martens 2020 (arXiv 1412.1193).

    Examples:
        >>> GaussNewton(
        ...     outputs=lambda weights, batch: batch[0] @ weights,
        ...     loss=lambda outputs, batch: (outputs - batch[1]).square().mean(),
        ...     rest=lambda weights, decay: decay.exp() * weights.square().sum(),
        ...     bias=0.0,
        ... ).bias
        0.0
    """

    outputs: Callable[..., Any]
    loss: Callable[..., Tensor]
    rest: Callable[..., Tensor] | None = None
    bias: float = math.nan
    measure: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be called."""
        require_kinds(self)
        for name in ("outputs", "loss"):
            if not callable(getattr(self, name)):
                raise TypeError(f"GaussNewton: {name} is {getattr(self, name)!r}; expected a function.")
        if not (self.rest is None or callable(self.rest)):
            raise TypeError(f"GaussNewton: rest is {self.rest!r}; expected a function, or None.")
        self.promise  # noqa: B018 - which refuses a negative bias

    @property
    def exact(self) -> bool:
        """No."""
        return False

    @property
    def promise(self) -> Promise:
        """An estimate of the optimum's derivative, with `bias`."""
        return Estimate(Optimum(), self.bias, "Gauss-Newton in place of the Hessian")

    def require(self, start: Follower) -> None:
        """A follower of one game, who minimises its own loss, unconstrained."""
        start.game.require_one("Implicit(curvature=GaussNewton(...))")
        if start.rests.projects or start.multipliers or not start.minimises:
            raise TypeError(
                f"GaussNewton: player {start.name!r} rests elsewhere than where its loss's own gradient vanishes; the "
                "matrix is that of a loss. Leave curvature= out."
            )
        if "outputs" in start.game.names:
            raise ValueError("GaussNewton: a player is named 'outputs', which the loss's parameter is; rename it.")
        residual = start.held_residual()
        y = flatten(start.game.initial(start.name))
        self.check(residual, y, start.xs)

    def without_factors(self, start: Follower) -> str:
        """A module has some, whose outputs are one tensor with a row an example."""
        if start.held_residual().module is None:
            return f"player {start.name!r} is no module"
        residual, y = start.held_residual(), flatten(start.game.initial(start.name))
        with torch.no_grad():
            found = self._outputs(residual, y, [x.detach() for x in start.xs])
        return unsuited(found)

    def check(self, residual: FixedResidual, y: Tensor, xs: Sequence[Tensor], unit: float = 0.0) -> int:
        """The gradient of the parts must be F, of the first batch."""
        residual = residual.parts[0] if isinstance(residual, MeanResidual) else residual
        assert isinstance(residual, HeldResidual)
        with torch.no_grad():
            y, xs = y.detach(), [x.detach() for x in xs]
            own = residual(y, *xs)
            (through,) = gradient(lambda y: self._loss(residual, self._outputs(residual, y, xs), y, xs), y)[1]
            (beside,) = gradient(lambda y: self._rest(residual, y, xs), y)[1]
        norm = torch.linalg.vector_norm
        size = float(norm(through) + norm(beside) + norm(own))
        gap = float(norm(through + beside - own))
        # Where the follower rests, its gradient is a sum that cancels to the rounding of its terms.
        if not gap <= _AGREE * size + _ROUNDINGS * torch.finfo(y.dtype).eps * unit:
            raise ValueError(
                f"GaussNewton: loss(outputs) + rest has another gradient than the loss of player {residual.name!r}: "
                f"they differ by {gap:.3g}, and are of size {size:.3g}. The parts must make up the whole loss, with "
                "its penalties in rest=."
            )
        return 2

    def judge(
        self, follower: Follower, residual: FixedResidual, y: Tensor, solver: SolvesLinearSystems
    ) -> Judge | None:
        """By one product with the Hessian itself, and one more solve."""
        if not self.measure:
            return None
        y, xs = y.detach(), [x.detach() for x in follower.xs]

        def judged(
            found: LinearSolution, rhs: Tensor, mixed: Sequence[Tensor], products: Pullback
        ) -> tuple[float, int, str]:
            with torch.no_grad():
                left = rhs - exact_products(residual, y, xs, ())[1](found.solution)[0]
                matrix = LinearOperator(
                    lambda v: products(v, slice(1))[0], follower.symmetric, shapes=follower.unknowns.shapes
                )
                step = solver.solve(matrix, left)
                moved = products(step.solution, slice(1, None))
            change = float(torch.linalg.vector_norm(join(list(moved))))
            size = float(torch.linalg.vector_norm(join([a + b for a, b in zip(mixed, moved, strict=True)])))
            error = change / size if size > 0.0 else change
            told = (
                f"one correction by the Hessian itself changes the indirect part of GaussNewton's hypergradient by "
                f"{error:.0%}: the network is far from linear where it ended, or the follower far from its optimum. "
                "Train it further, or use GMRES() with the Hessian."
            )
            return error, step.products + 2, told if error > _FAR else ""

        return judged

    def pull(self, residual: HeldResidual, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
        """G's products, and F's own with (dF/dx)^T."""
        y, xs = y.detach(), [x.detach() for x in xs]
        exact = exact_products(residual, y, xs, wanted)[1] if wanted else None
        form: Structure | None = None

        def model(y: Tensor) -> Tensor:
            nonlocal form
            found = self._outputs(residual, y, xs)
            form = structure_of(found)
            return flatten(found)

        z, back = pullback(model, y)
        z, shaped = z.detach(), form
        assert shaped is not None
        ahead = pushforward(model, y, like=z)

        def slope(z: Tensor) -> Tensor:
            return gradient(lambda z: self._loss(residual, shaped.unflatten(z), y, xs), z)[1][0]

        def own(y: Tensor) -> Tensor:
            return gradient(lambda y: self._rest(residual, y, xs), y)[1][0]

        curved = pullback(slope, z)[1]
        beside = None if self.rest is None else pullback(own, y)[1]

        def product(vector: Tensor) -> Tensor:
            (found,) = back(curved(ahead([vector]))[0])
            return found if beside is None else found + beside(vector)[0]

        def factors() -> tuple[Sequence[KroneckerFactors], int]:
            with layers_seen(residual.module) as seen, torch.enable_grad():
                outputs = self._outputs(residual, y.detach().requires_grad_(), xs)
                outputs = outputs if outputs.ndim > 1 else outputs[:, None]
                outputs = outputs.reshape(-1, outputs.shape[-1])
            return kronecker_factors(seen, outputs, curved, product, beside, residual.split(y))

        return _Products(product, exact, len(wanted), factors)

    def _outputs(self, residual: HeldResidual, y: Tensor, xs: Sequence[Tensor]) -> Variables:
        return residual.call(self.outputs, y, xs, {})

    def _loss(self, residual: HeldResidual, outputs: Variables, y: Tensor, xs: Sequence[Tensor]) -> Tensor:
        found: Tensor = residual.call(self.loss, y, xs, {"outputs": outputs})
        return found

    def _rest(self, residual: HeldResidual, y: Tensor, xs: Sequence[Tensor]) -> Tensor:
        if self.rest is None:
            return y.new_zeros(())
        found: Tensor = residual.call(self.rest, y, xs, {})
        return found
