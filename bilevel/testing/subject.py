"""What the laws are asked of: a response, or anybody's function that gives a hypergradient."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import BilevelWarning
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.responses import Optimum, Promise, Report, Response, Steps
from bilevel.testing.families import Quadratic
from bilevel.testing.known import KnownGame
from bilevel.tree import Variables, leaves, map_leaves, structure_of

_LONGEST = 2048
_REACHED = 1e-6
# The slowest game that the strategies draw, both curvatures at once.
_SLOWEST = Quadratic(curvatures=(0.17, 1.0), coupling=((1.0,), (1.0,)), at=(0.5,), axis=(1.0, 0.5), target=(1.0, -1.0))


class NotOffered(Exception):  # noqa: N818 - an answer, not an error
    """A subject has no such thing; the message says what."""


@dataclass(frozen=True)
class Evaluation:
    """One answer: the hypergradient `[n]`, and what came with it.

    `follower` is the y `[m]` that it was taken at. `residual` is what the answer itself says is left of the equation
    for its derivative, relative; 0 when it says nothing, infinite when it states no bias either. `second` `[n, n]` is
    the derivative of the hypergradient, on request. `stationarity` is |grad_y f| over that at the start as reported,
    nan when nothing is.
    """

    gradient: Tensor
    follower: Tensor
    dtype: torch.dtype
    residual: float = 0.0
    stationarity: float = math.nan
    warnings: tuple[str, ...] = ()
    second: Tensor | None = None


class Subject(ABC):
    """Something that claims to give hypergradients."""

    @abstractmethod
    def evaluate(self, known: KnownGame, steps: int, *, second: bool = False, maximize: bool = False) -> Evaluation:
        """The hypergradient at the game's point, after `steps` steps of the follower from its start.

        With `maximize` the follower's optimiser climbs. Raises `NotOffered`.
        """

    @property
    @abstractmethod
    def optimizer(self) -> OptimizerFactory | None:
        """The follower's torch.optim optimiser, if it has one."""

    @property
    @abstractmethod
    def promise(self) -> Promise:
        """What it says its derivative is the derivative of."""

    @property
    def of_steps(self) -> bool:
        """Whether it promises the derivative of its steps, or an estimate of that; else it is of the optimum."""
        return self.promise.of_steps

    @property
    def estimates(self) -> bool:
        """Whether it promises no more than an estimate."""
        return self.promise.stated_bias != 0.0

    @cached_property
    def enough(self) -> int:
        """How many steps bring the follower to its optimum on the slowest game, or as near as more steps bring it."""
        steps, before = 8, math.inf
        while steps < _LONGEST:
            left = self.distance(_SLOWEST, steps)
            # A solver that stops at a tolerance of its own stays where it stopped.
            if left <= _REACHED * _SLOWEST.radius or (left >= before * 0.999 and left < 0.1):
                return steps
            before, steps = left, 2 * steps
        return steps

    def distance(self, known: KnownGame, steps: int) -> float:
        """How far from its optimum the follower is after so many steps."""
        return float((self.evaluate(known, steps).follower - known.best_response(known.x0)).norm())

    @property
    def linear_iteration(self) -> bool:
        """Whether the inner steps are a linear iteration on a quadratic loss, as those of SGD with momentum are."""
        return isinstance(self._built(), torch.optim.SGD)

    @property
    def plain_step(self) -> float | None:
        """The step size when the optimiser is gradient descent and nothing else."""
        built = self._built()
        if not isinstance(built, torch.optim.SGD) or len(built.param_groups) != 1:
            return None
        group = built.param_groups[0]
        if group["momentum"] or group["weight_decay"] or group["maximize"]:
            return None
        return float(group["lr"])

    def _built(self) -> torch.optim.Optimizer | None:
        return None if self.optimizer is None else self.optimizer([torch.zeros(1, requires_grad=True)])


def maximizing(factory: OptimizerFactory) -> OptimizerFactory:
    """The same optimiser, told to climb; raises `NotOffered` when it cannot be told."""

    def build(parameters: Any, **players: Any) -> torch.optim.Optimizer:
        optimizer = factory(parameters, **players)
        for group in optimizer.param_groups:
            if "maximize" not in group:
                raise NotOffered(f"{type(optimizer).__name__} has no option `maximize`.")
            group["maximize"] = True
        return optimizer

    return build


