"""One step of everything a call: the follower and its adjoint move together, on minibatches as they come."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import nearest, pullback, transforms_active
from bilevel.errors import LinearNonConvergenceWarning, NonFiniteError
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.game.situation import Buffers, Situation
from bilevel.inner import TorchOptimizer
from bilevel.inner.optimizer import torch_optimizer
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.randomness import random_kept, random_state
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
from bilevel.responses.first_order import BackwardPass, attach
from bilevel.responses.promise import Behaviour, Estimate, Optimum, Promise, Report
from bilevel.tree import Structure, Variables, cut, flatten, join, leaf_names, leaves, structure_of
from bilevel.variance import VarianceReduction

_SECOND = (
    "SingleLoop's derivative is that of a running estimate, which has none, and a derivative of it was asked for "
    "(create_graph=True, or a hessian). Use Implicit, whose derivatives are of any order."
)
_LONG = 100  # steps over which the adjoint's equation is averaged before it is warned of
_POOR = 0.9  # of that average: an adjoint of 0 leaves 1
_SOON, _AWAY = 10, 10.0  # steps after which an average of so much tells of one that runs away


@final
@dataclass(frozen=True)
class SingleLoop(Response):
    r"""One step of the follower y and of its adjoint v a call, each on the same minibatch, for one step of the leader.

    Where Implicit solves both equations anew, \(\nabla_y g = 0\) and \(g_{yy} v = -f_y\), these two are on their way
    together with the leader: with the gradient \(f_y\) of the leader's loss f on its own batch,

    $$
    y \leftarrow y - \rho\, g_y, \qquad v \leftarrow v - \rho\, (g_{yy} v + f_y), \qquad
    \frac{df}{dx} \approx f_x + g_{xy} v,
    $$

    all at the point that the call begins at. The first call's v is 0, and its hypergradient has no indirect part. The
    report's `residual` is \(|g_{yy} v + f_y| / |f_y|\) as measured on the step's batches: 1 where v says nothing yet,
    and near 0 where the hypergradient is right for the present y. Call `after_backward` in each step: v moves there.

    Costs one gradient and one Hessian-vector product a call, and memory for three vectors beside the optimisers'.

    Args:
        optimizer: What steps y, along \(g_y\): a callable from tensors to a torch.optim optimiser, or
            `TorchOptimizer(...)` with a schedule. SGD for the method as it is published.
        adjoint: What steps v; None: the same as y, with a memory of its own.
        variance: How the directions of several batches are put together: None, each batch by itself (SOBA);
            `bilevel.variance.SAGA()` (SABA), `bilevel.variance.SARAH(period)` (SRBA).

    Raises:
        ValueError: When the state of a call comes back without its backward pass, by `after_backward`; and when
            the answer is differentiated twice, with different cotangents: there is one adjoint, for one leader.
        SecondDerivativeError: When its derivative is differentiated.
        NonFiniteError: When a direction is NaN or infinite.

    Warns:
        LinearNonConvergenceWarning: When the means of \(g_{yy} v + f_y\) and of \(f_y\) over the last hundred steps
            tell of an adjoint that is about as wrong as 0, or over the first ten and more of one ten times as wrong.

    Source: Dagréou et al. 2022 (SOBA and SABA, arXiv 2201.13409) and 2024 (SRBA, arXiv 2302.08766); the leader's moving
    average of MA-SOBA, Chen et al. 2023 (arXiv 2306.12067), is torch's SGD with momentum and dampening 1 - theta.

    Examples:
        >>> from functools import partial
        >>> SingleLoop(partial(torch.optim.SGD, lr=0.1)).promise.of
        Optimum()
    """

    optimizer: OptimizerFactory | TorchOptimizer
    adjoint: OptimizerFactory | TorchOptimizer | None = None
    variance: VarianceReduction | None = None

    def __post_init__(self) -> None:
        for option in (self._y_steps, self._v_steps):
            if option.accumulate > 1:
                raise ValueError(
                    f"SingleLoop: accumulate={option.accumulate}; a call takes one step on one batch. Give the player "
                    "larger batches."
                )
        if self.variance is not None and not isinstance(self.variance, VarianceReduction):
            raise TypeError(
                f"SingleLoop: variance={self.variance!r}; expected bilevel.variance.SAGA(), "
                "bilevel.variance.SARAH(period), or None."
            )

    @property
    def promise(self) -> Promise:
        """An estimate of the optimum's derivative, which gets better from call to call."""
        return Estimate(Optimum(), reason="one step of the follower and of the adjoint a call")

    @property
    def behaviour(self) -> Behaviour:
        """Warm; it warns of an adjoint that stays as wrong as 0 is, and of nothing in a first call."""
        return Behaviour(warm=True, warns=False)

    @property
    def steps_a_call(self) -> int:
        """One, always."""
        return 1

    @property
    def inner_optimizer(self) -> OptimizerFactory | None:
        """That of y."""
        return self._y_steps.factory

    def with_inner_optimizer(self, optimizer: OptimizerFactory) -> SingleLoop:
        """The same with another optimiser of y, and the same options around it."""
        options = self.optimizer if isinstance(self.optimizer, TorchOptimizer) else None
        return replace(self, optimizer=optimizer if options is None else replace(options, factory=optimizer))

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call; refuses captured tensors and hyperparameters of the inner optimisers."""
        state = fresh_state(game, follower, seed)
        name, y = state["follower"], leaves(state["variables"])
        if self.variance is not None:
            told = f"SingleLoop(variance={self.variance!r})"
            game.require_whole(told, [name, *game.arguments(name)])
            game.require_end(name, told)
        for steps in (self._y_steps, self._v_steps):
            refuse_optimizer_hyper(self, game, name, steps)
            built = steps.build([leaf.clone() for leaf in y], leaf_names(state["variables"], name))
            if isinstance(built, torch.optim.LBFGS):
                raise TypeError(
                    "SingleLoop takes one step along one direction, and LBFGS searches along a loss. Use SGD or Adam, "
                    "or Implicit(LBFGS, ...)."
                )
        start = at_start(game, state)
        if start.rests.projects:
            raise TypeError(
                f"SingleLoop: player {start.name!r} has {start.rests.told}, which its steps would leave. Use "
                "Implicit, which differentiates the constraints that bind."
            )
        require_second_derivative(start, state)
        refuse_captured(start, state)
        nothing = torch.zeros_like(flatten(state["variables"]))
        adjoint = {
            "v": nothing,
            "optimizer": None,
            "awaiting": False,
            "residual": math.nan,
            "left": nothing,
            "slope": nothing,
            "count": 0,
        }
        return state | {"optimizer": None, "variance": {}, "adjoint": adjoint, "loss": None}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """Where y is, differentiable once in `others` by v, and the state with y a step further."""
        follower = game.follower(others, state, batch)
        name, y = follower.name, flatten(state["variables"])
        if transforms_active():
            given = BatchTensors(batch)

            def slopes(xs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
                there = game.follower(follower.input_form.build(xs), state, given.put(tensors))
                return self._directions(game, there, state)[0].mixed

            return follower.form.unflatten(attach(_Loop(name, slopes), y, follower.xs, given.tensors)), state
        self._require_learned(name, state)
        self._tell(name, state)
        found, memory = self._directions(game, follower, state)
        moved, optimizer = _stepped(self._y_steps, name, follower.form, y, found.own, state["optimizer"])
        loop = _Loop(name, lambda xs, tensors: found.mixed, found.product)
        answer = attach(loop, y, follower.xs, [])
        after = follower.next_state(
            state, follower.form.split(moved), follower.form.split(found.own),
            gradients=found.evaluations, products=found.evaluations,
        )  # fmt: skip
        adjoint = state["adjoint"] | {"awaiting": answer.requires_grad, "residual": math.nan}
        return follower.form.unflatten(answer), after | {
            "optimizer": optimizer,
            "variance": memory,
            "adjoint": adjoint,
            "loss": found.loss if follower.tells_its_loss else None,
        }

    def after_backward(self, state: State, answer: Variables) -> State:
        """The state with v a step further; as it is when no backward pass has come through `answer`."""
        loop = nearest(leaves(answer), "backward_pass", _Loop)
        if loop is None or loop.cotangent is None or loop.product is None:
            return state
        before, cotangent = state["adjoint"], loop.cotangent
        direction = loop.product + cotangent
        left = _finite_norm(loop.name, direction, "the direction of its adjoint")
        size = float(torch.linalg.vector_norm(cotangent))
        residual = left / size if size > 0.0 else (0.0 if left == 0.0 else math.inf)
        count = before["count"] + 1
        share = 1.0 / min(count, _LONG)
        means = {
            "left": torch.lerp(before["left"], direction, share),
            "slope": torch.lerp(before["slope"], cotangent, share),
        }
        form = structure_of(state["variables"])
        v, optimizer = _stepped(self._v_steps, loop.name, form, before["v"], direction, before["optimizer"])
        learned = {"v": v, "optimizer": optimizer, "awaiting": False, "residual": residual}
        return state | {"adjoint": learned | means | {"count": count}}

    def report(self, state: State) -> Report:
        """What is left of both equations, as measured on the last step's batches."""
        residual = state["adjoint"]["residual"]
        return Report(int(state["gradients"]), int(state["products"]), state["stationarity"], residual)

    @cached_property
    def _y_steps(self) -> TorchOptimizer:
        return torch_optimizer("SingleLoop", self.optimizer)

    @cached_property
    def _v_steps(self) -> TorchOptimizer:
        return self._y_steps if self.adjoint is None else torch_optimizer("SingleLoop: adjoint", self.adjoint)

    def _directions(self, game: Game, follower: Follower, state: State) -> tuple[_Directions, Any]:
        """What y, v and the leader step along, and what the variance reduction remembers."""
        mean = _Batches(game, follower, flatten(state["variables"]), state["adjoint"]["v"])
        if self.variance is None:
            parts, memory = mean.parts_here(), state["variance"]
        else:
            whole, memory = self.variance.direction(mean, state["variance"])
            parts = mean.split(whole)
        if not transforms_active():
            for part in parts:
                _finite_norm(follower.name, part, "a direction of its single loop")
        own, product, *mixed = parts
        follower.buffers = mean.buffers
        return _Directions(own, product, mixed, mean.loss, mean.evaluations), memory

    @staticmethod
    def _require_learned(name: str, state: State) -> None:
        if state["adjoint"]["awaiting"]:
            raise ValueError(
                f"SingleLoop: the state of player {name!r} comes back without what the last call's backward pass "
                "learned. Its adjoint would stay as it is, and the leader would never see the follower move. After "
                "loss.backward(): state = response.after_backward(state, answer). A call for the value alone belongs "
                "under torch.no_grad()."
            )

    @staticmethod
    def _tell(name: str, state: State) -> None:
        # Of the means of the vectors, in which the noise of single batches is small.
        adjoint = state["adjoint"]
        count = int(adjoint["count"])
        if count < _SOON:
            return
        left, slope = (float(torch.linalg.vector_norm(adjoint[key])) for key in ("left", "slope"))
        if left >= (_POOR if count >= _LONG else _AWAY) * slope and slope > 0.0:
            message = (
                f"SingleLoop: on average over the last {min(count, _LONG)} steps the adjoint of player {name!r} has "
                f"left {left / slope:.3g} of its equation; an adjoint of 0 would leave 1. The hypergradient is not to "
                "be trusted. Give adjoint= another learning rate, or lower that of optimizer= or of the leader."
            )
            warnings.warn(LinearNonConvergenceWarning(message), stacklevel=3)


