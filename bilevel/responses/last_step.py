"""The leader differentiates the follower's last step alone, by a difference of first derivatives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import below_transforms, gradient, nearest, transforms_active
from bilevel.errors import UnreliableResponseWarning, require_kinds
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.game.follower import HeldLoss
from bilevel.inner.base import FIELD_RESPONSES, require_minimum
from bilevel.inner.optimizer import TorchOptimizer, torch_optimizer
from bilevel.inner.schedule import place_alone
from bilevel.inner.torch_optim import OptimizerFactory, kept_memory
from bilevel.randomness import random_kept, random_state
from bilevel.responses.base import Response, State, at_start, fresh_state, refuse_captured, refuse_optimizer_hyper
from bilevel.responses.batch_tensors import BatchTensors
from bilevel.responses.first_order import BackwardPass, attach
from bilevel.responses.own_functions import warn_of_first
from bilevel.responses.promise import Behaviour, Estimate, Optimum, Promise, Report
from bilevel.responses.unrolled.differentiation import Point, Steps
from bilevel.responses.unrolled.recipe import Recipe
from bilevel.tree import Variables, flatten, join, leaf_names, leaves, map_leaves

_SECOND = (
    "LastStep gives first derivatives alone, and a derivative of its derivative was asked for (create_graph=True, or a "
    "hessian). Use Implicit or Unrolled, whose derivatives are of any order."
)
_SPOILED = 0.1
"""The share of a difference that may be its own error before that is told."""
_WORSE = 1.5
"""What a derivative may leave of the adjoint's equation before it is told; no indirect part at all leaves 1."""


