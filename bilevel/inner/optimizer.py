"""A torch.optim optimiser with what people put around it: clipping, a schedule, accumulated gradients."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError, require_kinds
from bilevel.game.residual import required
from bilevel.inner.base import InnerSolver, Problem, require_minimum
from bilevel.inner.refusals import refuse_hooks, refuse_unprojected
from bilevel.inner.schedule import Changes, listed, tabulated
from bilevel.inner.torch_optim import (
    Memory,
    OptimizerFactory,
    SchedulerFactory,
    build,
    build_scheduler,
    options_of,
    player_parameters,
    recall,
    remember,
    remember_scheduler,
    require_factory,
)
from bilevel.tree import Structure, Variables, join, leaf_names

Number = float | Tensor | Callable[..., Tensor]
"""A number, or a function of the players that it has parameters named after."""

Rates = Sequence[float] | Tensor | Callable[..., Tensor]


@final
@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    r"""A follower's torch.optim optimiser, with clipping, a schedule and accumulated gradients as options.

    `Unrolled` and `Implicit` take it where they take a factory. A step is

    $$g = \tfrac1n \textstyle\sum_{i \le n} \nabla f_i(y), \quad
      \tilde g = \min\!\bigl(1, c / (|g| + 10^{-6})\bigr)\, g, \quad y \leftarrow \mathrm{step}(y, \tilde g, lr_k)$$

    with the gradients of n = `accumulate` batches and c = `clip_norm`, as `torch.nn.utils.clip_grad_norm_` has it.
    `Unrolled` differentiates all of it: the norm is a function of y as well. Where a schedule is, is part of a
    response's state: warm starts and resumed runs go on.

    Args:
        factory: A callable from a list of tensors to a torch.optim optimiser; LBFGS for `Implicit` alone. One whose
            first parameter is called `named_parameters` receives (name, tensor) pairs, for groups by name.
        clip_norm: The largest norm of a step's gradient, of all tensors together; of many games each by itself.
        clip_value: The largest size of an entry of it; before `clip_norm`, if both are given.
        scheduler: From an optimiser to a torch scheduler whose rate depends on the count of steps:
            `partial(CosineAnnealingLR, T_max=100)`. It steps once after each step of the optimiser.
        rates: Or the learning rates themselves, one a step, for every group; no step is taken without one.
        accumulate: How many batches a step takes the mean gradient of; `steps` count the optimiser's.

    `clip_norm`, `clip_value` and `rates` may be tensors, and functions with parameters named after players, whom
    `Unrolled` then tunes: `rates=lambda log_rates: log_rates.exp()`.

    Raises:
        TypeError: For an optimiser with step hooks, whose work could be neither differentiated nor resumed.
        ValueError: When there are fewer `rates` than steps.

    Examples:
        >>> from functools import partial
        >>> cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20)
        >>> TorchOptimizer(partial(torch.optim.SGD, lr=0.1), clip_norm=1.0, scheduler=cosine).clip_norm
        1.0
    """

    factory: OptimizerFactory
    clip_norm: Number | None = None
    clip_value: Number | None = None
    scheduler: SchedulerFactory | None = None
    rates: Rates | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        require_kinds(self)
        require_factory("TorchOptimizer: factory", self.factory)
        for name in ("clip_norm", "clip_value"):
            limit = getattr(self, name)
            if isinstance(limit, int | float) and not limit > 0.0:
                raise ValueError(f"TorchOptimizer: {name}={limit}; expected a number above 0, or None.")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"TorchOptimizer: accumulate={self.accumulate}; expected a whole number of at least 1.")
        if self.scheduler is not None and self.rates is not None:
            raise ValueError("TorchOptimizer: both scheduler= and rates= are given, and both set the learning rate.")
        if self.scheduler is not None and not callable(self.scheduler):
            given = type(self.scheduler).__name__
            raise TypeError(
                f"TorchOptimizer: scheduler is a {given}; expected a callable from an optimiser to a torch scheduler, "
                "partial(CosineAnnealingLR, T_max=100). Plain learning rates are rates=[0.1, 0.05]."
            )

    # What it reads of the players --------------------------------------------------------------------------------

    @property
    def _functions(self) -> dict[str, Callable[..., Tensor]]:
        """Those of its options that are functions of players."""
        options = {"clip_norm": self.clip_norm, "clip_value": self.clip_value, "rates": self.rates}
        return {name: option for name, option in options.items() if callable(option)}

    def option_players(self, players: Container[str]) -> list[str]:
        """The players that its own options read, beside those of the factory."""
        return [name for option in self._functions.values() for name in player_parameters(option, players, skip=0)]

    def players(self, players: Container[str]) -> list[str]:
        """All the players that are hyperparameters of the optimiser."""
        return [*player_parameters(self.factory, players), *self.option_players(players)]

    def require_players(self, players: Sequence[str]) -> None:
        """Raise `TypeError` for an option whose function has a parameter that names nobody."""
        for name, option in self._functions.items():
            strange = [p for p in required(option) if p not in players]
            if strange:
                raise TypeError(
                    f"TorchOptimizer: the function {name}= has a parameter {strange[0]!r}, which names no player; "
                    f"players are {list(players)}. A torch scheduler is scheduler=."
                )

    def settled(self, players: Mapping[str, Variables]) -> TorchOptimizer:
        """The same with the functions among its options replaced by what they give at these players' variables."""
        given: dict[str, Any] = {
            name: option(**{n: players[n] for n in player_parameters(option, players, skip=0)})
            for name, option in self._functions.items()
        }
        for name, value in given.items():
            if not isinstance(value, Tensor) or (name != "rates" and value.numel() != 1):
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"TorchOptimizer: the function {name}= returned {what}; expected a scalar tensor.")
        return replace(self, **given) if given else self

    @property
    def plain(self) -> bool:
        """Whether it has no options: a step is the optimiser's on one batch's gradient."""
        return self == TorchOptimizer(self.factory)

    # What it does ------------------------------------------------------------------------------------------------

    def build(
        self, parameters: Sequence[Tensor], names: Sequence[str], players: Mapping[str, Variables] | None = None
    ) -> torch.optim.Optimizer:
        """The optimiser over these parameters; refuses step hooks."""
        optimizer = build(self.factory, parameters, players, names)
        refuse_hooks(optimizer)
        return optimizer

    def table(
        self, make: Callable[[], torch.optim.Optimizer], memory: Mapping[str, Any] | None, count: int
    ) -> tuple[list[Changes] | None, dict[str, Any] | None]:
        """What the schedule sets in the next `count` steps from where `memory` left it, and the memory after them.

        `make` gives the optimiser anew. None and None where there is no schedule. Functions must be `settled`.
        """
        if self.scheduler is not None:
            return tabulated(self.scheduler, make, memory, count)
        if self.rates is None:
            return None, None
        assert not callable(self.rates)
        taken = 0 if memory is None else memory["taken"]
        return listed(self.rates, len(make().param_groups), taken, count), {"taken": taken + count}

    def mean(self, total: list[Tensor]) -> list[Tensor]:
        """A step's gradient from the sum over its batches."""
        return total if self.accumulate == 1 else [slope / self.accumulate for slope in total]

    def clip(self, slopes: Sequence[Tensor], norm: Callable[[Sequence[Tensor]], Tensor]) -> list[Tensor]:
        """The gradients as they are stepped along; differentiable. `norm` is 0-d, or of many games `[count]`."""
        found = list(slopes)
        if self.clip_value is not None:
            assert not callable(self.clip_value)
            limit = torch.as_tensor(self.clip_value, dtype=found[0].dtype, device=found[0].device).reshape(())
            found = [torch.clamp(slope, min=-limit, max=limit) for slope in found]
        if self.clip_norm is not None:
            assert not callable(self.clip_norm)
            limit = torch.as_tensor(self.clip_norm, dtype=found[0].dtype, device=found[0].device).reshape(())
            share = (limit / (norm(found) + 1e-6)).clamp(max=1.0)
            if share.ndim == 0:
                return [slope * share for slope in found]
            found = [slope * share.reshape(share.shape + (1,) * (slope.ndim - share.ndim)) for slope in found]
        return found

    @property
    def takes_parts(self) -> bool:
        """Yes: what an optimiser sums over all entries is summed over all ranks, and what else mixes them raises."""
        return True

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The leaves after at most `steps` steps; a copy of the optimiser's memory, and of its schedule's place."""
        names = leaf_names(problem.form.build(y), problem.name)
        parameters = [leaf.detach().clone() for leaf in y]
        optimizer = self.build(parameters, names)
        recall(optimizer, parameters, leaf_memory(memory))
        schedule = _Schedule(self, optimizer, memory["schedule"] if isinstance(memory, dict) else None)
        searches = isinstance(optimizer, torch.optim.LBFGS)  # it evaluates along a line, on one batch
        if searches:
            require_minimum(problem, "LBFGS")
            self._refuse_searching()
        refuse_unprojected("TorchOptimizer", problem.name, problem.rests, optimizer)

        @torch.no_grad()  # LBFGS calls it with grad enabled, which would build a graph of the gradient in vain
        def closure() -> float:
            loss, slopes = problem.field(parameters)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            return float(loss)

        for step in range(steps):
            if step:
                problem.advance()
            loss = closure()
            slopes = [p.grad for p in parameters if p.grad is not None]
            for _ in range(1, self.accumulate):
                problem.advance()
                loss += closure()
                slopes = [a + p.grad for a, p in zip(slopes, parameters, strict=True) if p.grad is not None]
            slopes = self.mean(slopes)
            with torch.no_grad():
                norm = float(_norm(problem.at_rest(parameters, slopes)))
            require_finite(problem.name, loss / self.accumulate, norm, step, steps)
            if norm <= threshold:
                break
            with torch.no_grad():
                for parameter, slope in zip(parameters, self.clip(slopes, _norm), strict=True):
                    parameter.grad = slope
            schedule.before()
            optimizer.step(closure if searches else None)
            if problem.rests.projects:
                with torch.no_grad():
                    ends = problem.settled([p.detach() for p in parameters], optimizer.param_groups[0]["lr"])
                    for parameter, end in zip(parameters, ends, strict=True):
                        parameter.copy_(end)
            schedule.after()
        return [p.detach() for p in parameters], schedule.remembered(parameters)

    def step(
        self, name: str, form: Structure, y: Sequence[Tensor], slopes: Sequence[Tensor], memory: Any
    ) -> tuple[list[Tensor], Any]:
        """One step from the leaves `y`, laid out as `form`, along given `slopes`; returns what `minimise` does.

        Nothing of the player `name` is evaluated, nor whether the slopes are finite.
        """
        parameters = [leaf.detach().clone() for leaf in y]
        optimizer = self.build(parameters, leaf_names(form.build(parameters), name))
        recall(optimizer, parameters, leaf_memory(memory))
        schedule = _Schedule(self, optimizer, memory["schedule"] if isinstance(memory, dict) else None)
        with torch.no_grad():
            for parameter, slope in zip(parameters, self.clip(slopes, _norm), strict=True):
                parameter.grad = slope
        schedule.before()
        optimizer.step()
        schedule.after()
        return parameters, schedule.remembered(parameters)

    def remembered(self, memory: Any) -> Sequence[Mapping[str, Any]]:
        """Of each leaf, as `torch.optim` has it."""
        return leaf_memory(memory) or []

    def _refuse_searching(self) -> None:
        """LBFGS evaluates the loss along a line: what is clipped, or the mean over batches, is not its gradient."""
        named = [n for n in ("clip_norm", "clip_value") if getattr(self, n) is not None]
        named += ["accumulate"] if self.accumulate > 1 else []
        if named:
            raise TypeError(
                f"TorchOptimizer: LBFGS searches along the loss's own gradient on one batch, which {named[0]}= "
                "changes. Leave it out, or use another optimiser."
            )


class _Schedule:
    """A schedule while an optimiser takes its steps one by one."""

    def __init__(self, settings: TorchOptimizer, optimizer: torch.optim.Optimizer, memory: Any) -> None:
        self._optimizer, self._rates = optimizer, settings.rates
        self._taken = 0 if memory is None else memory["taken"]
        self._run = None
        if settings.scheduler is not None:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torch would write into the user's
                    group["lr"] = float(group["lr"])
            before = None if memory is None else memory.get("runs")
            self._built = options_of(optimizer)
            self._run = build_scheduler(settings.scheduler, optimizer, None if before is None else before[0])
            if before is None and self._taken:
                optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch warns of a scheduler without steps
                for _ in range(self._taken):
                    self._run.step()

    def before(self) -> None:
        """Set the next step's rate."""
        if self._rates is not None:
            assert not callable(self._rates)
            (changes,) = listed(self._rates, len(self._optimizer.param_groups), self._taken, 1)
            for group, change in zip(self._optimizer.param_groups, changes, strict=True):
                group |= change

    def after(self) -> None:
        """A step was taken."""
        self._taken += 1
        if self._run is not None:
            self._run.step()

    def remembered(self, parameters: Sequence[Tensor]) -> Any:
        """What the optimiser remembers of each leaf, and with a schedule its place."""
        leaves = remember(self._optimizer, parameters)
        if self._run is not None:
            runs = [remember_scheduler(self._run, self._optimizer, self._built)]
            return {"leaves": leaves, "schedule": {"taken": self._taken, "runs": runs}}
        return leaves if self._rates is None else {"leaves": leaves, "schedule": {"taken": self._taken}}


