"""The follower stays at its optimum, and the leader learns how that moves by nudging it: first derivatives alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import below_transforms, gradient, nearest, transforms_active
from bilevel.errors import (
    ConvergenceError,
    FollowerNonConvergenceWarning,
    LinearNonConvergenceWarning,
    NonConvergenceWarning,
    NonFiniteError,
    require_kinds,
)
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.game.follower import HeldLoss
from bilevel.game.rounding import GradientScale
from bilevel.inner import InnerSolver, TorchOptimizer
from bilevel.inner.base import FIELD_RESPONSES, FreeProblem, minimised, named_by, require_minimum, require_solver
from bilevel.inner.closed_form import ClosedForm
from bilevel.inner.optimizer import torch_optimizer
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.responses.base import Response, State, at_start, fresh_state, refuse_captured, refuse_optimizer_hyper
from bilevel.responses.batch_tensors import BatchTensors
from bilevel.responses.first_order import BackwardPass, attach
from bilevel.responses.own_functions import warn_of_first
from bilevel.responses.promise import Behaviour, Estimate, Optimum, Promise, Report
from bilevel.sharding.tensor import entries
from bilevel.tree import Structure, Variables, flatten, join, leaves

_SECOND = (
    "Nudged gives first derivatives alone, and a derivative of its derivative was asked for (create_graph=True, or a "
    "hessian). Use Implicit, whose derivatives are of any order."
)
_LARGEST = 0.1  # of the gradient's norm at the start: beyond, a nudge is a move
_GROWTH = 10.0  # at most so much another nudge from one call to the next
_CHECK = 0.1  # of the displacement: where the nudge is checked
_SPOILT = 1e-2  # at least so much error of the nudge's own is worth another solve, or a word
_AGAIN = 6  # further nudges in one call, each a tenth of the last


@final
@dataclass(frozen=True)
class Nudged(Response):
    r"""The follower's optimum, with the implicit derivative learned from two nudged solves: first derivatives alone.

    For a cotangent c of the answer, backward lets the follower settle twice more, with its loss tilted to either side,

    $$
    y_\pm = \arg\min_y\; f(x, y) \pm \nu\, \langle c, y \rangle, \qquad
    c^\top \frac{dy^*}{dx} \approx \frac{\nabla_x f(x, y_+) - \nabla_x f(x, y_-)}{2 \nu}
    $$

    which is wrong by \(O(\nu^2)\), by \(O(\nu)\) with one side alone, and by what the nudged solves leave. No
    derivative of a derivative is taken anywhere: fused attention, compiled modules, and functions whose backward cannot
    be differentiated are as good as any. The last batch, the buffers and the random numbers are held through both
    solves, and so is what is left of the gradient at the answer: only the solves' own convergence counts.

    At a tenth of the displacement two more gradients measure what the nudge itself spoils: how far the displacement is
    from the solution of the equation that it stands for, and the difference from itself. Left to choose its nudge,
    it solves again with a tenth of it, up to six times, where that is above `tolerance` and 1 %, or not finite.

    Costs up to `steps` + 1 gradients, and in backward up to 2 (`steps` + 3) + 1, each time that it solves; the memory
    of one plain step.

    Args:
        optimizer: What finds the optimum, and the nudged ones: a callable from tensors to any torch.optim optimiser,
            or an inner solver, `TorchOptimizer(...)` or `Scipy("L-BFGS-B")`.
        steps: At most so many steps for each of the three solves.
        nudge: The tilt \(\nu |c|\), relative to the gradient's norm at the start of the game. None: such that the
            measured shares of the error balance: rounding, and what the solves leave above `tolerance`, which fall with
            it, and the nudge's own, which grows.
        two_sided: Whether both sides are solved for.
        tolerance: Where a solve stops: |gradient| relative to its value at the start of the game, and of a nudged
            solve relative to the nudge. None asks for no accuracy.
        warm_start: From the last call's variables and displacement; else each call starts at `init`.
        strict: Raise where it would warn.

    Raises:
        ConvergenceError: With `strict`, when a solve misses `tolerance`; else a `FollowerNonConvergenceWarning` says
            by how much, or of nudged solves a `LinearNonConvergenceWarning`.
        SecondDerivativeError: When its derivative is differentiated.
        TypeError: For a follower that minimises no loss, and for `ClosedForm`, which cannot be nudged.

    Source: the two-sided estimate of Scellier & Bengio 2017 (arXiv 1602.05179) and Laborieux et al. 2021 (arXiv
    2006.03824); as a hypergradient, arXiv 2509.02937.

    Examples:
        >>> from functools import partial
        >>> Nudged(partial(torch.optim.SGD, lr=0.1), steps=10).promise.of
        Optimum()
    """

    optimizer: OptimizerFactory | InnerSolver
    steps: int = 100
    nudge: float | None = None
    two_sided: bool = True
    tolerance: float | None = 1e-3
    warm_start: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.steps < 1:
            raise ValueError(f"Nudged: steps={self.steps}; expected at least 1.")
        if self.nudge is not None and not 0.0 < self.nudge < math.inf:
            raise ValueError(f"Nudged: nudge={self.nudge}; expected a number above 0, or None.")
        if self.tolerance is not None and not self.tolerance >= 0.0:
            raise ValueError(f"Nudged: tolerance={self.tolerance}; expected a number >= 0, or None.")
        if isinstance(self.optimizer, ClosedForm):
            raise TypeError(
                "Nudged: optimizer is ClosedForm(...), which gives one optimum and cannot be nudged. Use "
                "Implicit(ClosedForm(...)), or Nudged with an optimiser."
            )
        require_solver("Nudged: optimizer", self.optimizer)

    @property
    def promise(self) -> Promise:
        """An estimate of the optimum's derivative, whose error its report tells."""
        return Estimate(Optimum(), reason="differences of nudged solves")

    @property
    def budget(self) -> int:
        """Steps of each solve."""
        return self.steps

    def with_budget(self, steps: int) -> Nudged:
        """The same with so many steps for each solve."""
        return replace(self, steps=steps)

    @property
    def behaviour(self) -> Behaviour:
        """It warns unless `tolerance` is None."""
        return Behaviour(warm=self.warm_start, warns=self.tolerance is not None, rtol=self.tolerance or 0.0)

    @property
    def inner_optimizer(self) -> OptimizerFactory | None:
        """That of `optimizer`, unless it is another inner solver."""
        return self._solver.factory if isinstance(self._solver, TorchOptimizer) else None

    def with_inner_optimizer(self, optimizer: OptimizerFactory) -> Nudged:
        """The same with another optimiser, and the same options around it."""
        options = self.optimizer if isinstance(self.optimizer, TorchOptimizer) else None
        return replace(self, optimizer=optimizer if options is None else replace(options, factory=optimizer))

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call; refuses captured tensors and hyperparameters of the inner optimiser."""
        state = fresh_state(game, follower, seed)
        inner = self._solver
        optimizer = inner if isinstance(inner, TorchOptimizer) else None
        refuse_optimizer_hyper(self, game, state["follower"], optimizer)
        start = at_start(game, state, inner.names)
        if start.constraints is not None or start.rests.projects or inner.domain(start.form) is not None:
            raise TypeError(
                f"Nudged: player {start.name!r} is constrained, and how a nudge meets a constraint is not told from "
                "differences. Use Implicit, which differentiates the constraints that bind."
            )
        require_minimum(start, "Nudged", FIELD_RESPONSES)
        refuse_captured(start, state)
        warn_of_first("Nudged", start, flatten(state["variables"]))
        nothing = flatten(state["variables"])[:0].clone()
        return state | {"optimizer": None, "nudge": {"displacement": nothing, **vars(_Shares())}}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The follower's optimum, differentiable once in `others`, and the state to continue from."""
        follower = game.follower(others, state, batch, further=named_by(self.optimizer))
        if transforms_active():
            given, count, held = BatchTensors(batch), len(follower.xs), [follower.batch]

            def below(*inputs: Tensor) -> tuple[Tensor]:
                others = follower.input_form.build(inputs[:count])
                plain = game.follower(others, state, given.put(inputs[count:]), further=others)
                y, _, _ = self._settle(plain, state)
                held[0] = plain.batch
                return (join(y),)

            (y,) = below_transforms(below, [*follower.xs, *given.tensors], _SECOND)
            follower.batch = held[0] if batch is None else batch
            settled = _Settled(self, follower, state, state["optimizer"], follower.measure(state))
            return follower.form.unflatten(settled.attach(y.detach(), follower.xs)), state
        found, memory, scale = self._settle(follower, state)
        settled = _Settled(self, follower, state, memory, scale)
        flat = join(found).clone()
        with torch.no_grad():
            loss, slopes = settled.slope(flat, [x.detach() for x in follower.xs])
        follower.gradient_count += 1
        follower.require_finite(found, _ADVICE, float(loss))
        scale = self._judge(follower, scale, slopes, flat)
        state = state | {"reference": scale.reference, "terms": scale.terms}
        after = follower.next_state(state, found, follower.form.split(slopes)) | {"optimizer": memory}
        return follower.form.unflatten(settled.attach(flat, follower.xs)), after

    def after_backward(self, state: State, answer: Variables) -> State:
        """The state with the displacement that the nudges found, the next nudge, and the gradients that they took."""
        settled = nearest(leaves(answer), "backward_pass", _Settled)
        if settled is None or settled.displacement is None:
            return state
        learned = {"displacement": settled.displacement, **vars(settled.shares)}
        return state | {"nudge": learned, "gradients": state["gradients"] + settled.gradients}

    def report(self, state: State) -> Report:
        """With what the last backward pass left: of the nudged solves, of the nudge itself, and of rounding."""
        shares = {name: entry for name, entry in state["nudge"].items() if name != "displacement"}
        left = _Shares(**shares).total
        return Report(int(state["gradients"]), int(state["products"]), state["stationarity"], left, left)

    @property
    def _solver(self) -> InnerSolver:
        return self.optimizer if isinstance(self.optimizer, InnerSolver) else torch_optimizer("Nudged", self.optimizer)

    def _settle(self, follower: Follower, state: State) -> tuple[list[Tensor], Any, GradientScale]:
        """The optimum's leaves, the optimiser's memory, and what the gradient is measured by."""
        with torch.no_grad():
            start, kept = follower.begins(state, warm=self.warm_start)
        memory = state["optimizer"] if kept else None
        scale = follower.measure(state, start if self.tolerance else None)
        threshold = scale.threshold(self.tolerance or 0.0)
        with torch.no_grad():
            y, memory = minimised(self._solver, follower, start, memory, steps=self.steps, threshold=threshold)
            follower.require_finite(y, _ADVICE)
        return y, memory, scale

    def _judge(self, follower: Follower, scale: GradientScale, slopes: Tensor, y: Tensor) -> GradientScale:
        """Warn of a gradient above the tolerance; what it is measured by from now on."""
        if self.tolerance is None:
            return scale
        missed, scale = follower.missed(scale, self.tolerance, slopes, follower.held_residual(), y)
        if missed is not None:
            self._tell(
                FollowerNonConvergenceWarning,
                f"Nudged: the gradient of player {follower.name!r} is still {missed[0]} "
                f"after {self.steps} steps; wanted {self.tolerance:g}. The hypergradient is biased by as much, by "
                "more where the follower is ill-conditioned. Give it more steps or another optimiser, or accept it by "
                "tolerance=.",
            )
        return scale

    def _tell(self, kind: type[NonConvergenceWarning], message: str) -> None:
        if self.strict:
            raise ConvergenceError(message)
        warnings.warn(kind(message), stacklevel=4)


