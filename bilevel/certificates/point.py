"""A leader and a follower held at a point: their gradients, products and linear solves, each counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel._root import attach
from bilevel.autodiff import Pullback, gradient, gradients_of, pullback
from bilevel.errors import NonConvergenceWarning
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.game.running import moving_from
from bilevel.linear import GMRES, Candidate, ConjugateGradient, LinearOperator, LinearSolver, LinearSystem
from bilevel.linear.lanczos import Spectrum, extreme_eigenvalues
from bilevel.randomness import random_kept, random_state
from bilevel.responses import Response
from bilevel.responses.base import State, fresh_state
from bilevel.second_order import differentiated_twice
from bilevel.tree import Variables, flatten, leaves, map_leaves

SMALL = 100
"""So many unknowns or fewer are searched whole: their extreme eigenvalues are exact."""


@dataclass(frozen=True)
class Taken:
    """An implicit hypergradient: where it was taken, and what is left of the equations behind it.

    `y` `[m]`; `gradient` `[n]` = g_x - f_xy u; `slope` |grad_y f|; `residual` |f_yy u - g_y|; `mixed` the Frobenius
    norm of f_xy, estimated; `scale` |g_x| + mixed |u|, the size of the two terms before they cancel.
    """

    y: Tensor
    gradient: Tensor
    slope: float
    residual: float
    mixed: float
    scale: float


@dataclass(frozen=True)
class Answer:
    """A response's answer y `[m]` at the point, the leaves of the leader's that it moves with, and the slope it gives.

    `gradient` `[n]` is the hypergradient that plain autograd finds through it.
    """

    y: Tensor
    mine: list[Tensor]
    gradient: Tensor


class LeaderFollowerPoint:
    """One batch of each of the two players, the modules' buffers, and random numbers, for as long as this lives."""

    def __init__(
        self,
        game: Game,
        leader: str,
        follower: str,
        variables: Mapping[str, Variables],
        *,
        buffers: Buffers,
        batches: Mapping[str, Batch],
        seed: int,
    ) -> None:
        self.game, self.leader, self.follower = game, leader, follower
        for name in (leader, follower):
            game.require_twice(name)
        state = fresh_state(game, follower, seed)
        self.reference = float(state["reference"]) or 1.0
        self.others = {name: v for name, v in variables.items() if name != follower}
        self.held = game.follower(self.others, state, batches.get(follower), further=self.others)
        self.held.buffers = buffers
        self.buffers = buffers
        self.batch = batches[leader] if leader in batches else game.draw(leader, game.start(leader, seed))[0]
        self.residual = self.held.held_residual()
        self.random = random_state(game.device)
        with random_kept(game.device, start=self.random):
            here = {name: map_leaves(Tensor.detach, v) for name, v in variables.items()}
            self._moved = moving_from(game, follower, here, self.held.batch, buffers)
        self.xs = [x.detach() for x in self.held.xs]
        # The leader's own leaves among those of all the others, in the order of the flat vector.
        mine = {id(leaf) for leaf in leaves(self.others[leader])}
        self.mine = [index for index, leaf in enumerate(self.held.xs) if id(leaf) in mine]
        self.y = flatten(variables[follower]).detach()
        self.rtol = 1e-10 if self.y.dtype == torch.float64 else 1e-5
        self.seed = seed
        self.generator = torch.Generator(device=self.y.device).manual_seed(seed)
        self.gradients = self.products = 0
        self.leader_reference = self._leader_at_start()
        self.lowest = math.inf
        """The lowest Rayleigh quotient of the follower's Hessian at the point, over all the products taken with it."""

    # Pieces ----------------------------------------------------------------------------------------------------------

    @property
    def own(self) -> list[Tensor]:
        """The leader's leaves."""
        return [self.xs[index] for index in self.mine]

    def slope(self, y: Tensor, *mine: Tensor) -> Tensor:
        """grad_y f `[m]` as a function of y `[m]` and the leader's leaves."""
        self.gradients += 1
        return self.residual(y, *self._every(mine))

    def leader_loss(self, y: Tensor, *mine: Tensor) -> Tensor:
        """g, a 0-d tensor."""
        self.gradients += 1
        variables = {**self.held.input_form.build(self._every(mine)), self.follower: self.held.form.unflatten(y)}
        with random_kept(self.game.device, start=self.random):
            return self.game.evaluate(self.leader, variables, self.batch, self._moved(variables))[0]

    def _leader_at_start(self) -> float:
        """|g_x| at the start of the game, everybody at init."""
        start = {name: self.game.initial(name) for name in self.game.names}
        form, buffers = self.game.structure(self.leader), self.game.buffers()

        def loss(x: Tensor) -> Tensor:
            with random_kept(self.game.device, start=self.random):
                loss = self.game.loss(self.leader, {**start, self.leader: form.unflatten(x)}, self.batch, buffers)
                return loss + 0.0 * x.sum()  # it may depend on the follower alone

        with torch.no_grad():
            self.gradients += 1
            return float(gradient(loss, flatten(start[self.leader]))[1][0].norm())

    def draw(self, like: Tensor) -> Tensor:
        """A Gaussian direction."""
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def _every(self, mine: tuple[Tensor, ...]) -> list[Tensor]:
        every = list(self.xs)
        for index, x in zip(self.mine, mine, strict=True):
            every[index] = x
        return every

    def _hessian(self, y: Tensor, products: Pullback) -> LinearOperator:
        """f_yy at y from the pullback of grad_y f; remembers its lowest Rayleigh quotient at the point itself.

        Of players who answer together it is the transposed Jacobian of their stacked gradients, which says nothing of
        a minimum.
        """
        if not self.held.symmetric:
            return LinearOperator(lambda v: self._counted(products(v)[0]))

        def matvec(v: Tensor) -> Tensor:
            product = products(v)[0]
            self.products += 1
            largest = v.abs().amax()
            if y is self.y and float(largest) > 0.0:
                unit = v / largest  # squares of small float32 numbers underflow
                self.lowest = min(self.lowest, float(unit @ (product / largest)) / float(unit @ unit))
            return product

        return LinearOperator(matvec, symmetric=True)

    def _turned(self, y: Tensor, products: Pullback) -> LinearOperator:
        """dF/dy at y itself: f_yy again, or of players who answer together by differentiating the pullback."""
        if self.held.symmetric:
            return self._hessian(y, products)
        return LinearOperator(lambda v: self._counted(pushed_along(lambda w: products(w)[:1], y, [v])))

    def _counted(self, product: Tensor) -> Tensor:
        self.products += 1
        return product

    @property
    def _solver(self) -> LinearSolver:
        return ConjugateGradient(rtol=self.rtol) if self.held.symmetric else GMRES(rtol=self.rtol)

    def _solve(self, operator: LinearOperator, rhs: Tensor) -> tuple[Tensor, float]:
        with _unwarned():
            found = self._solver.solve(operator, rhs)
        return found.solution, float(found.residual_norm)

    # What is asked of them -------------------------------------------------------------------------------------------

    def spectrum(self, y: Tensor, steps: int) -> Spectrum:
        """Of the follower's Hessian at y `[m]`; of players who answer together, singular values of dF/dy."""
        with torch.no_grad():
            _, products = pullback(self.slope, y, *self.own)
            if not self.held.symmetric:
                return self._singular(y, products)
            operator = self._hessian(y, products)
            return extreme_eigenvalues(operator, y, steps=_steps(steps, y), seed=self.seed)

    def _singular(self, y: Tensor, products: Pullback) -> Spectrum:
        """The extreme singular values: all are taken of a small system; of a large one they are estimated."""
        n = y.numel()
        operator = self._hessian(y, products)
        if n > SMALL:
            drawn = self.draw(y)
            largest = float(operator.matvec(drawn).norm() / drawn.norm())
            smallest = float(drawn.norm()) / float(self._solve(operator, drawn)[0].norm())
            return Spectrum(smallest, largest, 0.0, math.inf, False, 1.0, 0.0, 1)
        rows = torch.stack([operator.matvec(row) for row in torch.eye(n, dtype=y.dtype, device=y.device)])
        values = torch.linalg.svdvals(rows)
        smallest, largest = float(values[-1]), float(values[0])
        rounding = 10.0 * n**0.5 * torch.finfo(y.dtype).eps * largest
        return Spectrum(smallest, largest, smallest - rounding, largest + rounding, True, 0.0, rounding, n)

    def members(self, steps: int) -> dict[str, Spectrum]:
        """Of each one's own Hessian, among players who answer together, all else held."""
        name, found = self.follower, {}
        together = self.held.form.unflatten(self.y)
        for member in self.game.members(name):
            batch = None if self.held.batch is None else self.held.batch[member]
            variables = {**self.others, name: together, member: together[member]}
            found[member] = own_gradient(self.game, member, variables, batch, self.buffers).spectrum(steps, self.seed)
            self.products += found[member].products
        return found

    def implicit(self, y: Tensor) -> Taken:
        """The implicit hypergradient at y `[m]`; costs a linear solve."""
        with torch.no_grad():
            slope, products = pullback(self.slope, y, *self.own)
            _, parts = gradient(self.leader_loss, y, *self.own)
            adjoint, left = self._solve(self._hessian(y, products), parts[0])
            mixed_term = flatten(list(products(adjoint)[1:]))
            direct = flatten(list(parts[1:]))
            # E |f_xy z|^2 over Gaussian z is the squared Frobenius norm, an upper bound of the spectral one.
            sizes = [float(flatten(list(products(self.draw(y))[1:])).square().sum()) for _ in range(4)]
            self.products += 5
        mixed = math.sqrt(sum(sizes) / len(sizes))
        scale = float(direct.norm()) + mixed * float(adjoint.norm())
        return Taken(y, direct - mixed_term, float(slope.detach().norm()), left, mixed, scale)

    def newton(self, y: Tensor) -> Tensor:
        """-H^-1 grad_y f at y `[m]`; costs a linear solve."""
        with torch.no_grad():
            slope, products = pullback(self.slope, y, *self.own)
            step, _ = self._solve(self._turned(y, products), slope.detach())
        return -step

    def sensitivity(self, taken: Taken) -> float:
        """How fast the implicit hypergradient changes with y, estimated; costs four linear solves."""
        y = taken.y
        h: float = torch.finfo(y.dtype).eps ** (1.0 / 3.0) * max(1.0, float(y.norm()) / math.sqrt(y.numel()))

        def change(direction: Tensor) -> float:
            return float((self.implicit(y + h * direction).gradient - taken.gradient).norm()) / h

        # Gaussian directions give a Frobenius norm, which two draws put more than three times too low in one case of
        # ten if it has one singular value, and hardly ever if it has several. The way to the optimum is seen as well.
        spread = 3.0 * math.sqrt(sum(change(self.draw(y)) ** 2 for _ in range(2)) / 2.0)
        ahead = self.newton(y)
        length = float(ahead.norm())
        return max(spread, 2.0 * change(ahead / length)) if length > 0.0 else spread

    def answer(self, response: Response, state: State | None) -> Answer:
        """What a response answers at the point, from a state of its own or a fresh one."""
        start = response.init(self.game, follower=self.follower, seed=self.seed) if state is None else state
        tracked = map_leaves(lambda t: t.detach().clone().requires_grad_(), self.others)
        with torch.enable_grad(), warnings.catch_warnings(), random_kept(self.game.device):
            warnings.simplefilter("ignore")  # what they would say is what is measured here
            answer, _ = response(self.game, tracked, start, self.held.batch)
            mine, everybody = leaves(tracked[self.leader]), {**tracked, self.follower: answer}
            slopes = torch.autograd.grad(
                self.game.evaluate(self.leader, everybody, self.batch, self._moved(everybody))[0],
                mine,
                retain_graph=True,
                materialize_grads=True,
            )
        self.gradients += 1
        return Answer(flatten(answer), mine, flatten(list(slopes)).detach())

    def directional(self, answer: Answer) -> tuple[Tensor, Tensor]:
        """J e by the response, and -H^-1 f_yx e at its own answer, `[m]` each, in a fresh Gaussian direction e."""
        directions = [self.draw(x) for x in answer.mine]
        moved = pushed_along(
            lambda v: torch.autograd.grad(answer.y, answer.mine, v, create_graph=True, materialize_grads=True),
            answer.y,
            directions,
        )
        at = answer.y.detach()
        with torch.enable_grad():
            _, products = pullback(self.slope, at, *self.own)
            mixed = pushed_along(lambda v: products(v)[1:], at, directions)
        with torch.no_grad():
            wanted, _ = self._solve(self._turned(at, products), -mixed)
        return moved, wanted

    def total_spectrum(self, y: Tensor, steps: int) -> Spectrum:
        """Of the leader's total second derivative, the follower's optimum y `[m]` moving along; two solves a product.

        It differentiates the implicit hypergradient, whose linear solve is itself an implicit function.
        """
        with torch.enable_grad(), _unwarned(), differentiated_twice():
            mine = [x.detach().clone().requires_grad_() for x in self.own]
            solver = _Counted(inner=self._solver, rtol=self.rtol, count=self._count)
            optimum = attach(self.slope, y, mine, linear_solver=solver, symmetric=self.held.symmetric)
            loss = self.leader_loss(optimum, *mine)
            total = flatten(list(gradients_of(loss, mine, create_graph=True)))

            def product(v: Tensor) -> Tensor:
                self.products += 1
                return flatten(list(gradients_of(total, mine, v, retain_graph=True)))

            start = flatten(mine).detach()
            operator = LinearOperator(product, symmetric=True)
            return extreme_eigenvalues(operator, start, steps=_steps(steps, start), seed=self.seed)

    def _count(self, products: int) -> None:
        self.products += products


