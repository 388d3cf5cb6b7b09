"""torch.optim optimisers as inner solvers, with their memory as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.base import InnerSolver, Problem, require_minimum
from bilevel.tree import Variables, join, map_leaves

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""A callable from a list of tensors to a torch.optim optimiser, such as partial(torch.optim.SGD, lr=0.1).

Further parameters of its own that are named after players receive those players' variables.
"""

SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
"""From an optimiser to a learning-rate scheduler over it, such as partial(CosineAnnealingLR, T_max=5000)."""

Memory = list[dict[str, Any]]
"""What an optimiser remembers of each parameter, in their order."""


def build(
    factory: OptimizerFactory, parameters: Sequence[Tensor], players: Mapping[str, Variables] | None = None
) -> torch.optim.Optimizer:
    """The optimiser over these parameters; refuses what is no optimiser or leaves a parameter out."""
    if not callable(factory):
        raise TypeError(
            f"optimizer is {factory!r}; expected a callable from parameters to a torch.optim optimiser, such as "
            "functools.partial(torch.optim.SGD, lr=0.1), or an inner solver such as bilevel.Scipy('L-BFGS-B')."
        )
    named = {name: (players or {})[name] for name in player_parameters(factory, players or {})}
    optimizer = factory(list(parameters), **named)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer(parameters) returned a {type(optimizer).__name__}; expected a torch.optim.Optimizer. Pass "
            "functools.partial(torch.optim.Adam, lr=1e-3), or wrap a closed form as bilevel.ClosedForm(function)."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [index for index, p in enumerate(parameters) if id(p) not in held]
    if left_out:
        raise ValueError(
            f"optimizer(parameters) leaves out parameters {left_out} of {len(parameters)}; they would never move. "
            "Put every parameter in one of its groups."
        )
    return optimizer


def player_parameters(factory: OptimizerFactory, players: Mapping[str, Any]) -> list[str]:
    """The parameters of a factory that are named after players and not bound already.

    A function that somebody wrote names players; an optimiser's class names its own options, whatever players are
    called: `weight_decay`, `momentum`.
    """
    if isinstance(getattr(factory, "func", factory), type):  # the class itself, or functools.partial of it
        return []
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # a builtin without a signature takes no players
        return []
    bound = getattr(factory, "keywords", {})  # functools.partial
    return [name for name in list(signature.parameters)[1:] if name in players and name not in bound]


def remember(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Memory:
    """What the optimiser remembers of each parameter; its own tensors, so do not step it any more."""
    return [dict(optimizer.state.get(p, {})) for p in parameters]


def after_one_step(factory: OptimizerFactory, leaves: Sequence[Tensor]) -> Memory:
    """What the factory's optimiser remembers of each leaf after a step that goes nowhere; [] when it is nothing."""
    parameters = [leaf.detach().clone() for leaf in leaves]
    optimizer = build(factory, parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step((lambda: 0.0) if isinstance(optimizer, torch.optim.LBFGS) else None)
    remembered = remember(optimizer, parameters)
    return remembered if any(value is not None for slot in remembered for value in slot.values()) else []


def recall(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], memory: Memory | None, *, copy: bool = True
) -> None:
    """Give the optimiser what it remembered, or a copy of it; nothing when it is new."""
    for parameter, remembered in zip(parameters, memory or (), strict=False):
        if remembered:
            optimizer.state[parameter] = _copied(remembered) if copy else dict(remembered)


def kept_memory(factory: OptimizerFactory, leaves: Sequence[Tensor], memory: Memory | None) -> Memory | None:
    """`memory` where it has the form of what the factory's optimiser remembers of these leaves; None where it has not.

    For a run that goes on with another optimiser: another learning rate keeps Adam's moments, SGD has no use for them.
    """
    try:
        wanted = after_one_step(factory, leaves) or [{} for _ in leaves]
    except TypeError:  # a factory that takes players as well
        return None
    return memory if memory is not None and list(map(_form, memory)) == list(map(_form, wanted)) else None


def _form(slot: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v.shape) if isinstance(v, Tensor) else () for key, v in slot.items() if v is not None}


def build_scheduler(
    factory: SchedulerFactory, optimizer: torch.optim.Optimizer, memory: Mapping[str, Any] | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """The scheduler over this optimiser, gone on from where `remember_scheduler` left it."""
    scheduler = factory(optimizer)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(
            f"scheduler(optimizer) returned a {type(scheduler).__name__}; expected a "
            "torch.optim.lr_scheduler.LRScheduler, as partial(CosineAnnealingLR, T_max=5000) makes one."
        )
    if memory is not None:
        scheduler.load_state_dict(_copied(memory["scheduler"]))
        for group, rate in zip(optimizer.param_groups, memory["rates"], strict=True):
            group["lr"] = rate  # most schedulers go on from the group's rate, which their own state leaves out
    return scheduler


def remember_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Where the scheduler is, as plain data."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return {"scheduler": scheduler.state_dict(), "rates": rates}


def _copied(tree: Any) -> Any:
    return map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    """A torch.optim optimiser, one step a batch; LBFGS included. Its memory carries over from call to call."""

    factory: OptimizerFactory

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The leaves after at most `steps` steps; a copy of the optimiser's memory."""
        parameters = [leaf.detach().clone() for leaf in y]
        optimizer = build(self.factory, parameters)
        recall(optimizer, parameters, memory)

        @torch.no_grad()  # LBFGS calls it with grad enabled, which would build a graph of the gradient in vain
        def closure() -> float:
            loss, slopes = problem.gradients(parameters)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            return float(loss)

        searches = isinstance(optimizer, torch.optim.LBFGS)  # it evaluates along a line, on one batch
        if searches:
            require_minimum(problem, "LBFGS")
        for step in range(steps):
            if step:
                problem.advance()
            closure()
            slope = join([p.grad for p in parameters if p.grad is not None])
            if float(torch.linalg.vector_norm(slope)) <= threshold:
                break
            optimizer.step(closure if searches else None)
        remembered = remember(optimizer, parameters)
        return [p.detach() for p in parameters], remembered