@dataclass(frozen=True)
class ResponseSubject(Subject):
    """A response of this library, or one that a user wrote."""

    response: Response
    seed: int = 0
    _memo: dict[Any, Evaluation] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def optimizer(self) -> OptimizerFactory | None:
        """The response's own."""
        return self.response.inner_optimizer

    @property
    def promise(self) -> Promise:
        """The response's own."""
        return self.response.promise

    def with_steps(self, steps: int) -> Response:
        """The response with another budget; as it is when it has none."""
        return self.response.with_budget(steps) if self.adjustable else self.response

    @property
    def adjustable(self) -> bool:
        """Whether its budget can be set from outside."""
        return self.response.budget is not None

    def evaluate(self, known: KnownGame, steps: int, *, second: bool = False, maximize: bool = False) -> Evaluation:
        """By plain autograd through the leader's loss."""
        key = (known, steps, second, maximize)
        if key not in self._memo:
            if len(self._memo) > 64:
                self._memo.clear()
            self._memo[key] = self._evaluate(known, steps, second, maximize)
        return self._memo[key]

    def _evaluate(self, known: KnownGame, steps: int, second: bool, maximize: bool) -> Evaluation:
        response = self.with_steps(steps)
        if maximize:
            if self.optimizer is None:
                raise NotOffered("There is no torch.optim optimiser that could climb.")
            response = response.with_inner_optimizer(maximizing(self.optimizer))
        game = known.game()
        x = map_leaves(lambda t: t.requires_grad_(), game.initial("x"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y, after = response(game, {"x": x}, response.init(game, seed=self.seed))
            loss = game.loss("x", {"x": x, "y": y})
            if not loss.requires_grad:
                raise AssertionError("The response's answer has no graph: its derivative is lost.")
            slopes = torch.autograd.grad(
                loss, leaves(x), create_graph=second, allow_unused=True, materialize_grads=True
            )
        gradient = _read(known, x, slopes)
        report = response.report(response.after_backward(after, y))
        return Evaluation(
            gradient.detach().double(),
            known.follower_form.read(y).detach().double(),
            gradient.dtype,
            self._residual(report, gradient.numel()),
            float(report.stationarity),
            tuple(str(entry.message) for entry in caught if issubclass(entry.category, BilevelWarning)),
            _second(known, x, gradient) if second else None,
        )

    def _residual(self, report: Report, size: int) -> float:
        """What is left of the derivative's equation, by the report, for a leader of `size` entries."""
        residual = math.nan if report.residual is None else float(report.residual)
        if math.isnan(residual):
            return math.inf if math.isnan(self.promise.stated_bias) else 0.0
        # Measured in one random direction of n, it may be a lucky one: by ten with a chance of 1/10.
        return residual * 10.0 * math.sqrt(size) if self.response.behaviour.random else residual


@dataclass(frozen=True)
class FunctionSubject(Subject):
    """A function `hypergradient(leader, follower, x, y, *, optimizer, steps)`, of another library perhaps."""

    function: Callable[..., Variables]
    inner: OptimizerFactory
    promises_steps: bool
    linear_tolerance: float = 1e-7

    @property
    def optimizer(self) -> OptimizerFactory | None:
        """The optimiser that it is handed."""
        return self.inner

    @property
    def promise(self) -> Promise:
        """As declared."""
        return Steps() if self.promises_steps else Optimum()

    def evaluate(self, known: KnownGame, steps: int, *, second: bool = False, maximize: bool = False) -> Evaluation:
        """What the function gives; the follower's y is torch's own trajectory, which it is held to."""
        factory = maximizing(self.inner) if maximize else self.inner
        x0, y0 = known.x0.to(known.dtype), known.y0.to(known.dtype)
        x = map_leaves(lambda t: t.clone().requires_grad_(), known.leader_form.build(x0))
        y = map_leaves(lambda t: t.clone(), known.follower_form.build(y0))

        def leader(x: Variables, y: Variables) -> Tensor:
            return known.leader(known.leader_form.read(x), known.follower_form.read(y))

        def follower(x: Variables, y: Variables) -> Tensor:
            return known.follower(known.leader_form.read(x), known.follower_form.read(y))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = self.function(leader, follower, x, y, optimizer=factory, steps=steps)
        except NotImplementedError as missing:
            raise NotOffered(str(missing)) from missing
        gradient = _read(known, x, leaves(given))
        if second and not gradient.requires_grad:
            raise NotOffered("Its hypergradient cannot be differentiated again.")
        return Evaluation(
            gradient.detach().double(),
            trajectory_end(known, factory, steps),
            gradient.dtype,
            0.0 if self.promises_steps else self.linear_tolerance,
            second=_second(known, x, gradient) if second else None,
        )

    def distance(self, known: KnownGame, steps: int) -> float:
        """Of torch's own trajectory."""
        return float((trajectory_end(known, self.inner, steps) - known.best_response(known.x0)).norm())


def with_momentum(factory: OptimizerFactory, momentum: float) -> OptimizerFactory:
    """The same optimiser with momentum, if it is SGD."""

    def build(parameters: Any, **players: Any) -> torch.optim.Optimizer:
        optimizer = factory(parameters, **players)
        for group in optimizer.param_groups:
            if isinstance(optimizer, torch.optim.SGD):
                group["momentum"] = momentum
        return optimizer

    return build


def trajectory_end(known: KnownGame, factory: OptimizerFactory, steps: int, x: Tensor | None = None) -> Tensor:
    """Where torch's own optimiser takes the follower `[m]` from its start, the leader at x (default: its point)."""
    x, y = known.x0 if x is None else x, known.y0.clone().requires_grad_()
    optimizer = factory([y])
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(known.follower(x, y))
        optimizer.step()
    return y.detach()


def _read(known: KnownGame, x: Variables, slopes: Any) -> Tensor:
    """The hypergradient `[n]` from its leaves."""
    if any(slope is None for slope in slopes):
        raise AssertionError("A leaf of the hypergradient is None.")
    return known.leader_form.read(structure_of(x).build(list(slopes)))


def _second(known: KnownGame, x: Variables, gradient: Tensor) -> Tensor:
    rows = []
    for entry in gradient:
        slopes = torch.autograd.grad(entry, leaves(x), retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(_read(known, x, slopes))
    return torch.stack(rows).detach().double()