@final
@dataclass(frozen=True, kw_only=True)
class _Counted(LinearSolver):
    """A solver whose products are counted."""

    inner: LinearSolver
    count: Callable[[int], None]

    def iterate(self, system: LinearSystem) -> Candidate:
        found = self.inner.iterate(system)
        self.count(system.products)
        return found


@dataclass(frozen=True)
class OwnGradient:
    """A player's own gradient, all else held.

    Args:
        norm: Its norm.
        spectrum: Of its own Hessian, for so many steps and a seed.
        linear: Whether its loss is seen, from the graph, to be linear in its own variables: its gradient does not
            depend on them.
    """

    norm: float
    spectrum: Callable[[int, int], Spectrum]
    linear: bool


def own_gradient(
    game: Game, name: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
) -> OwnGradient:
    """A player's own gradient at a point."""
    game.require_twice(name)
    form, random = game.structure(name), random_state(game.device)

    def slope(y: Tensor) -> Tensor:
        with random_kept(game.device, start=random):
            moved = lambda y: game.loss(name, {**variables, name: form.unflatten(y)}, batch, buffers or None)  # noqa: E731
            return gradient(moved, y)[1][0]

    y = flatten(variables[name]).detach()
    with torch.no_grad():
        value, products = pullback(slope, y)

    def spectrum(steps: int, seed: int) -> Spectrum:
        with torch.no_grad():
            operator = LinearOperator(lambda v: products(v)[0], symmetric=True)
            return extreme_eigenvalues(operator, y, steps=_steps(steps, y), seed=seed)

    return OwnGradient(float(value.detach().norm()), spectrum, linear=not value.requires_grad)


def _steps(steps: int, like: Tensor) -> int:
    return max(steps, like.numel()) if like.numel() <= SMALL else steps


def pushed_along(pulled: Callable[[Tensor], tuple[Tensor, ...]], like: Tensor, directions: list[Tensor]) -> Tensor:
    """The derivative along `directions`, by differentiating the pullback v -> J'v, which is linear in v."""
    with torch.enable_grad():
        v = torch.zeros_like(like).requires_grad_()
        rows = pulled(v)
        total = torch.stack([(row * d).sum() for row, d in zip(rows, directions, strict=True)]).sum()
        if not total.requires_grad:  # nothing moves with them
            return torch.zeros_like(like)
        (moved,) = torch.autograd.grad(total, v, retain_graph=True, materialize_grads=True)
    return moved.detach()


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings of linear solves that stop short: what they leave enters the bound."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonConvergenceWarning)
        yield