def torch_optimizer(asker: str, optimizer: OptimizerFactory | TorchOptimizer) -> TorchOptimizer:
    """A factory as one without options."""
    if isinstance(optimizer, TorchOptimizer):
        return optimizer
    require_factory(f"{asker}: optimizer", optimizer)
    return TorchOptimizer(optimizer)


def leaf_memory(memory: Any) -> Memory | None:
    """What the optimiser remembers of each leaf, out of what `TorchOptimizer.minimise` gave."""
    return memory["leaves"] if isinstance(memory, dict) else memory  # type: ignore[no-any-return]


def of_optimizer(memory: Any) -> bool:
    """Whether this has the form of what `TorchOptimizer.minimise` gives, and not of another solver's memory."""
    if isinstance(memory, dict):
        return memory.keys() == {"leaves", "schedule"} and of_optimizer(memory["leaves"])
    return isinstance(memory, list) and all(isinstance(slot, dict) for slot in memory)


def require_finite(
    player: str, loss: float, norm: float, step: int, steps: int, where: str = "", advice: str = ""
) -> None:
    """Raise `NonFiniteError` for a loss, or the size of a gradient, that is NaN or infinite in an inner step."""
    place = f"at inner step {step + 1} of {steps}{where}"
    advice = advice or "Lower the inner learning rate, use another inner solver, or check for an optimum at infinity."
    if not abs(loss) < float("inf"):
        raise NonFiniteError(
            f"Player {player!r}: its loss became {loss} {place}: the steps before left its domain. {advice}"
        )
    if not norm < float("inf"):
        raise NonFiniteError(
            f"Player {player!r}: its gradient became NaN or infinite {place}, where its loss is {loss:.6g}: as that "
            f"of a square root, a norm or a standard deviation at 0. {advice}"
        )


def _norm(slopes: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(join(slopes))  # type: ignore[no-any-return]
