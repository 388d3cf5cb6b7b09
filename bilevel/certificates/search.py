"""The best move that can be found for a player who moves alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import gradient
from bilevel.certificates.constrained import held_alone
from bilevel.constraints.active_set import KKTPoint, judged, optimum, reached
from bilevel.constraints.functions import Constrained
from bilevel.errors import BilevelWarning
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.game.situation import Situation
from bilevel.inner import InnerSolver
from bilevel.inner.base import minimised
from bilevel.randomness import random_kept, random_state
from bilevel.responses import Response
from bilevel.tree import Structure, Variables, flatten, join

_FAR = 1e6
"""A move so many times longer than the variables are is taken for a run to infinity."""


@dataclass(frozen=True)
class BestMove:
    """The best move y `[n]` that was found, what it gains, and how many of the searches agree."""

    y: Tensor
    loss: float
    gain: float
    upper: float
    agreeing: int
    searches: int
    gradients: int


@final
class AloneProblem:
    """A player's own problem, everybody else, the batch, buffers and random numbers held; what inner solvers see."""

    def __init__(
        self, game: Game, name: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
    ) -> None:
        self.game, self.name, self.batch = game, name, batch
        self.form: Structure = game.structure(name)
        self.others = {other: v for other, v in variables.items() if other != name}
        self.rests = game.residual(name)
        self.constraints: Constrained | None = held_alone(game, name, variables, batch, buffers).constraints
        self.count = 0
        self._buffers = {owner: tensors for owner, tensors in buffers.items() if tensors}
        self._situation = Situation(game, name, self.others, batch, self._buffers)
        self._random = random_state(game.device)

    def value(self, y: Tensor) -> float:
        """All of what it minimises at a flat y, its non-smooth term included."""
        parts = self.form.split(y)
        return float(self.gradients(parts)[0]) + float(self.rests.term(self._situation, parts))

    def within(self, y: Tensor) -> Tensor:
        """The nearest point of its domain, flat."""
        if not self.rests.any_step:
            return y
        return join(self.settled(self.form.split(y)))

    def most_gained(self, y: Tensor, mu: float) -> float:
        """How much a loss of strong convexity mu can still fall from a flat y: its lower bound, minimised."""
        if self.constraints is not None:
            point = self.judged(y)
            left = point.slope + point.at.push_c.T @ point.l + point.at.push_e.T @ point.m
            return max(0.0, float(left @ left) / (2.0 * mu) - float(point.l @ point.at.c + point.m @ point.at.e))
        parts = self.form.split(y)
        _, slopes = self.gradients(parts)
        ends = self.settled([a - b / mu for a, b in zip(parts, slopes, strict=True)], 1.0 / mu)
        way, slope = join(ends) - y, join(slopes)
        terms = [float(self.rests.term(self._situation, at)) for at in (parts, ends)]
        return max(0.0, terms[0] - terms[1] - float(slope @ way) - 0.5 * mu * float(way @ way))

    def judged(self, y: Tensor) -> KKTPoint:
        """A flat y within functions, with the multipliers that suit best."""
        assert self.constraints is not None
        return judged(self.constraints, y.detach().to("cpu", torch.float64))

    def allowed(self, y: Tensor) -> Tensor | None:
        """Where a search that ended at a flat y stands within functions: its optimum, or y; None outside them.

        An answer outside its constraints by no more than a search's own tolerance would gain what it may not have.
        """
        if self.constraints is None:
            return y
        point = optimum(self.constraints, y.detach().to("cpu", torch.float64))
        if reached(point, self.constraints.epsilon):
            return point.y.to(y)
        point = self.judged(y)
        return y if not len(point.violations) or float(point.violations.max()) <= 1e-9 else None

    def gradients(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The objective and its gradient in each leaf."""
        self.count += 1
        with random_kept(self.game.device, start=self._random), torch.no_grad():
            loss, slopes = gradient(
                lambda *leaves: self.game.loss(
                    self.name, {**self.others, self.name: self.form.build(leaves)}, self.batch, self._buffers or None
                ),
                *y,
            )
        return loss, list(slopes)

    @property
    def minimises(self) -> bool:
        """Whether it has no constraints."""
        return self.rests.minimises

    @property
    def bounds(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Those of its domain, where it is nothing but bounds."""
        return self.rests.bounds(self._situation)

    def field(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As `gradients`."""
        return self.gradients(y)

    def at_rest(self, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """What vanishes where it rests."""
        return self.rests.at_rest(self._situation, y, slopes)

    def settled(self, z: Sequence[Tensor], step: float | Tensor = 1.0) -> list[Tensor]:
        """z projected onto its domain."""
        return self.rests.settled(self._situation, z, step)

    def advance(self) -> None:
        """Nothing: the batch is held."""


def best_move(
    problem: AloneProblem, solver: InnerSolver, here: Tensor, starts: list[Tensor], steps: int, mu: float | None
) -> BestMove:
    """The lowest loss that the searches from `here` and from `starts` end at; `mu` is the loss's strong convexity."""
    loss = problem.value(here)
    best, lowest, ends = here, loss, []
    reach = _FAR * (1.0 + float(here.norm()))
    for start in [here, *starts]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy's, of steps that leave the loss's domain: the end is judged here
            y = problem.form.split(start.clone())
            found, _ = minimised(solver, problem, y, None, steps=steps, threshold=0.0)
        end = join(found).detach()
        if not bool(torch.isfinite(end).all()):
            continue
        within = end if float(end.norm()) > reach else problem.allowed(end)
        if within is None:
            continue
        end, value = within, problem.value(within)
        if math.isnan(value):
            continue
        ran_off = value == -math.inf or (float(end.norm()) > reach and value < loss - 1e3 * (1.0 + abs(loss)))
        ends.append(-math.inf if ran_off else value)
        if ends[-1] < lowest:
            best, lowest = end, ends[-1]
    gain = loss - lowest
    upper = math.inf if mu is None or not math.isfinite(gain) else gain + problem.most_gained(best, mu)
    slack = 0.01 * gain + 1e3 * torch.finfo(here.dtype).eps * (1.0 + abs(loss))
    agreeing = sum(end <= lowest + slack for end in ends) if math.isfinite(gain) else ends.count(-math.inf)
    return BestMove(best, loss, gain, upper, agreeing, 1 + len(starts), problem.count)


def starting_points(
    game: Game,
    name: str,
    present: Variables,
    bounds: tuple[float, float] | None,
    *,
    restarts: int,
    spread: float,
    seed: int,
) -> list[Tensor]:
    """The player's init, and draws around where it is, or in its box."""
    here = flatten(present).detach()
    generator = torch.Generator(device=here.device).manual_seed(seed)
    first = flatten(game.initial(name))
    if bounds is not None:
        low, high = bounds
        drawn = torch.rand(restarts, here.numel(), generator=generator, dtype=here.dtype, device=here.device)
        return [first.clamp(low, high), *(low + (high - low) * drawn)]
    size = spread * max(1.0, float(here.norm()) / math.sqrt(here.numel()))
    noise = torch.randn(restarts, here.numel(), generator=generator, dtype=here.dtype, device=here.device)
    return [first, *(here + size * noise)]


def answered(
    game: Game,
    name: str,
    variables: Mapping[str, Variables],
    response: Response,
    batch: Batch,
    seed: int,
    bounds: tuple[float, float] | None,
) -> Tensor:
    """What a response answers when the player is the last to move."""
    players = game.players
    turned = Game(**{other: players[other] for other in game.names if other != name}, **{name: players[name]})
    state = response.init(turned, follower=name, seed=seed)
    others = {other: v for other, v in variables.items() if other != name}
    with torch.no_grad(), warnings.catch_warnings(), random_kept(game.device):
        warnings.simplefilter("ignore", BilevelWarning)  # however good it is, what it gains is measured
        answer, _ = response(turned, others, state, batch)
    y = flatten(answer).detach()
    return y if bounds is None else y.clamp(*bounds)
