"""The leaders' variables, and the optimisers that move them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bilevel.constraints import AugmentedLagrangian
from bilevel.errors import NonFiniteError
from bilevel.game import Game, Residual
from bilevel.game.constrained import ConstrainedGradient, spread
from bilevel.game.situation import Situation
from bilevel.inner import Scipy
from bilevel.inner.refusals import refuse_unprojected
from bilevel.inner.torch_optim import (
    OptimizerFactory,
    SchedulerFactory,
    build,
    build_scheduler,
    kept_memory,
    recall,
)
from bilevel.solving.driven import feasibility, require_driven
from bilevel.tree import Made, Variables, leaves

LeaderOptimizer = OptimizerFactory | AugmentedLagrangian | Scipy
"""What moves a leader: a torch.optim optimiser, one on the augmented Lagrangian, or SciPy's minimisers."""


class Leaders:
    """Where they are, as leaves that their optimisers step in place; all of it can be saved and restored."""

    def __init__(
        self,
        game: Game,
        names: Sequence[str],
        optimizer: LeaderOptimizer | Mapping[str, LeaderOptimizer] | None,
        scheduler: SchedulerFactory | None,
        clip_norm: float | None,
        placed: Sequence[str] = (),
    ) -> None:
        self.game, self.names, self.clip_norm, self.placed = game, list(names), clip_norm, tuple(placed)
        moved = [name for name in names if name not in placed]
        if isinstance(optimizer, Mapping) and set(optimizer) != set(moved):
            by_rule = f" {list(placed)} are moved by the rule of play." if placed else ""
            raise ValueError(
                f"solve: optimizer has {sorted(optimizer)}; expected one for each leader, {moved}.{by_rule}"
            )
        for name in names:
            _refuse_starting(game, name)
        default: OptimizerFactory = partial(torch.optim.Adam, lr=0.01)
        chosen = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(moved, optimizer or default)
        self.lagrangians = {name: lagrangian for name in moved if (lagrangian := _lagrangian(game, name, chosen[name]))}
        self.driven = {name: method for name in moved if isinstance(method := chosen[name], Scipy)}
        for name, method in self.driven.items():
            require_driven(game, names, name, method)
            if scheduler is not None or clip_norm is not None:
                told = f"solve: optimizer={method!r} chooses its steps itself"
                raise TypeError(f"{told}: it takes neither scheduler= nor clip_norm=.")
        plain: dict[str, Any] = {n: chosen[n] for n in moved if n not in self.driven}
        plain |= {name: lagrangian.optimizer or default for name, lagrangian in self.lagrangians.items()}
        self.factories: dict[str, OptimizerFactory] = plain
        self.scheduler = scheduler
        self._ranges = {name: game.coordinates(name) for name in names}
        self._domains = {name: self._domain(name) for name in names}
        self.points = {name: [t.requires_grad_() for t in self._coordinates(name)] for name in names}
        self.optimizers = {}
        for name in self.factories:
            game.refuse_mixing("solve", name, self.factories[name])
            self.optimizers[name] = build(self.factories[name], self.points[name])
            _refuse_searching(name, self.optimizers[name])
            rests = self._domains[name]
            if rests is not None:
                refuse_unprojected("solve", name, rests, self.optimizers[name])
        self.schedulers = (
            {} if scheduler is None else {n: build_scheduler(scheduler, o, None) for n, o in self.optimizers.items()}
        )

    def trees(self, point: Mapping[str, Sequence[Tensor]]) -> Mapping[str, Variables]:
        """Each leader's variables: `point` itself, and natural values of what has a range."""
        trees = Made(self._ranges, lambda name: self.game.structure(name).build(self._natural(name, point[name])))
        # Natural values are computed here, with grad or without, and not where somebody looks at them.
        return dict(trees) if self.ranged else trees

    def _natural(self, name: str, point: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(point, self._ranges[name], strict=True)
        return [leaf if found is None else found.natural(leaf) for leaf, found in pairs]

    def _coordinates(self, name: str) -> list[Tensor]:
        """Where a leader's optimiser starts."""
        pairs = zip(leaves(self.game.initial(name)), self._ranges[name], strict=True)
        return [leaf if found is None else found.inverse(leaf) for leaf, found in pairs]

    def _domain(self, name: str) -> Residual | None:
        """What a leader's steps are projected by; None where nothing is."""
        rests = self.game.residual(name)
        if name in self.lagrangians and self.game.players[name].domain is not None:  # its functions are in its loss
            rests = ConstrainedGradient(self.game.players[name].domain, None)
        if not rests.projects or any(self._ranges[name]):  # a coordinate keeps its range by itself
            return None
        for member in self.game.members(name):
            player = self.game.players[member]
            if player.prox is not None or player.option_players:
                what = "prox=" if player.prox is not None else f"a domain that depends on {list(player.option_players)}"
                raise TypeError(
                    f"solve: player {name!r} leads and has {what}; a leader's domain is a set that stands still. Put "
                    "the term into its objective, or give the player a response."
                )
        return None if name in self.driven else rests

    @cached_property
    def ranged(self) -> list[str]:
        """Those who are moved in the free coordinates of a range."""
        return [name for name in self.names if any(self._ranges[name])]

    @property
    def projects(self) -> list[str]:
        """Those whose steps are projected onto a domain."""
        return [name for name in self.names if self._domains[name] is not None]

    def _slope(self, name: str, direction: Sequence[Tensor], norm: Tensor) -> Tensor:
        """|projected gradient|: how fast a leader with a domain moves along its negative direction, of many games each.

        (x - P(x - s d)) / s for an s that is small and above rounding: from a bound outwards it does not move.
        """
        rests, x = self._domains[name], [leaf.detach() for leaf in self.points[name]]
        if rests is None:
            return norm
        length = torch.finfo(x[0].dtype).eps ** 0.5 * (1.0 + self.game.norms(x))
        s = length / torch.where(norm > 0.0, norm, 1.0)
        ahead = [leaf - spread(s, leaf) * slope for leaf, slope in zip(x, direction, strict=True)]
        ends = rests.settled(Situation(self.game, name, {}), ahead, 1.0)
        moved: Tensor = self.game.norms([leaf - end for leaf, end in zip(x, ends, strict=True)]) / s
        return moved

    def apply(self, name: str, direction: Sequence[Tensor], step: int) -> Tensor:
        """Step one leader along a direction, in the run's `step`, and back into its domain; the direction's norm.

        Of many games one each; of a leader with a domain that of the projected direction, 0 at its optimum.
        """
        norm = self.game.norms(direction)
        if not bool(torch.isfinite(norm).all()):
            raise NonFiniteError(
                f"Player {name!r}: its gradient at step {step} has {self.game.described_norm(norm)}. Lower the "
                "learning rates; its variables are still those of the step before."
            )
        moving = self._slope(name, direction, norm)
        for parameter, slope in zip(self.points[name], direction, strict=True):
            parameter.grad = slope
            if self.clip_norm is not None:
                scale = torch.where(norm <= self.clip_norm, 1.0, self.clip_norm / norm)
                parameter.grad = slope * scale.reshape(-1, *[1] * (slope.ndim - 1)) if scale.ndim else slope * scale
        self.optimizers[name].step()
        rests = self._domains[name]
        if rests is not None:
            with torch.no_grad():
                ends = rests.settled(Situation(self.game, name, {}), [leaf.detach() for leaf in self.points[name]], 1.0)
                for leaf, end in zip(self.points[name], ends, strict=True):
                    leaf.copy_(end)
        if name in self.schedulers:
            self.schedulers[name].step()
        return moving

    def place(self, name: str, where: Sequence[Tensor], step: int) -> None:
        """Put a player where a rule of play has moved it, in the run's `step`."""
        if not bool(torch.isfinite(self.game.norms(where)).all()):
            raise NonFiniteError(
                f"Player {name!r}: its variables became NaN or infinite in step {step}. Lower the learning rate that "
                "the rule of play moves it with."
            )
        with torch.no_grad():
            for parameter, value in zip(self.points[name], where, strict=True):
                parameter.copy_(value)

    def split(self, name: str, x: Tensor) -> list[Tensor]:
        """A vector `[n]` as leaves in the form of a leader's."""
        like = self.points[name]
        parts = torch.split(x, [leaf.numel() for leaf in like])
        return [part.reshape(leaf.shape).to(leaf) for part, leaf in zip(parts, like, strict=True)]

    def start(self, name: str) -> list[Tensor]:
        """Where a leader's run began."""
        return self._coordinates(name)

    def state(self) -> dict[str, Any]:
        """All of it, as tensors and numbers."""
        return {
            "points": {name: [t.detach() for t in point] for name, point in self.points.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "orders": {name: self._order(name) for name in self.optimizers},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
        }

    def _order(self, name: str) -> list[int]:
        """Which leaf comes at which place in an optimiser's groups, by which torch numbers what it remembers."""
        places = {id(leaf): place for place, leaf in enumerate(self.points[name])}
        return [places[id(leaf)] for group in self.optimizers[name].param_groups for leaf in group["params"]]

    def restore(self, saved: Mapping[str, Any], steps: int, changed: Collection[str] = ()) -> None:
        """Go on from what `state` gave after so many steps.

        Leaders who `changed` their optimiser or scheduler keep the present settings: of what the optimiser remembered,
        they take what has the form that theirs would have, and their schedulers stand where they were so many steps on.
        """
        with torch.no_grad():
            for name, point in self.points.items():
                for parameter, value in zip(point, saved["points"][name], strict=True):
                    parameter.copy_(value)
        for name, optimizer in self.optimizers.items():
            if name not in changed:
                optimizer.load_state_dict(saved["optimizers"][name])
                # torch turns all but the count of steps into the dtype of the leaves; NAdam keeps a product in float32.
                for place, slot in saved["optimizers"][name]["state"].items():
                    held = optimizer.state[self.points[name][saved["orders"][name][place]]]
                    held |= {k: v.detach().clone().to(held[k].device) for k, v in slot.items() if isinstance(v, Tensor)}
                if name in self.schedulers:
                    self.schedulers[name].load_state_dict(saved["schedulers"][name])
                continue
            slots, order = saved["optimizers"][name]["state"], saved["orders"][name]
            memory = [slots.get(order.index(place), {}) for place in range(len(order))]
            recall(optimizer, self.points[name], kept_memory(self.factories[name], self.points[name], memory))
            if name in self.schedulers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch expects a step of the optimiser before each of these
                    for _ in range(steps):
                        self.schedulers[name].step()


def _lagrangian(game: Game, name: str, method: LeaderOptimizer) -> AugmentedLagrangian | None:
    """What makes terms of a leader's functions; None where it has none, or where SciPy sees them."""
    constrained = [member for member in game.members(name) if game.players[member].constraints]
    if constrained and game.members(name) != (name,):
        raise ValueError(
            f"solve: {constrained[0]!r} leads as one of {name!r} and has functions as constraints. Players who lead "
            "together need no joining."
        )
    if isinstance(method, AugmentedLagrangian):
        if not constrained:
            raise ValueError(
                f"solve: the optimizer of {name!r} is an AugmentedLagrangian, and {name!r} has no inequality= or "
                "equality=. Give it the optimiser itself."
            )
        return method
    if isinstance(method, Scipy) or not constrained:
        return None
    return AugmentedLagrangian(method)


def tolerated(method: LeaderOptimizer | None, epsilon: float) -> float:
    """The violation of a leader's functions above which its end is infeasible, in their own units."""
    if isinstance(method, Scipy):
        return feasibility(epsilon)
    lagrangian = method if isinstance(method, AugmentedLagrangian) else AugmentedLagrangian()
    return max(lagrangian.tolerance, feasibility(epsilon))


def _refuse_starting(game: Game, name: str) -> None:
    """Refuse a leader with a start of its own, which would be ignored."""
    for member in game.members(name):
        if game.players[member].start is not None:
            raise ValueError(
                f"solve: player {member!r} has a start=, which is where a follower begins, and no response. Give it "
                f"one, such as {name}=Unrolled(...), or leave start= out."
            )


def _refuse_searching(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that evaluates the loss itself: a leader's loss is a whole round of the followers."""
    (_, *arguments) = inspect.signature(type(optimizer).step).parameters.values()
    if any(argument.default is argument.empty for argument in arguments):
        raise TypeError(
            f"solve: the optimizer of {name!r} is {type(optimizer).__name__}, whose step() wants a closure to evaluate "
            "the loss with, several times a step; solve gives it one gradient a step, on that step's batch and states. "
            "Use one such as Adam or SGD here, or bilevel.Scipy('L-BFGS-B') for one leader on a fixed batch; a "
            "follower's own optimiser may be LBFGS: Implicit(LBFGS, ...)."
        )