@dataclass(frozen=True)
class _Directions:
    """F `[n]`, F_y'v `[n]`, F_x'v in each leaf of the others, the loss, and how many evaluations they took."""

    own: Tensor
    product: Tensor
    mixed: list[Tensor]
    loss: Tensor | None
    evaluations: int


class _Batches:
    """F, F_y'v and F_x'v, stacked, as a mean over a follower's batches."""

    def __init__(self, game: Game, follower: Follower, y: Tensor, v: Tensor) -> None:
        self._game, self._follower = game, follower
        self.owner, self.batch = follower.name, follower.batch
        position = follower.position
        self._fixed = follower.fixed
        known = isinstance(position, dict) and "epoch" in position and not follower.fixed
        self.epoch: int | None = position["epoch"] if known else None
        self.length = game.pass_length(follower.name)
        self._xs = [x.detach() for x in follower.xs]
        self._shapes = [y.shape, v.shape, *(x.shape for x in self._xs)]
        self._where = [y, v, *self._xs]
        self._random = random_state(game.device)
        self.buffers: Buffers = follower.buffers
        self.loss: Tensor | None = None
        """The follower's on the first batch that is evaluated."""
        self.evaluations = 0

    @cached_property
    def point(self) -> Tensor:
        """Y, v and the others' leaves, as one vector."""
        return join(self._where)

    def split(self, vector: Tensor) -> list[Tensor]:
        """y, v and the others' leaves of a point; F, F_y'v and F_x'v of a direction."""
        return cut(vector, self._shapes)

    def here(self) -> Tensor:
        """On the step's batch, where it is; the module's buffers advance."""
        return join(self.parts_here())

    def parts_here(self) -> list[Tensor]:
        """The same, F, F_y'v and F_x'v apart: those who play may hold parts of their vectors, or all of them."""
        found, self.buffers = self._parts(self._where, self.batch)
        return found

    def at(self, point: Tensor) -> Tensor:
        """On the step's batch elsewhere, with the same random numbers."""
        with random_kept(self._game.device, start=self._random):
            return self._evaluate(point, self.batch)[0]

    def everywhere(self) -> Tensor:
        """The mean over the pass."""
        if self._fixed:
            return self.here()
        total, count = None, 0
        for batch in self._game.whole_pass(self.owner, self._follower.position, "SingleLoop(variance=...)"):
            found, buffers = self._evaluate(self.point, batch)
            if total is None:
                self.buffers = buffers
            total, count = found if total is None else total + found, count + 1
        assert total is not None
        return total / count

    def _evaluate(self, point: Tensor, batch: Batch) -> tuple[Tensor, Buffers]:
        found, buffers = self._parts(self.split(point), batch)
        return join(found), buffers

    def _parts(self, where: Sequence[Tensor], batch: Batch) -> tuple[list[Tensor], Buffers]:
        follower = self._follower
        y, v, *xs = where
        self.evaluations += 1
        buffers: Buffers = {}

        def residual(y: Tensor, *xs: Tensor) -> Tensor:
            others = follower.input_form.build(xs)
            here = Situation(follower.game, self.owner, others, batch, follower.buffers)
            loss, slopes, after = follower.rests(here, follower.form.split(y))
            self.loss = loss.detach() if self.loss is None else self.loss
            buffers.update(after)
            return join(slopes)

        with torch.no_grad():
            value, products = pullback(residual, y, *xs)
            return [part.detach() for part in (value, *products(v))], buffers