@final
@dataclass(frozen=True)
class LastStep(Response):
    r"""The follower takes `steps` steps, and the leader differentiates the last of them, by two gradients more.

    With that step's gradient g at the point y before it, the optimiser's own derivative turns the cotangent c of the
    answer into w, and a central difference does the rest:

    $$
    w = \Big(\frac{d\,\mathrm{step}}{dg}\Big)^{\!\top} c, \qquad
    c^\top \frac{dy}{dx} = \nabla_{xy} f\, w \approx
    \frac{\nabla_x f(x, y + h w) - \nabla_x f(x, y - h w)}{2 h}
    $$

    No derivative of a derivative is taken. With SGD, \(w = -\rho c\), and `steps=1` this is the second-order
    approximation of DARTS; with Adam \(w\) is scaled entry by entry, as SAMA does, which takes its difference at the
    answer. It is the exact derivative of one step, and as that of the optimum biased: \(-w\) stands for
    \(f_{yy}^{-1} c\). The same two gradients measure how well, in the report's `error`, which is its `residual` too
    where no bias is stated: \(|c + f_{yy} w| / |c|\), near 0 where the derivative is the optimum's, 1 where it says
    nothing.

    Costs `steps` gradients, and in backward two; the memory of one plain step.

    Args:
        optimizer: A callable from tensors to a torch.optim optimiser that `Unrolled` takes, or `TorchOptimizer(...)`.
        steps: Of it in a call.
        distance: \(|h w|\), how far apart the points are from y. None: the cube root of rounding, of the size of y.
        fitted: Scale \(w\) so that the residual is least: for optimisers whose steps have a scale of their own.
        bias: The relative error of the Jacobian that you stand for: \(|1 - \rho\lambda|\) at most, for SGD and
            curvatures \(\lambda\). NaN states none.

    Raises:
        TypeError: For a follower that minimises no loss, or within constraints.
        SecondDerivativeError: When its derivative is differentiated.

    Warns:
        UnreliableResponseWarning: When the residual is above 1.5, or `distance` spoils the difference.

    Source: Liu et al. 2019 (DARTS, arXiv 1806.09055); Choe et al. 2023 (SAMA, arXiv 2310.05674); the bias, Bolte et al.
    2023 (arXiv 2305.13768).

    Examples:
        >>> from functools import partial
        >>> LastStep(partial(torch.optim.SGD, lr=0.1)).promise.reason
        'differentiates the last step alone'
    """

    optimizer: OptimizerFactory | TorchOptimizer
    steps: int = 1
    distance: float | None = None
    fitted: bool = False
    bias: float = math.nan

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.steps < 1:
            raise ValueError(f"LastStep: steps={self.steps}; expected at least 1.")
        if self.distance is not None and not 0.0 < self.distance < math.inf:
            raise ValueError(f"LastStep: distance={self.distance}; expected a number above 0, or None.")
        if self.fitted and not math.isnan(self.bias):
            raise ValueError(
                "LastStep: bias= is that of a Jacobian, and fitted=True scales each cotangent by itself, so that there "
                "is none. Leave one of them out; the report's residual tells the error."
            )
        if self._settings.accumulate > 1:
            raise ValueError(
                f"LastStep: accumulate={self._settings.accumulate}; the last step is differentiated on its one batch. "
                "Give the player larger batches."
            )
        self.promise  # noqa: B018 - which refuses a negative bias

    @property
    def promise(self) -> Promise:
        """An estimate of the optimum's derivative, with `bias`."""
        return Estimate(Optimum(), self.bias, "differentiates the last step alone")

    @property
    def behaviour(self) -> Behaviour:
        """Warm; no accuracy is asked for."""
        return Behaviour(warm=True, warns=False)

    @property
    def budget(self) -> int:
        """Steps a call."""
        return self.steps

    def with_budget(self, steps: int) -> LastStep:
        """The same with so many steps a call."""
        return replace(self, steps=steps)

    @property
    def inner_optimizer(self) -> OptimizerFactory:
        """That of `optimizer`."""
        return self._settings.factory

    def with_inner_optimizer(self, optimizer: OptimizerFactory) -> LastStep:
        """The same with another optimiser, and the same options around it."""
        options = self.optimizer if isinstance(self.optimizer, TorchOptimizer) else None
        return replace(self, optimizer=optimizer if options is None else replace(options, factory=optimizer))

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call; refuses captured tensors and hyperparameters of the inner optimiser."""
        state = fresh_state(game, follower, seed)
        refuse_optimizer_hyper(self, game, state["follower"], self._settings)
        start = at_start(game, state)
        if start.constraints is not None or start.rests.projects:
            raise TypeError(
                f"LastStep: player {start.name!r} is constrained, and a difference does not see which constraints "
                "bind. Use Implicit or Unrolled, which differentiate them."
            )
        require_minimum(start, "LastStep", FIELD_RESPONSES)
        refuse_captured(start, state)
        warn_of_first("LastStep", start, flatten(state["variables"]))
        y = leaves(state["variables"])
        Recipe.of(self._settings, start, y, None, self.steps).stepper(y, None, 0, start.others)  # as it is called
        return state | {"optimizer": None, "schedule": None, "residual": math.nan}

    def adopt(self, saved: State, start: State) -> State:
        """With the optimiser's memory, where it is such as this one's; a schedule goes on at its step."""
        y, factory = start["variables"], self.inner_optimizer
        kept = kept_memory(factory, leaves(y), saved.get("optimizer"), leaf_names(y, start["follower"]))
        return super().adopt(saved, start) | {"optimizer": kept, "schedule": place_alone(saved.get("schedule"))}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The variables after `steps` steps, differentiable once in `others`, and the state to continue from."""
        follower = game.follower(others, state, batch)
        if transforms_active():
            given, count, began = BatchTensors(batch), len(follower.xs), random_state(game.device)

            def again(inputs: Sequence[Tensor]) -> _Step:
                others = follower.input_form.build(inputs[:count])
                with random_kept(game.device, start=began):
                    return self._stepped(game.follower(others, state, given.put(inputs[count:])), state)

            (flat,) = below_transforms(
                lambda *inputs: (join(again(inputs).end),), [*follower.xs, *given.tensors], _SECOND
            )
            last = _Last(self, follower.name, lambda xs, tensors: again([*xs, *tensors]))
            return follower.form.unflatten(attach(last, flat.detach(), follower.xs, given.tensors)), state
        step = self._stepped(follower, state)
        follower.require_finite(step.end, "Lower the learning rate of its inner optimiser.")
        answer = attach(_Last(self, follower.name, lambda xs, tensors: step), join(step.end), follower.xs, [])
        after = follower.next_state(state, step.end, step.slopes)
        learned = {"optimizer": step.memory, "schedule": step.recipe.place_after, "residual": math.nan}
        return follower.form.unflatten(answer), after | learned

    def after_backward(self, state: State, answer: Variables) -> State:
        """The state with what was left of the adjoint's equation, and two gradients more."""
        last = nearest(leaves(answer), "backward_pass", _Last)
        if last is None or math.isnan(last.residual):
            return state
        return state | {"residual": last.residual, "gradients": state["gradients"] + 2}

    def report(self, state: State) -> Report:
        """With what the last derivative left of the equation for the optimum's; as an error alone where a bias is."""
        left = state["residual"]
        residual = left if math.isnan(self.bias) else None  # else the bias would be granted twice
        return Report(int(state["gradients"]), int(state["products"]), state["stationarity"], residual, left)

    @property
    def _settings(self) -> TorchOptimizer:
        return torch_optimizer("LastStep", self.optimizer)

    @torch.no_grad()
    def _stepped(self, follower: Follower, state: State) -> _Step:
        """All steps, and the last one ready to be taken again."""
        start, _ = follower.begins(state, warm=True)
        memory = state["optimizer"]
        memory = None if memory is None else [map_leaves(_cloned, slot) for slot in memory]
        recipe = Recipe.of(self._settings, follower, start, state["schedule"], self.steps)
        steps = Steps(recipe, follower, follower.others)
        before = steps.stand_still(Point([leaf.clone() for leaf in start], memory), self.steps - 1)
        held: list[HeldLoss] = []
        slopes = steps.gradients(before.y, follower.others, lambda: held.append(follower.held_loss()))
        steps.require_finite(before.y)
        stepper = recipe.stepper(before.y, before.memory, before.taken, follower.others)
        end = [leaf.detach() for leaf in stepper.step(before.y, slopes)]
        after = [map_leaves(_cloned, slot) for slot in stepper.memory or ()]
        return _Step(recipe, before, held[0], slopes, end, after, follower.others)


