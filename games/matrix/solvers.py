"""The field's own solvers of finite games, behind one function; each is imported where it is used."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from bilevel import BilevelError
from bilevel.errors import NonConvergenceWarning
from games.matrix.conversion import to_nashpy, to_rational_pygambit
from games.matrix.finite import FiniteGame


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """A profile of mixed strategies, what it pays everybody `[N]`, and its exact NashConv, which is its error."""

    profile: tuple[Tensor, ...]
    payoffs: Tensor
    nash_conv: float


class Solver(ABC):
    """Finds Nash equilibria of a finite game."""

    @abstractmethod
    def profiles(self, game: FiniteGame) -> Iterable[list[Tensor]]:
        """The profiles it finds; `ValueError` for a game that it does not apply to."""


def equilibria(game: FiniteGame, solver: Solver | None = None, *, tolerance: float = 1e-6) -> list[Equilibrium]:
    """The Nash equilibria that a solver finds, each with its exact NashConv.

    What a solver (by default `Gambit()`) returns is checked here, whatever the solver says: a profile in which somebody
    would gain more than `tolerance` times the range of its own payoffs is left out with a `NonConvergenceWarning`.
    Raises `BilevelError` when nothing is left. Neither the units of a player's payoffs nor a number that is added to
    all of them matter.

    >>> from games.matrix.named import biased_rock_paper_scissors
    >>> [found] = equilibria(biased_rock_paper_scissors(), LinearProgramme())
    >>> (16 * found.profile[0]).round(decimals=6).tolist()
    [1.0, 10.0, 5.0]
    """
    chosen = solver or Gambit()
    ranges = game.ranges
    found, worst = [], 0.0
    for raw in chosen.profiles(game):
        # Solvers return probabilities to their own rounding; a distribution sums to one.
        profile = [strategy.clamp(min=0.0) / strategy.clamp(min=0.0).sum() for strategy in raw]
        regrets = game.regrets(profile)
        shares = torch.where(ranges > 0.0, regrets / ranges, 0.0)
        if float(shares.max()) <= tolerance:
            found.append(Equilibrium(tuple(profile), game.expected(profile), float(regrets.sum())))
        else:
            worst = max(worst, float(shares.max()))
    if worst:
        warnings.warn(
            f"{chosen} returned a profile in which a player would gain {worst:.1e} of its payoffs' range, above "
            f"{tolerance:g}; it is left out.",
            NonConvergenceWarning,
            stacklevel=2,
        )
    if not found:
        raise BilevelError(f"{chosen} found no equilibrium of this game, though one exists. Try another solver.")
    return found


@final
@dataclass(frozen=True)
class SupportEnumeration(Solver):
    """The equilibria of a non-degenerate game of two players, by nashpy; its cost doubles with each action.

    In floating point it misses those whose probabilities of 0 come out as -1e-17, even all of them; `Gambit()`, which
    is exact, and `VertexEnumeration()` do not.
    """

    def profiles(self, game: FiniteGame) -> Iterable[list[Tensor]]:
        """From nashpy; degenerate games may have more equilibria than it tells, and it warns."""
        return _of_pairs(to_nashpy(game.normalised()).support_enumeration())


@final
@dataclass(frozen=True)
class VertexEnumeration(Solver):
    """All extreme equilibria of a game of two players, by nashpy, from the vertices of the best-response polytopes.

    In degenerate games, where actions tie, it misses some: of 20 with payoffs 0, 1 and 2 it did in 4. `Gambit()` is
    exact.
    """

    def profiles(self, game: FiniteGame) -> Iterable[list[Tensor]]:
        """From nashpy."""
        return _of_pairs(to_nashpy(game.normalised()).vertex_enumeration())


@final
@dataclass(frozen=True)
class LemkeHowson(Solver):
    """One equilibrium of a game of two players by complementary pivoting, by nashpy; `dropped_label` picks which.

    Both need at least two actions: nashpy's pivoting does not end where one player has a single one.
    """

    dropped_label: int = 0

    def profiles(self, game: FiniteGame) -> Iterable[list[Tensor]]:
        """From nashpy."""
        if 1 in game.actions:
            raise ValueError(
                f"LemkeHowson: the players have {game.actions} actions; expected at least 2 each. Who has one has "
                "nothing to choose: use Gambit()."
            )
        if not 0 <= self.dropped_label < sum(game.actions):
            raise ValueError(
                f"LemkeHowson: dropped_label={self.dropped_label}; expected 0 to {sum(game.actions) - 1}, an action."
            )
        return _of_pairs([to_nashpy(game.normalised()).lemke_howson(initial_dropped_label=self.dropped_label)])


@final
@dataclass(frozen=True)
class Gambit(Solver):
    """Any of Gambit's solvers: `Gambit(pygambit.nash.enummixed_solve)`, or a function of the `pygambit.Game`.

    Left out, it is `enummixed_solve` (all extreme equilibria, exact, in rational numbers) for two players. For more it
    is `logit_solve` (one equilibrium, along the quantal-response path from uniform play) and, where that path ends
    elsewhere, the first of these that finds one: all equilibria by `enumpoly_solve` in games of up to 32 profiles of
    actions, one by `gnm_solve`, pure ones by `enumpure_solve`. The game that is solved has each player's payoffs in
    units of their range.
    """

    solve: Callable[[Any], Any] | None = None

    def profiles(self, game: FiniteGame) -> Iterable[list[Tensor]]:
        """From pygambit."""
        converted = to_rational_pygambit(game)
        import pygambit  # after the conversion, which says what to install

        nash, small = pygambit.nash, math.prod(game.actions) <= 32
        if self.solve is not None or len(game.actions) == 2:
            return _of_gambit((self.solve or nash.enummixed_solve)(converted))
        found: list[list[Tensor]] = []
        for solve in (nash.logit_solve, *([nash.enumpoly_solve] if small else []), nash.gnm_solve, nash.enumpure_solve):
            found += _of_gambit(solve(converted))
            if any(_rests(game, profile) for profile in found):
                # The path's end counts among all equilibria; the others' failures are nobody's business.
                return [profile for profile in found if _rests(game, profile)]
        return found


@final
@dataclass(frozen=True)
class LinearProgramme(Solver):
    """One equilibrium of a zero-sum game of two players: maximin strategies, by SciPy's HiGHS; polynomial time.

    Every equilibrium of such a game pays the same, its value. Source: von Neumann 1928; Dantzig 1951.
    """

    def profiles(self, game: FiniteGame) -> Iterable[list[Tensor]]:
        """Maximin for the row player, minimax for the column player."""
        if not game.is_zero_sum:
            raise ValueError(
                "LinearProgramme solves zero-sum games of two players, and this one is not. Use Gambit() for Nash, "
                "or optimal_commitment() where one player moves first."
            )
        row = game.payoffs[0].numpy()
        return [[_maximin(row), _maximin(-row.T)]]


@dataclass(frozen=True, eq=False)
class Committed:
    """What a leader commits to `[n]`, the action that the follower answers by, and what that pays both `[2]`."""

    strategy: Tensor
    answer: int
    payoffs: Tensor


def optimal_commitment(game: FiniteGame, *, leader: int = 0) -> Committed:
    """The best mixed strategy to commit to in a game of two: its (strong) Stackelberg equilibrium.

    For each action of the follower, one linear programme: the leader's best strategy among those to which that action
    is a best response. Where the follower is indifferent it answers as the leader likes best, which the leader gets as
    nearly as it wants by moving a little. Never below what any Nash equilibrium pays the leader.
    Source: Conitzer and Sandholm 2006, "Computing the optimal strategy to commit to".

    >>> from games.matrix.named import commitment
    >>> found = optimal_commitment(commitment())
    >>> found.strategy.tolist(), found.answer, float(found.payoffs[0])
    ([0.5, 0.5], 1, 3.5)
    """
    if len(game.actions) != 2 or leader not in (0, 1):
        raise ValueError(f"optimal_commitment: {len(game.actions)} players, leader={leader}; expected two, and 0 or 1.")
    turned = game if leader == 0 else game.permuted((1, 0))
    # HiGHS takes what is below 1e-7 for 0: in units of the players' own, that is 1e-7 of a range.
    mine, theirs = (table.numpy() for table in turned.normalised().payoffs)
    best: tuple[float, int, np.ndarray[Any, Any]] | None = None
    for answer in range(mine.shape[1]):
        worse = (theirs - theirs[:, [answer]]).T  # what the follower would gain by each other answer
        found = linprog(
            -mine[:, answer], A_ub=worse, b_ub=np.zeros(len(worse)), A_eq=np.ones((1, len(mine))), b_eq=[1.0]
        )
        if found.status == 2:  # no strategy makes this answer a best one
            continue
        _require_solved(found, "optimal_commitment")
        if best is None or -found.fun > best[0] + 1e-12:
            best = (-found.fun, answer, found.x)
    if best is None:  # impossible for exact arithmetic: every strategy has a best answer
        raise BilevelError("optimal_commitment: SciPy found no feasible programme; are the payoffs badly scaled?")
    strategy, answer = torch.from_numpy(best[2]), best[1]
    pays = torch.stack([table[:, answer] @ strategy for table in turned.payoffs])
    return Committed(strategy, answer, pays if leader == 0 else pays.flip(0))


def _maximin(payoff: np.ndarray[Any, Any]) -> Tensor:
    """The strategy `[m]` that maximises min over columns of x' payoff."""
    rows, columns = payoff.shape
    payoff = payoff - payoff.min()
    payoff = payoff / (payoff.max() or 1.0)  # of the size that the solver's tolerances are meant for
    found = linprog(
        np.r_[np.zeros(rows), -1.0],
        A_ub=np.c_[-payoff.T, np.ones(columns)],
        b_ub=np.zeros(columns),
        A_eq=np.r_[np.ones(rows), 0.0][None],
        b_eq=[1.0],
        bounds=[(0.0, None)] * rows + [(None, None)],
    )
    _require_solved(found, "LinearProgramme")
    return torch.from_numpy(found.x[:rows])


def _require_solved(found: Any, who: str) -> None:
    if found.status != 0:
        raise BilevelError(f"{who}: SciPy's linear programme ended with {found.message!r}.")


def _of_gambit(result: Any) -> list[list[Tensor]]:
    """The profiles of a result of pygambit's."""
    return [
        [torch.tensor([float(found[s]) for s in p.strategies], dtype=torch.float64) for p in found.game.players]
        for found in result.equilibria
    ]


def _rests(game: FiniteGame, profile: list[Tensor]) -> bool:
    """Whether a profile is an equilibrium but for a millionth of everybody's range."""
    clean = [strategy.clamp(min=0.0) / strategy.clamp(min=0.0).sum() for strategy in profile]
    return bool((game.regrets(clean) <= 1e-6 * game.ranges).all())


def _of_pairs(found: Iterable[Any]) -> Iterable[list[Tensor]]:
    for pair in found:
        strategies = [torch.as_tensor(np.asarray(s), dtype=torch.float64) for s in pair]
        if all(bool(s.isfinite().all()) for s in strategies):  # a pivot of a degenerate game may end in NaN
            yield strategies