def _stepped(
    steps: TorchOptimizer, name: str, form: Structure, at: Tensor, direction: Tensor, memory: Any
) -> tuple[Tensor, Any]:
    """One step along a direction, and the optimiser's memory after it."""
    moved, memory = steps.step(name, form, form.split(at), form.split(direction), memory)
    return join(moved), memory


def _finite_norm(name: str, vector: Tensor, what: str) -> float:
    norm = float(torch.linalg.vector_norm(vector))
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"Player {name!r}: {what} became NaN or infinite. Lower the learning rates of optimizer= and adjoint=; "
            "a step size must be below 2 over the largest curvature of any batch."
        )
    return norm


class _Loop(BackwardPass):
    """What a call leaves for its backward pass. `cotangent` is what that left; None before it."""

    asker = "SingleLoop"
    refusal = _SECOND

    def __init__(
        self,
        name: str,
        slopes: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]],
        product: Tensor | None = None,
    ) -> None:
        self.name, self.slopes, self.product = name, slopes, product
        self.cotangent: Tensor | None = None

    def pulled(
        self,
        cotangent: Tensor,
        y: Tensor,
        xs: Sequence[Tensor],
        tensors: Sequence[Tensor] | None,
        wanted: Sequence[int],
    ) -> tuple[Tensor, ...]:
        """F_x'v for the wanted of xs."""
        if self.product is not None:
            self.learn(cotangent)
        mixed = self.slopes(xs, tensors or [])
        return tuple(mixed[index].clone() for index in wanted)

    def learn(self, cotangent: Tensor) -> None:
        """Take the cotangent of the one leader."""
        if self.cotangent is not None and not torch.equal(self.cotangent, cotangent):
            raise ValueError(
                f"SingleLoop keeps one adjoint of player {self.name!r}, for one leader's loss, and the answer of one "
                "call was differentiated twice, with different cotangents. With several leaders, or for a Jacobian, "
                "use Implicit or Nudged."
            )
        self.cotangent = cotangent.clone()
