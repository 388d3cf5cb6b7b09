"""How players come to play: rules that stay inside the simplex, for comparison with gradients and with solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from games.matrix.finite import FiniteGame, Profile

State = dict[str, list[Tensor]]
"""What a rule remembers: tensors `[n_i]` by name, one for each player."""


class Rule(ABC):
    """Turns what every action would have paid into the next profile; everybody moves at once, payoffs are exact."""

    def start(self, game: FiniteGame) -> State:
        """The memory before the first round."""
        return {"total": [torch.zeros(n, dtype=torch.float64) for n in game.actions]}

    @abstractmethod
    def step(self, profile: Profile, pays: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        """The next profile and memory, from this round's profile and what each action `[n_i]` paid against it."""


@dataclass(frozen=True, eq=False)
class Learned:
    """A run: the last profile, the average of all rounds' (in zero-sum games what converges), and how far each is.

    `nash_conv` and `average_nash_conv` are exact, by the round they were taken at, `rounds`. `play` holds the profiles
    themselves at those rounds, one tensor `[len(rounds), n_i]` a player.
    """

    last: list[Tensor]
    average: list[Tensor]
    rounds: list[int]
    nash_conv: list[float]
    average_nash_conv: list[float]
    play: list[Tensor] = field(repr=False)
    state: dict[str, Any] = field(repr=False)


def learn(
    game: FiniteGame,
    rule: Rule,
    *,
    rounds: int = 1000,
    start: Profile | None = None,
    every: int = 1,
    resume: Learned | None = None,
    callback: Callable[[int, float], object] = lambda number, nash_conv: None,
) -> Learned:
    """Play `rounds` rounds by a rule, from `start` (default uniform), and see every `every`th.

    `resume` goes on from an earlier run's end, and ends where one uninterrupted run of all rounds ends, bit for bit.
    Costs two passes over the payoff tensors a round.

    >>> from games.matrix.named import rock_paper_scissors
    >>> start = [torch.tensor([0.5, 0.25, 0.25]).double(), torch.full((3,), 1 / 3).double()]
    >>> found = learn(rock_paper_scissors(), EntropicMirrorDescent(0.3, optimistic=True), rounds=2000, start=start)
    >>> found.nash_conv[-1] < 1e-6
    True
    """
    if rounds < 1 or every < 1:
        raise ValueError(f"learn: rounds={rounds}, every={every}; expected at least 1 of each.")
    if resume is None:
        profile = [p.to(torch.float64) for p in (game.uniform() if start is None else start)]
        game.check(profile)
        memory, total, done = rule.start(game), [torch.zeros_like(p) for p in profile], 0
        seen: tuple[list[int], list[float], list[float], list[list[Tensor]]] = ([], [], [], [[] for _ in profile])
    else:
        profile, memory = resume.state["profile"], resume.state["memory"]
        total, done = resume.state["total"], resume.state["done"]
        play = [list(rows) for rows in resume.play]
        seen = (list(resume.rounds), list(resume.nash_conv), list(resume.average_nash_conv), play)
    shown = profile
    for number in range(done + 1, done + rounds + 1):
        shown = profile
        total = [t + p for t, p in zip(total, profile, strict=True)]
        if number % every == 0 or number == done + rounds:
            seen[0].append(number)
            seen[1].append(game.nash_conv(profile))
            seen[2].append(game.nash_conv([t / number for t in total]))
            for rows, strategy in zip(seen[3], profile, strict=True):
                rows.append(strategy)
            callback(number, seen[2][-1])
        pays = [game.deviations(profile, i) for i in range(len(profile))]
        profile, memory = rule.step(profile, pays, memory)
    ended = done + rounds
    state = {"profile": profile, "memory": memory, "total": total, "done": ended}
    average = [t / ended for t in total]
    return Learned(shown, average, seen[0], seen[1], seen[2], [torch.stack(rows) for rows in seen[3]], state)