@dataclass(frozen=True, eq=False)
class _Step:
    """A step that was taken, outside any graph: where it began, along which gradients, on what, and where it ended."""

    recipe: Recipe
    before: Point
    loss: HeldLoss
    slopes: list[Tensor]
    end: list[Tensor]
    memory: list[dict[str, Any]]
    others: Mapping[str, Variables]

    def pulled(self, cotangent: Tensor) -> Tensor:
        """(d end / d slopes)^T c `[n]`, through the optimiser alone."""
        with torch.enable_grad():
            slopes = [slope.detach().clone().requires_grad_() for slope in self.slopes]
            stepper = self.recipe.stepper(self.before.y, self.before.memory, self.before.taken, self.others)
            ends = stepper.step(self.before.y, slopes)
            moved = [(end, c) for end, c in zip(ends, self.recipe.form.split(cotangent), strict=True)]
            moved = [(end, c) for end, c in moved if end.requires_grad]
            if not moved:
                return torch.zeros_like(cotangent)
            found = torch.autograd.grad([e for e, _ in moved], slopes, [c for _, c in moved], materialize_grads=True)
        return join([slope.detach() for slope in found])


class _Last(BackwardPass):
    """What a call leaves for its backward pass, and `residual`, what that left; NaN before it."""

    asker = "LastStep"
    refusal = _SECOND

    def __init__(
        self, response: LastStep, name: str, step: Callable[[Sequence[Tensor], Sequence[Tensor]], _Step]
    ) -> None:
        self.response, self.name, self._step = response, name, step
        self.residual = math.nan

    @torch.no_grad()
    def pulled(
        self,
        cotangent: Tensor,
        y: Tensor,
        xs: Sequence[Tensor],
        tensors: Sequence[Tensor] | None,
        wanted: Sequence[int],
    ) -> tuple[Tensor, ...]:
        """c' dy/dx for the wanted of xs, by a difference along w."""
        step, norm = self._step(xs, tensors or []), torch.linalg.vector_norm
        w, size = step.pulled(cotangent), float(norm(cotangent))
        length = float(norm(w))
        if size == 0.0 or length == 0.0:
            self.residual = 0.0 if size == 0.0 else 1.0
            return tuple(torch.zeros_like(xs[index]) for index in wanted)
        at, distance = join(step.before.y), self._distance(step)
        moved = w / length * distance

        def slopes(y: Tensor) -> list[Tensor]:
            def loss(y: Tensor, *some: Tensor) -> Tensor:
                every = list(xs)
                for index, x in zip(wanted, some, strict=True):
                    every[index] = x
                return step.loss(y, *every)

            return list(gradient(loss, y, *(xs[index] for index in wanted))[1])

        (up, *above), (down, *below) = slopes(at + moved), slopes(at - moved)
        scale = length / (2.0 * distance)
        product = (up - down) * scale
        spoiled = self._spoiled(join(step.slopes), up, down, distance)
        share = 1.0
        if self.response.fitted and float(norm(product)) > 0.0:
            share = -float(torch.dot(cotangent, product) / torch.dot(product, product))
        self.residual = float(norm(cotangent + share * product)) / size
        if self.residual > _WORSE and not spoiled:
            self._tell(
                f"the derivative of the last step of player {self.name!r} leaves {self.residual:.3g} of the equation "
                "for the optimum's, where no indirect part at all would leave 1: the step is too long for the "
                "curvature along the leader's slope, or in a scale of its own. Use fitted=True, or a smaller rate."
            )
        return tuple((a - b) * (share * scale) for a, b in zip(above, below, strict=True))

    def _distance(self, step: _Step) -> float:
        """|h w|: as it was set, or the cube root of rounding, of the size of y or of the step."""
        if self.response.distance is not None:
            return self.response.distance
        before, after = join(step.before.y), join(step.end)
        size = max(float(torch.linalg.vector_norm(flat)) for flat in (before, after))
        share: float = float(torch.finfo(before.dtype).eps) ** (1.0 / 3.0)
        return share * (size if size > 0.0 else 1.0)

    def _spoiled(self, here: Tensor, up: Tensor, down: Tensor, distance: float) -> bool:
        """Whether the difference is mostly its own error, which is told; that of y stands for that of x."""
        norm, change = torch.linalg.vector_norm, float(torch.linalg.vector_norm(up - down))
        if change == 0.0:
            return False
        rounding = float(torch.finfo(here.dtype).eps) * float(norm(here)) / change
        # What its two halves say differs by the second-order term, whose square is of the order of the third-order one.
        bent = (float(norm(up - 2.0 * here + down)) / change) ** 2
        if max(rounding, bent) <= _SPOILED:
            return False
        wrong, cause = ("small", "rounding") if rounding > bent else ("large", "curvature that changes")
        self._tell(
            f"a distance of {distance:.3g} is too {wrong} for player {self.name!r}: {cause} alone makes an error of "
            f"about {max(rounding, bent):.2g} in the difference. Give a "
            f"{'larger' if wrong == 'small' else 'smaller'} distance=, or leave it out."
        )
        return True

    @staticmethod
    def _tell(message: str) -> None:
        warnings.warn(UnreliableResponseWarning(f"LastStep: {message}"), stacklevel=2)


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
