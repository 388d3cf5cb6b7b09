"""Named games of the literature, and random ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from games.matrix.finite import FiniteGame


def matching_pennies() -> FiniteGame:
    """Row wants the same side, column the other one. Uniform is the only equilibrium; value 0."""
    return FiniteGame.zero_sum([[1, -1], [-1, 1]])


def rock_paper_scissors() -> FiniteGame:
    """Uniform is the only equilibrium; value 0."""
    return FiniteGame.zero_sum([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])


def biased_rock_paper_scissors() -> FiniteGame:
    """Wins of different worth; the only equilibrium is (1, 10, 5) / 16 for both, value 0."""
    return FiniteGame.zero_sum([[0, -0.25, 0.5], [0.25, 0, -0.05], [-0.5, 0.05, 0]])


def prisoners_dilemma() -> FiniteGame:
    """Cooperate or defect; to defect dominates. Payoffs are minus years: -1, -3, 0, -2."""
    return FiniteGame.symmetric([[-1, -3], [0, -2]])


def battle_of_the_sexes() -> FiniteGame:
    """Two pure equilibria of different taste, and a mixed one, (3/5, 2/5) and (2/5, 3/5), worse for both."""
    return FiniteGame.of([[3, 0], [0, 2]], [[2, 0], [0, 3]])


def stag_hunt() -> FiniteGame:
    """Two pure equilibria, one that pays and one that is safe, and a mixed one at (2/3, 1/3)."""
    return FiniteGame.symmetric([[4, 0], [3, 2]])


def chicken() -> FiniteGame:
    """Dare or swerve: two pure equilibria, in which one dares, and a mixed one at (1/3, 2/3)."""
    return FiniteGame.symmetric([[0, 7], [2, 6]])


def shapley() -> FiniteGame:
    """Uniform is the only equilibrium, and fictitious play circles around it for ever (Shapley 1964)."""
    return FiniteGame.of([[0, 1, 0], [0, 0, 1], [1, 0, 0]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]])


def commitment() -> FiniteGame:
    """Nash pays the row player 2, committing to (1/2, 1/2) pays it 3.5 (Conitzer and Sandholm 2006)."""
    return FiniteGame.of([[2, 4], [1, 3]], [[1, 0], [0, 1]])


def jordan() -> FiniteGame:
    """Matching pennies for three: 1 wants to match 2, 2 to match 3, and 3 not to match 1 (Jordan 1993). Uniform."""
    a, b, c = torch.meshgrid(*(torch.arange(2),) * 3, indexing="ij")
    return FiniteGame(tuple(2.0 * (same == wanted) - 1.0 for same, wanted in ((a, b), (b, c), (c, 1 - a))))


def random_game(actions: Sequence[int], *, seed: int = 0, correlation: float = 0.0) -> FiniteGame:
    """Standard normal payoffs; `correlation` between the players' payoffs at the same profile.

    -1 / (players - 1), the least possible, is zero-sum; 1 is a game of common interest.
    """
    count = len(actions)
    least = -1.0 / (count - 1) if count > 1 else 0.0
    if not least - 1e-12 <= correlation <= 1.0:
        raise ValueError(
            f"random_game: correlation={correlation}; expected {least:g} (zero-sum) to 1 for {count} players."
        )
    draws = torch.randn(count, *actions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # Own + shared parts whose covariance is (1 - c) I + c 11': the symmetric root of it.
    own = max(1.0 - correlation, 0.0) ** 0.5
    shared = (max(1.0 + (count - 1) * correlation, 0.0) ** 0.5 - own) / count
    return FiniteGame(tuple(own * draws + shared * draws.sum(0)))