@final
@dataclass(frozen=True)
class RegretMatching(Rule):
    """Play actions in proportion to how much one regrets not having played them; uniformly when none is regretted.

    The average regret after T rounds is at most range sqrt(n / T), so that in zero-sum games of two the average
    profile's NashConv is twice that. `plus` forgets negative regret, much faster in practice. Source: Hart and
    Mas-Colell 2000; Tammelin 2014 (arXiv 1407.5042).
    """

    plus: bool = False

    def step(self, profile: Profile, pays: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        """Regrets gathered, and their positive parts normalised."""
        regrets, after = [], []
        for strategy, pay, before in zip(profile, pays, state["total"], strict=True):
            regret = before + pay - pay @ strategy
            regret = regret.clamp(min=0.0) if self.plus else regret
            positive = regret.clamp(min=0.0)
            uniform = torch.full_like(strategy, 1.0 / len(strategy))
            after.append(positive / positive.sum() if float(positive.sum()) > 0.0 else uniform)
            regrets.append(regret)
        return after, {"total": regrets}


@final
@dataclass(frozen=True)
class FictitiousPlay(Rule):
    """Play a best response to the others' average so far; several of them alike.

    Its averages converge in zero-sum games, potential games and 2 x n games, and circle in Shapley's. The others'
    averages are taken as independent, which for more than two players is one choice of several. Source: Brown 1951.
    """

    def start(self, game: FiniteGame) -> State:
        """No rounds, and the game, whose payoffs against averages are asked for."""
        return {"total": [torch.zeros(n, dtype=torch.float64) for n in game.actions], "tables": list(game.payoffs)}

    def step(self, profile: Profile, pays: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        """Best responses to the averages."""
        total = [t + p for t, p in zip(state["total"], profile, strict=True)]
        averages, game = [t / t.sum() for t in total], FiniteGame(tuple(state["tables"]))
        after = []
        for i in range(len(total)):
            against = game.deviations(averages, i)
            best = (against >= against.max() - 1e-12 * (1.0 + against.abs().max())).to(against)
            after.append(best / best.sum())
        return after, state | {"total": total}


@final
@dataclass(frozen=True)
class EntropicMirrorDescent(Rule):
    """Multiply each action's probability by exp(step_size * its payoff): Hedge, multiplicative weights.

    The average regret after T rounds is at most log n / (step_size T) + step_size range^2 / 8. The last profile runs
    away from a mixed equilibrium of a zero-sum game; with `optimistic` (twice this round's payoff less the last one's)
    it comes to it, for steps that are small beside the payoffs. Source: Freund and Schapire 1999; Rakhlin and Sridharan
    2013 (arXiv 1311.1869).
    """

    step_size: float
    optimistic: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.step_size < float("inf"):
            raise ValueError(f"EntropicMirrorDescent: step_size={self.step_size}; expected a positive finite number.")

    def start(self, game: FiniteGame) -> State:
        """No payoff seen."""
        return {"last": [torch.zeros(n, dtype=torch.float64) for n in game.actions]}

    def step(self, profile: Profile, pays: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        """In logarithms, so that no product underflows before it is normalised."""
        after = []
        for strategy, pay, last in zip(profile, pays, state["last"], strict=True):
            seen = 2.0 * pay - last if self.optimistic else pay
            after.append((strategy.log() + self.step_size * seen).softmax(0))
        return after, {"last": pays}


@final
@dataclass(frozen=True)
class Replicator(Rule):
    """Strategies that pay more than average grow: p_a' = p_a (u_a - u), followed for `time_step` a round.

    It circles around a mixed equilibrium of a zero-sum game for ever, and keeps the sum of both players' relative
    entropies to it. Each step is Runge-Kutta's of fourth order, which drifts by the fifth power of `time_step`.
    Source: Taylor and Jonker 1978; Sato et al. 2002.
    """

    time_step: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.time_step < float("inf"):
            raise ValueError(f"Replicator: time_step={self.time_step}; expected a positive finite number.")

    def start(self, game: FiniteGame) -> State:
        """The game, whose payoffs between the steps are asked for."""
        return {"tables": list(game.payoffs)}

    def step(self, profile: Profile, pays: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        """One Runge-Kutta step of the logarithms, normalised."""
        game = FiniteGame(tuple(state["tables"]))
        logs = [strategy.log() for strategy in profile]

        def slope(shift: list[Tensor], scale: float) -> list[Tensor]:
            at = [(log + scale * s).softmax(0) for log, s in zip(logs, shift, strict=True)]
            return [game.deviations(at, i) for i in range(len(at))]

        first, half = pays, 0.5 * self.time_step
        second = slope(first, half)
        third = slope(second, half)
        fourth = slope(third, self.time_step)
        stages = zip(logs, first, second, third, fourth, strict=True)
        after = [(log + self.time_step / 6.0 * (a + 2.0 * b + 2.0 * c + d)).softmax(0) for log, a, b, c, d in stages]
        return after, state
