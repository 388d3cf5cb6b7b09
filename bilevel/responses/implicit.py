"""The follower stays at its optimum, and the leader differentiates that by the implicit-function theorem."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel._root import Examine, Products, Receipt, attach, receipt_of, source_of
from bilevel.autodiff import Pullback, below_transforms, concrete, transforms_active
from bilevel.errors import (
    BilevelWarning,
    ConvergenceError,
    FollowerNonConvergenceWarning,
    IndefiniteSystemError,
    KinkWarning,
    NotSymmetricError,
    SecondDerivativeError,
    UnreliableResponseWarning,
    require_kinds,
)
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.game.residual import Kinks, Rest
from bilevel.inner import InnerSolver, TorchOptimizer
from bilevel.inner.base import minimised, named_by, require_solver
from bilevel.inner.optimizer import leaf_memory, of_optimizer, torch_optimizer
from bilevel.inner.schedule import place_alone
from bilevel.inner.torch_optim import OptimizerFactory, after_one_step, kept_memory
from bilevel.linear import GMRES, ConjugateGradient, Dense, LinearSolution, LinearSolver
from bilevel.linear.base import loosened
from bilevel.responses.base import (
    Response,
    State,
    at_start,
    fresh_state,
    refuse_captured,
    refuse_optimizer_hyper,
    require_second_derivative,
)
from bilevel.responses.batch_tensors import BatchTensors
from bilevel.responses.batches import Batches, FixedResidual, HeldBatch, Pull, exact_products
from bilevel.responses.curvature import Curvature, Hessian
from bilevel.responses.examination import Examination
from bilevel.responses.inexactness import Inexactness
from bilevel.responses.kinks import kink_of, tell_of_kink
from bilevel.responses.own_functions import require_symmetric
from bilevel.responses.promise import Behaviour, Promise, Report
from bilevel.tree import Variables, join, leaf_names, leaves, map_leaves

_DENSE = 500
"""So many unknowns or fewer have their system written down, where conjugate gradients cannot solve it."""


@final
@dataclass(frozen=True)
class Implicit(Response):
    r"""The follower's optimum, with the derivatives that the implicit-function theorem gives it.

    $$
    \frac{dy^*}{dx} = -(\nabla_{yy} f)^{-1} \nabla_{yx} f
    $$

    The last batch, the buffers and the random numbers are held through the linear solve: with minibatches the held
    batch stands for the whole data, unless `batches` says otherwise. The hypergradient's error is first order in what
    `tolerance` and the linear residual leave. It warns where the answer is far from the optimum although it meets
    `tolerance`, which a far start makes large, and where the backward solve shows that the follower is at no minimum,
    or where its loss is flat.

    Costs up to `steps` + 1 gradients, and in backward the solver's Hessian-vector products; memory of one graph. Do not
    wrap it in `torch.utils.checkpoint(use_reentrant=False)`, which takes the call again for each gradient and product.

    Args:
        optimizer: What finds the optimum: a callable from tensors to any torch.optim optimiser, LBFGS included, or an
            inner solver, `Scipy("L-BFGS-B")` or `ClosedForm(function)`.
        steps: At most so many steps a call.
        tolerance: Where it stops: |grad_y f| relative to its value at the start of the game; where it started at its
            optimum, to what the leader's moves have made of it. Never below rounding. None asks for no accuracy.
        linear_solver: For the system with the Hessian; default `ConjugateGradient()`, or `GMRES()` where the follower's
            residual has no symmetric Jacobian: one with a domain, or several players who answer together. For a
            follower with multipliers, whose system is indefinite, `Dense()` up to 500 unknowns and `GMRES()` beyond.
        warm_start: From the last call's variables and linear solution; else each call starts at `init`.
        strict: Raise where it would warn.
        inexactness: `Geometric()` or `AsLeaderMoves()`: looser tolerances while the leader is far from its goal.
        batches: Which batches of its data the derivative is of: `responses.HeldBatch()`, `FreshBatches()`, a new one
            for each product, or `AllBatches()`.
        curvature: The matrix of its equation: `responses.Hessian()`, or `GaussNewton(...)`, which is definite.

    Raises:
        ConvergenceError: With `strict`, when a solve misses `tolerance`; else a
            `FollowerNonConvergenceWarning` says by how much.
        NotSymmetricError: If the linear solver needs a symmetric Jacobian and the follower has none.
        ConstraintError: If a follower's constraints contradict each other, are dependent where they bind, or leave it
            no strict minimum; a `KinkWarning` where they are about to bind or to let go.

    Source: Bengio 2000; Pedregosa 2016 (arXiv 1602.02355); Lorraine et al. 2020 (arXiv 1911.02590).

    Examples:
        >>> from functools import partial
        >>> Implicit(partial(torch.optim.Adam, lr=1e-3), steps=100).tolerance
        0.001
    """

    optimizer: OptimizerFactory | InnerSolver
    steps: int = 100
    tolerance: float | None = 1e-3
    linear_solver: LinearSolver | None = None
    warm_start: bool = True
    strict: bool = False
    inexactness: Inexactness | None = None
    batches: Batches = field(default_factory=HeldBatch)
    curvature: Curvature = field(default_factory=Hessian)

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.steps < 1:
            raise ValueError(f"Implicit: steps={self.steps}; expected at least 1.")
        if self.tolerance is not None and not self.tolerance >= 0.0:
            raise ValueError(f"Implicit: tolerance={self.tolerance}; expected a number >= 0, or None.")
        require_solver("Implicit: optimizer", self.optimizer)
        if not (self.linear_solver is None or isinstance(self.linear_solver, LinearSolver)):
            raise TypeError(
                f"Implicit: linear_solver is {self.linear_solver!r}; expected one such as ConjugateGradient()."
            )
        if not (self.inexactness is None or isinstance(self.inexactness, Inexactness)):
            raise TypeError(
                f"Implicit: inexactness is {self.inexactness!r}; expected Geometric(), AsLeaderMoves() or None."
            )

        if not isinstance(self.batches, Batches):
            raise TypeError(
                f"Implicit: batches is {self.batches!r}; expected HeldBatch(), FreshBatches() or AllBatches()."
            )

        if not isinstance(self.curvature, Curvature):
            raise TypeError(f"Implicit: curvature is {self.curvature!r}; expected Hessian() or GaussNewton(...).")

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call; refuses captured tensors and hyperparameters of the inner optimiser."""
        game = self._bounded(game, game.names[-1] if follower is None else follower)
        state = fresh_state(game, follower, seed, many=True, constrained=True)
        inner = self._solver
        optimizer = inner if isinstance(inner, TorchOptimizer) else None
        refuse_optimizer_hyper(self, game, state["follower"], optimizer)
        start = at_start(game, state, inner.names)
        require_second_derivative(start, state)
        refuse_captured(start, state)
        inner.refuse(start, "Implicit")
        linear = self._linear(start)
        if not start.symmetric and linear.needs_symmetry:
            raise NotSymmetricError(
                f"Implicit: the residual of {start.name!r} has no symmetric Jacobian, since it is no single loss's "
                f"gradient, and {type(linear).__name__} needs one. Use linear_solver=GMRES(), or Dense() "
                "for a few hundred unknowns."
            )
        if start.symmetric and linear.needs_symmetry:
            require_symmetric("Implicit", start, start.as_unknowns(state))
        if not start.definite and start.symmetric and linear.needs_symmetry:
            raise IndefiniteSystemError(
                f"Implicit: the system of {start.name!r} has multipliers, and with them is indefinite; "
                f"{type(linear).__name__} needs a positive definite one. Leave linear_solver= out, or use "
                "linear.Dense() for a few hundred unknowns, or GMRES()."
            )
        if game.is_spread(start.name) and not inner.takes_parts:
            game.require_whole(f"Implicit({inner!r})", [start.name])
        if game.is_spread(start.name) and not linear.takes_parts:
            game.require_whole(f"Implicit(linear_solver={linear!r})", [start.name])
        self.batches.require(game, start, linear)
        self.curvature.require(start)
        if linear.needs_factors:
            held = isinstance(self.batches, HeldBatch)
            missing = self.curvature.without_factors(start) if held else f"batches={self.batches!r} gives no one matrix"
            if missing:
                raise ValueError(
                    f"Implicit: the preconditioner of {type(linear).__name__} is of Kronecker factors, and {missing}. "
                    "They come with curvature=GaussNewton(...) of a module, on a held batch. Elsewhere use Diagonal()."
                )
        solver, flat, shapes = start.adapted_linear(linear), start.as_unknowns(state), start.unknowns.shapes
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
        if not of_optimizer(before):  # nothing, or what an inner solver of another kind remembers
            return super().adopt(saved, start)
        kept: Any = kept_memory(self._solver.factory, leaves(y), leaf_memory(before), leaf_names(y, start["follower"]))
        if isinstance(before, dict) and "schedule" in before:
            kept = {"leaves": kept, "schedule": place_alone(before["schedule"])}
        return super().adopt(saved, start) | {"optimizer": kept}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The follower's optimum, differentiable in `others` to any order, and the state to continue from."""
        game = self._bounded(game, state["follower"])
        follower = game.follower(others, state, batch, further=named_by(self.optimizer))
        linear = self._linear(follower)
        solver = follower.adapted_linear(linear)
        looser = self._looser(follower, state)
        if transforms_active():
            below = _Solve(self, game, follower, state, batch, looser)
            # A task's batch is an input as the leader's variables are: under vmap both may have a row for each task.
            inputs = [*follower.xs, *below.given.tensors]
            (y,) = below_transforms(below, inputs)  # root attaches its derivatives
            after, receipt, products, rest, examine = state, None, None, None, None
            follower.batch = below.held(follower)
            residual = self.batches.residual(follower, state)
            source = self.batches.products(follower, residual, self._pull)
            if source is not None and source.refusal:
                raise SecondDerivativeError(source.refusal)
        else:
            rest, after, residual, products, examine, source = self._solve(game, follower, state, looser)
            y = rest.unknowns
            before, kept = state["linear"], self._solver.remembered(after["optimizer"])
            after["products"] += int(before["products"])
            receipt = Receipt(
                before["adjoint"],
                torch.full_like(before["residual"], torch.nan),
                torch.zeros_like(before["products"]),
                torch.full_like(before["error"], torch.nan),
                solver.inform(before["memory"], kept),
            )
            examine = self._examined(examine, follower, residual, y, receipt)
            blank = vars(Receipt.blank(y))
            after["linear"] = before | {key: blank[key] for key in ("residual", "products", "error")}
        attached = attach(
            residual,
            y,
            follower.xs,
            linear_solver=follower.adapted_linear(linear.loosened(looser)),
            symmetric=follower.symmetric,
            shapes=follower.unknowns.shapes,
            receipt=receipt,
            products=products,
            examine=examine,
            source=source,
        )
        if rest is not None and rest.other_side is not None and attached.requires_grad:
            tell_of_kink(attached, rest, follower, residual, linear)
        return follower.answer(attached), after

    @property
    def promise(self) -> Promise:
        """The optimum's derivative; with another matrix than the Hessian an estimate of it."""
        return self.curvature.promise

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
        rtol = (self.linear_solver or ConjugateGradient()).rtol or 0.0
        return Behaviour(warm=self.warm_start, warns=self.tolerance is not None, rtol=rtol)

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
        source = source_of(answer)
        moved = {} if source is None else source.learned()
        return (
            state | moved | {"linear": vars(receipt).copy()}
        )  # a second backward pass through this answer replaces them

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

    @property
    def _pull(self) -> Pull | None:
        return None if self.curvature.exact else self.curvature.pull

    def _linear(self, follower: Follower) -> LinearSolver:
        if self.linear_solver is not None:
            return self.linear_solver
        if follower.symmetric and follower.definite:
            return ConjugateGradient()
        if follower.multipliers or follower.symmetric:
            return Dense() if follower.size <= _DENSE else GMRES(restart=100)
        return GMRES()

    def _bounded(self, game: Game, name: str) -> Game:
        """The game in which the bounds that the inner solver keeps are the follower's: there its optimum is."""
        if name not in game.names or not game.residual(name).minimises:
            return game
        domain = self._solver.domain(game.form_of_one(name))
        return game if domain is None else game.within(name, domain)

    def _solve(
        self, game: Game, follower: Follower, state: State, looser: float
    ) -> tuple[Rest, State, FixedResidual, Pullback | None, Examine | None, Products | None]:
        """The optimum `[n]` found by plain steps, the state after them, F there, and the graph of F that judged it.

        Last come what will judge it by the backward solve, where there will be one, and what makes other products than
        that graph's.
        """
        with torch.no_grad():
            start, kept = follower.begins(state, warm=self.warm_start)
        memory = state["optimizer"] if kept else None
        solver = follower.adapted_inner(self._solver)
        tolerance = 0.0 if self.tolerance is None else loosened(self.tolerance, looser)
        scale = follower.measure(state, start if tolerance > 0.0 else None)
        with torch.no_grad():
            y, memory = minimised(
                solver, follower, start, memory, steps=self.steps, threshold=scale.threshold(tolerance)
            )
            advice = "Lower the inner learning rate, use another inner solver, or check for an optimum at infinity."
            follower.require_finite(y, advice)
            rest = follower.brought_to_rest(y)
        residual, flat = self.batches.residual(follower, state), rest.unknowns
        tracked = [x.requires_grad and torch.is_grad_enabled() for x in follower.xs]
        source = self.batches.products(follower, residual, self._pull)
        slope, products = self._judged(residual, flat, follower.xs, tracked, source)
        follower.gradient_count += 1
        if source is not None and any(tracked):
            follower.gradient_count += self.curvature.check(residual, flat, follower.xs, scale.unit)
        follower.require_finite(y, advice, residual.loss)
        missed = None
        if self.tolerance is not None:
            missed, scale = follower.missed(scale, tolerance, slope, residual, flat)
        if missed is not None:
            how_far, games = missed
            moving = not follower.fixed and follower.position is not None
            drawn = moving and follower.game.pass_length(follower.name) != 1
            remedy = (
                "With another batch in each step it does not come to rest: accept it by tolerance=None, or give larger "
                "batches."
                if drawn
                else "Give it more steps or another optimiser (torch's LBFGS also stops by its own tolerance_grad and "
                "tolerance_change), or accept it by tolerance=None."
            )
            message = (
                f"Implicit: the gradient of player {follower.name!r} is still {how_far} "
                f"after {self.steps} steps; wanted {tolerance:g}. The hypergradient is biased by as much, by more "
                f"where the follower is ill-conditioned. {remedy}"
            )
            self._tell(FollowerNonConvergenceWarning(message, games=games), stacklevel=4)
        if any(tracked):
            self._warn_of_kinks(follower, residual.kinks(flat, *follower.xs))
        after: dict[str, Any] = state | {
            **follower.kept(flat),
            "optimizer": memory,
            "data": follower.position,
            "buffers": follower.buffers.get(follower.name, {}),
            "gradients": state["gradients"] + follower.gradient_count,
            "stationarity": follower.norm(follower.unknowns.split(slope)) / scale.shown,
            "reference": scale.reference,
            "terms": scale.terms,
        }
        if self.inexactness is not None:
            after["leader"] = self._tracked(state, follower, looser)
        if products is None or follower.multipliers:  # who has multipliers was brought to rest to all digits
            return rest, after, residual, products, None, source
        if source is not None and source.random:  # no u of theirs solves one equation
            return rest, after, residual, products, None, source
        # A tolerance that was loosened on purpose is far from the optimum on purpose.
        near = self.tolerance is not None and missed is None and looser <= 1.0
        curved = not follower.rests.projects  # curvature at a bound says nothing
        examination = Examination(
            game,
            follower,
            residual,
            flat,
            slope,
            reference=scale.unit,
            near=near,
            curved=curved,
            # Away from its optimum a network's curvature has any sign.
            hidden=near and not self._linear(follower).tells_indefinite,
        )
        told = examination.at_once([x for x, track in zip(follower.xs, tracked, strict=True) if track], products)
        after["products"] += examination.products
        if told is not None:
            self._tell(told, stacklevel=4)

        def examine(*solved: Any) -> int:
            before = examination.products
            for warning in examination(*solved):
                self._tell(warning, stacklevel=2)
            return examination.products - before

        return rest, after, residual, products, examine, source

    def _examined(
        self, examine: Examine | None, follower: Follower, residual: FixedResidual, y: Tensor, receipt: Receipt
    ) -> Examine | None:
        """The same, and what the curvature and other batches say of the solve, which goes into the receipt."""
        solver = follower.adapted_linear(self._linear(follower))
        given = (follower, residual, y, solver)
        judges = [judge for asked in (self.curvature, self.batches) if (judge := asked.judge(*given)) is not None]
        if not judges:
            return examine

        def both(found: LinearSolution, rhs: Tensor, given: Any, mixed: Any, products: Pullback) -> int:
            taken = 0 if examine is None else examine(found, rhs, given, mixed, products)
            for judge in judges:
                error, more, told = judge(found, rhs, mixed, products)
                taken += more
                receipt.error = torch.full_like(receipt.error, error)
                if told:
                    self._tell(UnreliableResponseWarning(f"Player {follower.name!r}: {told}"), stacklevel=2)
            return taken

        return both

    def _warn_of_kinks(self, follower: Follower, kinks: Kinks) -> None:
        if kinks:
            warnings.warn(KinkWarning(follower.told_kinks(kinks), games=follower.games_of(kinks)), stacklevel=4)

    def _tell(self, warning: BilevelWarning, stacklevel: int) -> None:
        """Warn; raise when `strict`."""
        if self.strict:
            raise ConvergenceError(str(warning))
        warnings.warn(warning, stacklevel=stacklevel)

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
        residual: FixedResidual, y: Tensor, xs: list[Tensor], tracked: list[bool], source: Products | None
    ) -> tuple[Tensor, Pullback | None]:
        """F(y, *xs), and its pullback in y and the tracked of xs when there are any: the graph that backward needs."""
        if not any(tracked):
            with torch.no_grad():
                return residual(y, *xs), None

        wanted = [index for index, track in enumerate(tracked) if track]
        if source is not None:
            with torch.no_grad():
                return residual(y, *xs), source.pull(y, xs, wanted)
        value, products = exact_products(residual, y, xs, wanted)
        return value.detach(), products


class _Solve:
    """The plain solve, called from inside a torch.func transform; a class of its own, so that no pytree opens it."""

    def __init__(
        self, response: Implicit, game: Game, follower: Follower, state: State, batch: Batch, looser: float
    ) -> None:
        self.response, self.game, self.state, self.batch, self.looser = response, game, state, batch, looser
        self.form, self.count = follower.input_form, len(follower.xs)
        self.last: Batch = batch
        self.given = BatchTensors(batch)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor]:
        batch = self.given.put(inputs[self.count :])
        given: Mapping[str, Variables] = self.form.build(inputs[: self.count])
        follower = self.game.follower(given, self.state, batch, further=given)
        rest, *_ = self.response._solve(self.game, follower, self.state, self.looser)
        self.last = follower.batch
        if rest.kink:
            told = "Take the derivative outside torch.func to be told both."
            warnings.warn(KinkWarning(f"{kink_of(follower, rest)} {told}"), stacklevel=2)
        return (rest.unknowns,)

    def held(self, follower: Follower) -> Batch:
        """The batch that the solve ended on."""
        return self.last if self.batch is None else follower.batch