_ADVICE = "Lower the inner learning rate, use another inner solver, or check for an optimum at infinity."


@dataclass(frozen=True)
class _Shares:
    """The next nudge, and the shares of the last one's error; NaN before there is one.

    Args:
        size: the nudge, relative to the gradient's norm at the start of the game.
        unsettled: |gradient| that the nudged solves left, relative to the nudge.
        truncation: the nudge's own share, measured at a tenth of the displacement.
        rounding: that of the differences of slopes and of positions.
    """

    size: float = math.nan
    unsettled: float = math.nan
    truncation: float = math.nan
    rounding: float = math.nan

    @property
    def total(self) -> float:
        """All of them."""
        return self.unsettled + self.truncation + self.rounding

    def balanced(self, asked: float, order: int, eps: float) -> float:
        """The nudge t at which c / t + a t^order, what falls with it and what grows, is least: c / t = order a t^order.

        Solves that stop where they were asked to leave the same share of any nudge.
        """
        falling = self.rounding + (self.unsettled if self.unsettled > asked else 0.0)
        factor = (falling / (order * max(self.truncation, eps))) ** (1.0 / (1.0 + order))
        return float(min(max(self.size * min(max(factor, 1.0 / _GROWTH), _GROWTH), _least(eps)), _LARGEST))


