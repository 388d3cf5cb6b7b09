"""The follower stays at its optimum, and the leader differentiates that by the implicit-function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._root import Receipt, attach, receipt_of
from bilevel.autodiff import Pullback, below_transforms, concrete, pullback, transforms_active
from bilevel.errors import ConvergenceError, NonConvergenceWarning, NotSymmetricError
from bilevel.game import Follower, Game, HeldResidual
from bilevel.game.data import Batch
from bilevel.inner import InnerSolver, TorchOptimizer
from bilevel.inner.optimizer import leaf_memory, torch_optimizer
from bilevel.inner.schedule import place_alone
from bilevel.inner.torch_optim import OptimizerFactory, after_one_step, kept_memory, require_factory
from bilevel.linear import ConjugateGradient, LinearSolver
from bilevel.linear.base import loosened
from bilevel.responses.base import (
    Response,
    State,
    at_start,
    fresh_state,
    refuse_captured,
    refuse_optimizer_hyper,
)
from bilevel.responses.inexactness import Inexactness
from bilevel.responses.promise import Behaviour, Optimum, Promise, Report
from bilevel.tree import Variables, flatten, join, leaf_names, leaves, map_leaves


@final
@dataclass(frozen=True)
class Implicit(Response):
    r"""The follower's optimum, with the derivatives that the implicit-function theorem gives it.

    $$
    \frac{dy^*}{dx} = -(\nabla_{yy} f)^{-1} \nabla_{yx} f
    $$

    The last batch, the buffers and the random numbers are held through the linear solve: with minibatches the held
    batch stands for the whole data. The hypergradient's error is first order in what `tolerance` and the linear
    residual leave.

    Costs up to `steps` + 1 gradients, and in backward the solver's Hessian-vector products; memory of one graph. Do not
    wrap it in `torch.utils.checkpoint(use_reentrant=False)`, which takes the call again for each gradient and product.

    Args:
        optimizer: What finds the optimum: a callable from tensors to any torch.optim optimiser, LBFGS included, or an
            inner solver, `Scipy("L-BFGS-B")` or `ClosedForm(function)`.
        steps: At most so many steps a call.
        tolerance: Where it stops: |grad_y f| relative to its value at the start of the game; None asks for no accuracy.
        linear_solver: For the system with the Hessian; `GMRES()` where the follower's residual is not symmetric.
        warm_start: From the last call's variables and linear solution; else each call starts at `init`.
        strict: Raise where it would warn.
        inexactness: `Geometric()` or `AsLeaderMoves()`: looser tolerances while the leader is far from its goal.

    Raises:
        ConvergenceError: With `strict`, when a solve misses `tolerance`; else a `NonConvergenceWarning`
            says by how much.
        NotSymmetricError: If the linear solver needs a symmetric Jacobian and the follower has none.

    Source: Bengio 2000; Pedregosa 2016 (arXiv 1602.02355); Lorraine et al. 2020 (arXiv 1911.02590).

    Examples:
        >>> from functools import partial
        >>> Implicit(partial(torch.optim.Adam, lr=1e-3), steps=100).linear_solver.rtol
        1e-06
    """

    optimizer: OptimizerFactory | InnerSolver
    steps: int = 100
    tolerance: float | None = 1e-3
    linear_solver: LinearSolver = field(default_factory=ConjugateGradient)
    warm_start: bool = True
    strict: bool = False
    inexactness: Inexactness | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Implicit: steps={self.steps}; expected at least 1.")
        if self.tolerance is not None and not self.tolerance >= 0.0:
            raise ValueError(f"Implicit: tolerance={self.tolerance}; expected a number >= 0, or None.")
        if not isinstance(self.optimizer, InnerSolver):
            require_factory("Implicit: optimizer", self.optimizer)
        if not isinstance(self.linear_solver, LinearSolver):
            raise TypeError(
                f"Implicit: linear_solver is {self.linear_solver!r}; expected one such as ConjugateGradient()."
            )
        if not (self.inexactness is None or isinstance(self.inexactness, Inexactness)):
            raise TypeError(
                f"Implicit: inexactness is {self.inexactness!r}; expected Geometric(), AsLeaderMoves() or None."
            )

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call; refuses captured tensors and hyperparameters of the inner optimiser."""
        state = fresh_state(game, follower, seed, many=True)
        inner = self._solver
        optimizer = inner if isinstance(inner, TorchOptimizer) else None
        refuse_optimizer_hyper(self, game, state["follower"], optimizer)
        start = at_start(game, state)
        refuse_captured(start, state)
        if not start.symmetric and self.linear_solver.needs_symmetry:
            raise NotSymmetricError(
                f"Implicit: the residual of {start.name!r} has no symmetric Jacobian, since it is no single loss's "
                f"gradient, and {type(self.linear_solver).__name__} needs one. Use linear_solver=GMRES(), or Dense() "
                "for a few hundred unknowns."
            )
        solver, flat, shapes = start.adapted_linear(self.linear_solver), flatten(state["variables"]), start.form.shapes
        state |= {"optimizer": None, "linear": vars(Receipt.blank(flat, solver, shapes)).copy()}
        if solver.from_optimizer:
            y = state["variables"]
            names = leaf_names(y, start.name)
            remembered = [] if optimizer is None else after_one_step(optimizer.factory, leaves(y), names)
            solver.inform(solver.init(flat, shapes), remembered)
        if self.inexactness is None:
            return state
        game.require_one(f"Implicit(inexactness={self.inexactness}), which follows one leader's progress,")
        return state | {"leader": self._track(state)}

    def adopt(self, saved: State, start: State) -> State:
        """With the memory of a torch.optim optimiser, where it is such as this one's; a schedule goes on."""
        if not isinstance(self._solver, TorchOptimizer):
            return super().adopt(saved, start)
        y, before = start["variables"], saved.get("optimizer")
        kept: Any = kept_memory(self._solver.factory, leaves(y), leaf_memory(before), leaf_names(y, start["follower"]))
        if isinstance(before, dict):
            kept = {"leaves": kept, "schedule": place_alone(before["schedule"])}
        return super().adopt(saved, start) | {"optimizer": kept}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The follower's optimum, differentiable in `others` to any order, and the state to continue from."""
        follower = game.follower(others, state, batch)
        solver = follower.adapted_linear(self.linear_solver)
        looser = self._looser(follower, state)
        if transforms_active():
            below = _Solve(self, game, follower, state, batch, looser)
            (y,) = below_transforms(below, follower.xs, "The plain solve is not differentiated: root does that.")
            after, receipt, products = state, None, None
            follower.batch = below.held(follower)
            residual = follower.held_residual()
        else:
            y, after, residual, products = self._solve(game, follower, state, looser)
            before, kept = state["linear"], leaf_memory(after["optimizer"])
            after["products"] += int(before["products"])
            receipt = Receipt(
                before["adjoint"],
                torch.full_like(before["residual"], torch.nan),
                torch.zeros_like(before["products"]),
                torch.full_like(before["error"], torch.nan),
                solver.inform(before["memory"], kept if isinstance(kept, list) else []),
            )
            blank = vars(Receipt.blank(y))
            after["linear"] = before | {key: blank[key] for key in ("residual", "products", "error")}
        attached = attach(
            residual,
            y,
            follower.xs,
            linear_solver=follower.adapted_linear(self.linear_solver.loosened(looser)),
            symmetric=follower.symmetric,
            shapes=follower.form.shapes,
            receipt=receipt,
            products=products,
        )
        return follower.form.unflatten(attached), after

    @property
    def promise(self) -> Promise:
        """The optimum's derivative."""
        return Optimum()

    @property
    def budget(self) -> int:
        """Steps of the inner solver a call."""
        return self.steps

    def with_budget(self, steps: int) -> Implicit:
        """The same with so many steps of the inner solver a call."""
        return replace(self, steps=steps)

    @property
    def behaviour(self) -> Behaviour:
        """It warns unless `tolerance` is None."""
        return Behaviour(warm=self.warm_start, warns=self.tolerance is not None, rtol=self.linear_solver.rtol or 0.0)

    @property
    def inner_optimizer(self) -> OptimizerFactory | None:
        """That of `optimizer`, unless it is another inner solver."""
        return self._solver.factory if isinstance(self._solver, TorchOptimizer) else None

    def with_inner_optimizer(self, optimizer: OptimizerFactory) -> Implicit:
        """The same with another optimiser, and the same options around it."""
        options = self.optimizer if isinstance(self.optimizer, TorchOptimizer) else None
        return replace(self, optimizer=optimizer if options is None else replace(options, factory=optimizer))

    def after_backward(self, state: State, answer: Variables) -> State:
        """The state with the linear solve's answer, the start of the next one, and its residual and products."""
        receipt = receipt_of(answer)
        if receipt is None:
            return state
        return state | {"linear": vars(receipt).copy()}  # a second backward pass through this answer replaces them

    def report(self, state: State) -> Report:
        """With the relative residual of the last backward solve, and its estimate of the hypergradient's error."""
        linear, leader = state["linear"], state.get("leader")
        memory = linear["memory"]
        return Report(
            int(state["gradients"]),
            int(state["products"]) + int(linear["products"]),
            state["stationarity"],
            memory["residuals"].clone() if "residuals" in memory else float(linear["residual"]),
            float(linear["error"]),
            leader["factor"] if leader and leader["calls"] else 1.0,
        )

    @property
    def _solver(self) -> InnerSolver:
        return (
            self.optimizer if isinstance(self.optimizer, InnerSolver) else torch_optimizer("Implicit", self.optimizer)
        )

    def _solve(
        self, game: Game, follower: Follower, state: State, looser: float
    ) -> tuple[Tensor, State, HeldResidual, Pullback | None]:
        """The optimum `[n]` found by plain steps, the state after them, F there, and the graph of F that judged it."""
        with torch.no_grad():
            start, kept = follower.begins(state, warm=self.warm_start)
        memory = state["optimizer"] if kept else None
        solver = follower.adapted_inner(self._solver)
        reference = follower.unit(state)
        tolerance = 0.0 if self.tolerance is None else loosened(self.tolerance, looser)
        threshold = tolerance * reference
        with torch.no_grad():
            y, memory = solver.minimise(follower, start, memory, steps=self.steps, threshold=threshold)
            advice = "Lower the inner learning rate, use another inner solver, or check for an optimum at infinity."
            follower.require_finite(y, advice)
        residual = follower.held_residual()
        flat = join(y) if len(y) > 1 else y[0].detach().clone().reshape(-1)  # never the inner solver's own memory
        tracked = [x.requires_grad and torch.is_grad_enabled() for x in follower.xs]
        slope, products = self._judged(residual, flat, follower.xs, tracked)
        follower.gradient_count += 1
        follower.require_finite(y, advice, residual.loss)
        norm = follower.norm(follower.form.split(slope))
        relative = follower.relative(norm, state)
        missed = None if self.tolerance is None else follower.shortfall(norm, threshold, relative)
        if missed is not None:
            how_far, games = missed
            message = (
                f"Implicit: the gradient of player {follower.name!r} is still {how_far} "
                f"after {self.steps} steps; wanted {tolerance:g}. The hypergradient is biased to that order. Give "
                "it more steps or another optimiser (torch's LBFGS also stops by its own tolerance_grad and "
                "tolerance_change), or accept it by tolerance=."
            )
            if self.strict:
                raise ConvergenceError(message)
            warnings.warn(NonConvergenceWarning(message, games=games), stacklevel=3)
        after: dict[str, Any] = state | {
            "variables": follower.form.unflatten(flat),
            "optimizer": memory,
            "data": follower.position,
            "buffers": follower.buffers.get(follower.name, {}),
            "gradients": state["gradients"] + follower.gradient_count,
            "stationarity": relative,
        }
        if self.inexactness is not None:
            after["leader"] = self._tracked(state, follower, looser)
        return flat, after, residual, products

    def _looser(self, follower: Follower, state: State) -> float:
        """How many times looser than asked for this call's tolerances are."""
        # What is not differentiated is an end, not a step on the way.
        if self.inexactness is None or not (torch.is_grad_enabled() or transforms_active()):
            return 1.0
        track = self._track(state)
        moved = self._moved(follower, track)
        first = track["first"] or moved
        return self.inexactness.factor(track["calls"], moved / first if first else 1.0)

    @staticmethod
    def _track(state: State) -> dict[str, Any]:
        """What is known of the leader: nothing before a first call, or one of a response without inexactness."""
        return state.get("leader") or {"calls": 0, "last": {}, "first": 0.0}

    def _tracked(self, state: State, follower: Follower, looser: float) -> dict[str, Any]:
        """What the next call will want to know of the leader."""
        track = self._track(state)
        first = track["first"] or self._moved(follower, track)
        last = map_leaves(torch.clone, follower.others)
        return {"calls": track["calls"] + 1, "last": last, "first": first, "factor": looser}

    @staticmethod
    def _moved(follower: Follower, track: dict[str, Any]) -> float:
        """How far the others, those that were there in the last call too, are from where they were; 0 in the first."""
        then = track["last"]
        both = [name for name in follower.inputs if name in then]
        pairs = [(x, old) for n in both for x, old in zip(leaves(follower.inputs[n]), leaves(then[n]), strict=True)]
        if not pairs:
            return 0.0
        return concrete(torch.linalg.vector_norm(join([x.detach() - old for x, old in pairs])))

    @staticmethod
    def _judged(
        residual: HeldResidual, y: Tensor, xs: list[Tensor], tracked: list[bool]
    ) -> tuple[Tensor, Pullback | None]:
        """F(y, *xs), and its pullback in y and the tracked of xs when there are any: the graph that backward needs."""
        if not any(tracked):
            with torch.no_grad():
                return residual(y, *xs), None

        def partial(y: Tensor, *some: Tensor) -> Tensor:
            given = iter(some)
            return residual(y, *(next(given) if track else x for x, track in zip(xs, tracked, strict=True)))

        value, products = pullback(partial, y, *(x for x, track in zip(xs, tracked, strict=True) if track))
        return value.detach(), products


class _Solve:
    """The plain solve, called from inside a torch.func transform; a class of its own, so that no pytree opens it."""

    def __init__(
        self, response: Implicit, game: Game, follower: Follower, state: State, batch: Batch, looser: float
    ) -> None:
        self.response, self.game, self.state, self.batch, self.looser = response, game, state, batch, looser
        self.form = follower.input_form
        self.last: Batch = batch

    def __call__(self, *xs: Tensor) -> tuple[Tensor]:
        follower = self.game.follower(self.form.build(xs), self.state, self.batch)
        y, *_ = self.response._solve(self.game, follower, self.state, self.looser)
        self.last = follower.batch
        return (y,)

    def held(self, follower: Follower) -> Batch:
        """The batch that the solve ended on."""
        return self.last if self.batch is None else follower.batch
