"""Laws of the follower's optimiser: clips, schedules and hooks are obeyed and differentiated, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.inner.optimizer import TorchOptimizer
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.responses import Response
from bilevel.testing.families import Exponential, Quadratic
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.answers import require_close
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import NotOffered, ResponseSubject, Subject
from bilevel.testing.tolerance import exact

_STEPS = 6
_HALF = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)

# The follower starts 1 off its optimum along every direction of a curvature of .2 at least: a clip at .05 binds.
_GAMES = (
    Quadratic(curvatures=(1.0, 0.5), coupling=((1.0,), (0.5,)), at=(0.5,), target=(1.0, -1.0)),
    Exponential(coupling=((1.0, 0.5),), at=(0.5, 0.25), target=(-1.0,)),
)


@dataclass(frozen=True)
class Around:
    """What stands around a plain optimiser.

    Args:
        clip_norm: As in `torch.nn.utils.clip_grad_norm_`.
        clip_value: As in `torch.nn.utils.clip_grad_value_`.
        scheduler: From an optimiser to its scheduler, which steps after each step.
    """

    clip_norm: float | None = None
    clip_value: float | None = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None

    def options(self, factory: OptimizerFactory) -> TorchOptimizer:
        """The same, said as options of the library."""
        return TorchOptimizer(factory, clip_norm=self.clip_norm, clip_value=self.clip_value, scheduler=self.scheduler)

    def hooks(self, factory: OptimizerFactory) -> OptimizerFactory:
        """The same, done by step hooks of torch's."""

        def build(parameters: Any) -> torch.optim.Optimizer:
            optimizer = factory(parameters)
            schedule = None if self.scheduler is None else self.scheduler(optimizer)
            optimizer.register_step_pre_hook(lambda given, *_: self._clip(given))
            if schedule is not None:
                optimizer.register_step_post_hook(lambda *_: schedule.step())
            return optimizer

        return build

    def iterates(self, factory: OptimizerFactory, known: KnownGame, x: Tensor, steps: int) -> Iterator[Tensor]:
        """Where torch itself takes the follower `[m]`: its start, and each of the steps."""
        y = known.y0.clone().requires_grad_()
        optimizer = factory([y])
        schedule = None if self.scheduler is None else self.scheduler(optimizer)
        yield y.detach().clone()
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(known.follower(x, y))
            self._clip(optimizer)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            yield y.detach().clone()

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(leaves, self.clip_value)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, self.clip_norm)


CLIPS = (Around(clip_norm=0.05), Around(clip_value=0.05))
SCHEDULE = Around(scheduler=_HALF)


def _stepping(subject: Subject) -> tuple[ResponseSubject, OptimizerFactory]:
    """The response and the plain optimiser that steps its follower."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response has an optimiser to put something around.")
    if subject.optimizer is None or not subject.adjustable:
        raise NotOffered("No torch.optim optimiser of its own steps the follower.")
    if isinstance(subject._built(), torch.optim.LBFGS):
        raise NotOffered("A step of LBFGS is a search of its own.")
    return subject, subject.optimizer


def _with(subject: ResponseSubject, optimizer: Any, steps: int) -> Response:
    try:
        return subject.with_steps(steps).with_inner_optimizer(optimizer)
    except TypeError as refused:
        raise NotOffered(str(refused)) from refused


def _played(response: Response, known: KnownGame, calls: int) -> tuple[Tensor, Tensor]:
    """The answer `[m]` of the last of so many calls, and the hypergradient `[n]` through it."""
    game, x = known.game(), known.x0.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = response.init(game)
        for _ in range(calls):
            y, state = response(game, {"x": x}, state)
        (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
    return y.detach(), slope


def _torchs(subject: ResponseSubject, known: KnownGame, around: Around, response: Response, what: str) -> None:
    """The answer is where torch goes, and its derivative that of torch's steps, if it promises this."""
    factory = subject.optimizer
    assert factory is not None
    answer, slope = _played(response, known, 1)
    path = list(around.iterates(factory, known, known.x0, _STEPS))
    # Who promises the optimum may stop before; who estimates may do what it likes with the steps that are left.
    ends = path[-1:] if subject.of_steps else path
    nearest = min(ends, key=lambda y: float((y - answer).norm()))
    # Two ways to one sum round apart, at each step by a few parts of the numbers' size.
    require_close(answer, nearest, 1e-12 * _STEPS * (1.0 + float(nearest.norm())), f"answer after {_STEPS} {what}")
    if not subject.of_steps or subject.estimates:
        return
    # Central differences of torch's own ends: they truncate like h^2 and round like eps / h, both below 1e-10.
    h, units = 1e-5, torch.eye(known.x0.numel(), dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        *_, end = around.iterates(factory, known, x, _STEPS)
        return known.leader(x, end)

    wanted = torch.stack([(value(known.x0 + h * unit) - value(known.x0 - h * unit)) / (2.0 * h) for unit in units])
    require_close(slope, wanted, 1e-6 * exact(known).scale, f"hypergradient of {_STEPS} {what}")


def clipped_steps(subject: Subject, known: KnownGame) -> None:
    """With its gradient clipped it goes where torch goes, and differentiates the clip."""
    response, factory = _stepping(subject)
    for around in CLIPS:
        clipped = _with(response, around.options(factory), _STEPS)
        kind = "clip_norm" if around.clip_norm is not None else "clip_value"
        _torchs(response, known, around, clipped, f"steps with {kind}=0.05")


def scheduled_steps(subject: Subject, known: KnownGame) -> None:
    """Its learning rate follows a schedule, which goes on from call to call where the variables do."""
    response, factory = _stepping(subject)
    _torchs(response, known, SCHEDULE, _with(response, SCHEDULE.options(factory), _STEPS), "steps of a schedule")
    if not response.of_steps or not response.response.behaviour.warm:
        return
    answer, _ = _played(_with(response, SCHEDULE.options(factory), _STEPS // 2), known, 2)
    *_, end = SCHEDULE.iterates(factory, known, known.x0, _STEPS)
    require_close(answer, end, 1e-12 * _STEPS * (1.0 + float(end.norm())), "answer after two calls of a schedule")


def hooked_steps(subject: Subject, known: KnownGame) -> None:
    """What step hooks do is done and differentiated, or an optimiser that has some is refused."""
    response, factory = _stepping(subject)
    for around, what in ((CLIPS[0], "a hook that clips"), (SCHEDULE, "a hook that steps a scheduler")):
        try:
            _torchs(response, known, around, _with(response, around.hooks(factory), _STEPS), f"steps with {what}")
        except (TypeError, ValueError) as refused:
            assert "hook" in str(refused), f"{what} is refused without a word of hooks: {refused}"


def _few() -> st.SearchStrategy[KnownGame]:
    return st.sampled_from(_GAMES)


OPTIMIZERS = (
    Law("clipping", "a clipped step is torch's, and differentiated", _few, clipped_steps, 0.2),
    Law("schedule", "a schedule is torch's, and goes on from call to call", _few, scheduled_steps, 0.2),
    Law("hooks", "step hooks are obeyed, or refused by name", _few, hooked_steps, 0.2),
)