def _least(eps: float) -> float:
    return math.pow(eps, 2.0 / 3.0)  # there what is checked a tenth of the way is rounded by some 10 eps^(1/3)


@dataclass(frozen=True)
class _Nudge:
    """What one nudge found: c' dy/dx in each wanted leaf, dy along the nudge per unit of it `[n]`, and its error."""

    slopes: tuple[Tensor, ...]
    displacement: Tensor
    shares: _Shares


class _Settled(BackwardPass):
    """A follower at its optimum, ready to be nudged.

    `displacement`, `shares` and `gradients` are what the last backward pass left.
    """

    asker = "Nudged"
    refusal = _SECOND

    def __init__(self, response: Nudged, follower: Follower, state: State, memory: Any, scale: GradientScale) -> None:
        self.response, self.memory = response, memory
        self.name, self.form, self.others = follower.name, follower.form, follower.others
        self._batch, self._follower = follower.batch, follower
        self.loss: HeldLoss = follower.held_loss()
        self.reference = float(scale.natural)
        self.before = state["nudge"]
        self.displacement: Tensor | None = None
        self.shares = _Shares()
        self.gradients = 0
        self.given = BatchTensors(follower.batch)

    def attach(self, y: Tensor, xs: Sequence[Tensor]) -> Tensor:
        """y `[n]`, which knows how it moves with xs."""
        return attach(self, y, xs, self.given.tensors)

    def pulled(
        self,
        cotangent: Tensor,
        y: Tensor,
        xs: Sequence[Tensor],
        tensors: Sequence[Tensor] | None,
        wanted: Sequence[int],
    ) -> tuple[Tensor, ...]:
        """c' dy/dx for the wanted of xs, by nudges."""
        there = self if tensors is None else self.on(tensors)
        return there.nudged(cotangent, y, xs, wanted)

    def on(self, tensors: Sequence[Tensor]) -> _Settled:
        """The same on a batch of other tensors."""
        other = copy(self)
        other.loss = self.loss.on(self.given.put(tensors))
        return other

    def slope(self, y: Tensor, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and gradient in y `[n]`, the others standing still."""
        value, (slope,) = gradient(lambda y: self.loss(y, *xs), y)
        return value, slope

    def slopes(self, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Gradients in y `[n]` and in the wanted of xs, by one backward pass."""
        self.gradients += 1

        def loss(y: Tensor, *some: Tensor) -> Tensor:
            every = list(xs)
            for index, x in zip(wanted, some, strict=True):
                every[index] = x
            return self.loss(y, *every)

        _, (own, *mixed) = gradient(loss, y, *(xs[index] for index in wanted))
        return own, mixed

    @torch.no_grad()
    def nudged(self, cotangent: Tensor, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> tuple[Tensor, ...]:
        """c' dy/dx for the wanted of xs, on plain tensors."""
        response, self.gradients = self.response, 0
        size = torch.linalg.vector_norm(cotangent)
        if float(size) == 0.0:
            return tuple(torch.zeros_like(xs[index]) for index in wanted)
        eps = float(torch.finfo(y.dtype).eps)
        here, middle = self.slopes(y, xs, wanted)
        unit, share, given = cotangent / size, self._share(eps), response.nudge is not None
        best: _Nudge | None = None
        for tries in range(_AGAIN + 1):
            last = given or tries == _AGAIN or share / _GROWTH < _least(eps)
            try:
                trial = self._tried(share, unit, y, xs, wanted, (here, middle), eps)
            except NonFiniteError as error:
                if not last:
                    share /= _GROWTH
                    continue
                if best is not None:
                    break
                raise NonFiniteError(
                    f"{error} It was in a nudged solve, with nudge={share:.3g}: a smaller nudge= stays nearer to the "
                    "optimum."
                ) from error
            worse = best is not None and not trial.shares.total < best.shares.total
            best = best if worse else trial
            # The first call knows no nudge yet, and looks down to the least; a later one while it gets better.
            if last or not self._spoilt(trial.shares) or (worse and not math.isnan(self.before["size"])):
                break
            share /= _GROWTH
        assert best is not None
        self._learn(best, share, eps)
        return tuple(size * slope for slope in best.slopes)

    def _tried(
        self,
        share: float,
        unit: Tensor,
        y: Tensor,
        xs: Sequence[Tensor],
        wanted: Sequence[int],
        at: tuple[Tensor, list[Tensor]],
        eps: float,
    ) -> _Nudge:
        """What a nudge of that share finds along a unit cotangent; `at`: the gradients at y."""
        response, (here, middle) = self.response, at
        force = share * self.reference
        ends, sides, left = [], [], 0.0
        signs = (1.0, -1.0) if response.two_sided else (1.0,)
        for sign in signs:
            tilted = _Tilted(self, xs, y, sign * force * unit - here)
            start = self._start(tilted, y, sign * force, force)
            left_at = (response.tolerance or 0.0) * force
            found, _ = minimised(
                response._solver,
                tilted,
                self.form.split(start),
                self.memory,
                steps=response.steps,
                threshold=left_at,
            )
            self._follower.require_finite(found, _ADVICE)
            end = join(found)
            own, mixed = self.slopes(end, xs, wanted)
            left = max(left, float(torch.linalg.vector_norm(own + tilted.tilt)) / force)
            ends.append(end)
            sides.append(mixed)
        if not response.two_sided:
            ends, sides = [*ends, y], [*sides, middle]
        width = len(signs) * force
        displacement = (ends[0] - ends[1]) / width
        slopes = tuple((a - b) / width for a, b in zip(*sides, strict=True))
        norm = torch.linalg.vector_norm
        change, moved = float(norm(join(slopes))) * width, float(norm(displacement)) * width
        rounding = eps * float(norm(join(middle))) / change if change > 0.0 else 0.0
        rounding += eps * float(norm(y)) / moved if moved > 0.0 else 0.0
        # The same differences over a tenth of the way, where the nudge's own error is a tenth or less, and rounding
        # ten times as much.
        near = [self.slopes(y + sign * _CHECK * force * displacement, xs, wanted) for sign in signs]
        (up, up_mixed), (down, down_mixed) = (*near, at)[:2]
        noise = 2.0 * (rounding + eps / share) / _CHECK
        off = float(norm((up - down) / (_CHECK * width) + unit)) - left
        apart = float(norm((join(up_mixed) - join(down_mixed)) / _CHECK - join(slopes) * width))
        apart = apart / change if change > 0.0 else 0.0
        seen = 1.0 - _CHECK ** len(signs)  # the rest is the error of the check itself
        truncation = (max(off - noise, 0.0) + max(apart - noise, 0.0)) / seen
        truncation = math.inf if math.isnan(truncation) else truncation  # what cannot be checked is not passed
        return _Nudge(slopes, displacement, _Shares(share, left, truncation, rounding))

    def _share(self, eps: float) -> float:
        """The nudge relative to the reference: as it was set, as the last call balanced it, or a first guess."""
        if self.response.nudge is not None:
            return self.response.nudge
        if not math.isnan(self.before["size"]):
            return float(self.before["size"])
        wanted = 1e-3 if self.response.tolerance is None else self.response.tolerance
        # Its own error is of the order of its square, or of itself on one side; below eps^(1/3), or eps^(1/2), that of
        # rounding is the larger.
        order = 2.0 if self.response.two_sided else 1.0
        return float(min(max((wanted / 10.0) ** (1.0 / order), eps ** (1.0 / (1.0 + order))), _LARGEST))

    def _start(self, tilted: _Tilted, y: Tensor, signed: float, force: float) -> Tensor:
        """Where a nudged solve starts: displaced as the last one was, where that leaves less than the nudge itself."""
        before = self.before["displacement"]
        if not (self.response.warm_start and entries(before)):
            return y
        guess: Tensor = y + signed * before
        _, slopes = tilted.gradients(self.form.split(guess))
        return guess if float(torch.linalg.vector_norm(join(slopes))) < force else y

    def _learn(self, found: _Nudge, least: float, eps: float) -> None:
        """Remember the displacement, and the shares of the error; warn of them."""
        response, shares = self.response, found.shares
        self.displacement, self.shares = found.displacement, shares
        if response.nudge is None:
            asked, order = response.tolerance or 0.0, 2 if response.two_sided else 1
            self.shares = replace(shares, size=shares.balanced(asked, order, eps))
        self._tell_of(shares, least)

    def _spoilt(self, shares: _Shares) -> bool:
        """Whether the nudge itself is the error that matters."""
        others = max(shares.rounding, shares.unsettled)
        return shares.truncation > max(self.response.tolerance or 0.0, _SPOILT, others)

    def _tell_of(self, shares: _Shares, least: float) -> None:
        """Warn of solves that stopped short, or of a nudge that spoils what they found; `least`: the last one tried."""
        response, left = self.response, shares.unsettled
        asked = math.inf if response.tolerance is None else response.tolerance
        # What solves cannot get below because of rounding is no matter of steps.
        if shares.rounding > 0.1 * left and left > min(asked, 1.0):
            wrong, cause, error, remedy = "small", "rounding", left, "Raise"
        elif left > asked or left >= 1.0:
            # Of 1 and more, what no solve at all would leave, it is told whatever is asked for.
            accept = ", or accept it by tolerance=" if left < 1.0 else ""
            response._tell(
                LinearNonConvergenceWarning,
                f"Nudged: the nudged solves of player {self.name!r} left {left:.3g} of the nudge after "
                f"{response.steps} steps; wanted {min(asked, 1.0):g}. The hypergradient is biased by as much, by more "
                f"where the follower is ill-conditioned. Give it more steps or another optimiser{accept}.",
            )
            return
        elif shares.rounding > max(asked, shares.truncation):
            wrong, cause, error, remedy = "small", "rounding", shares.rounding, "Raise"
        elif self._spoilt(shares) and asked < math.inf:
            wrong, cause, error, remedy = "large", "it", shares.truncation, "Lower"
        else:
            return
        if response.nudge is not None:
            way_out = f"{remedy} nudge=, or leave it out to have it balanced."
        elif wrong == "large" and least < shares.size:
            way_out = (
                f"Smaller ones, down to {least:.3g}, were no better: the answer may be a saddle point, or near a kink. "
                "Start it elsewhere, give tolerance= a smaller value, or use Implicit."
            )
        else:
            way_out = "The next call's is balanced by what this one measured, where its state is from after_backward."
        response._tell(
            LinearNonConvergenceWarning,
            f"Nudged: a nudge of {shares.size:.3g} is too {wrong} for player {self.name!r}: {cause} alone makes an "
            f"error of about {error:.2g} in the hypergradient. {way_out}",
        )


class _Tilted(FreeProblem):
    """A settled follower's loss with <tilt, y> added, as the problem that an inner solver sees."""

    def __init__(self, settled: _Settled, xs: Sequence[Tensor], y: Tensor, tilt: Tensor) -> None:
        self.tilt, self._settled, self._xs, self._from = tilt, settled, xs, y
        self.name, self.form, self.batch = settled.name, settled.form, settled._batch
        self.others: Mapping[str, Variables] = settled.others

    form: Structure

    def gradients(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient of the tilted loss."""
        self._settled.gradients += 1
        flat = join(y)
        with torch.no_grad():
            loss, slope = self._settled.slope(flat, self._xs)
        return loss + self.tilt @ (flat - self._from), self.form.split(slope + self.tilt)
