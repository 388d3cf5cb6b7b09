"""Games of several players with known equilibria: Nash when all move together, Stackelberg in order of play."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.game import Game, Player
from bilevel.testing.known import DOUBLE, Matrix, Numbers, constant


class KnownPlayers(ABC):
    """Players in order of play whose equilibria are known; their `game()` is the `Game` that is played."""

    @abstractmethod
    def game(self) -> Game:
        """The game, every player starting at zero, float64."""

    @abstractmethod
    def nash(self) -> Mapping[str, Tensor]:
        """Everybody's variables where nobody gains by moving alone."""

    @abstractmethod
    def jacobian(self) -> Tensor:
        """The Jacobian `[n, n]` of the stacked own-gradients at the Nash equilibrium."""

    @abstractmethod
    def stackelberg(self) -> Mapping[str, Tensor]:
        """Everybody's variables when each player anticipates all who move after it."""


@final
@dataclass(frozen=True)
class QuadraticPlayers(KnownPlayers):
    r"""Players of one scalar each, with quadratic losses.

    $$
    L_i = \tfrac12 M_{ii} z_i^2 + z_i \Big(\sum_{j \ne i} M_{ij} z_j + m_i\Big) + \tfrac12 \sum_j P_{ij} z_j^2
    $$

    The stacked own gradients are $M z + m$, so Nash is $-M^{-1} m$; it is one because every $M_{ii} > 0$. A symmetric M
    is a potential game, $M_{ij} = -M_{ji}$ with two players a saddle.

    Args:
        matrix: M `[n, n]`.
        shift: m `[n]`.
        private: P `[n, n]`, what a player's loss owes to the others alone: Nash does not notice, Stackelberg does.

    Raises:
        ValueError: If a diagonal entry of M is not positive.
    """

    matrix: Matrix
    shift: Numbers
    private: Matrix = ()

    def __post_init__(self) -> None:
        if any(row[i] <= 0.0 for i, row in enumerate(self.matrix)):
            raise ValueError(f"QuadraticPlayers: matrix {self.matrix} has a diagonal entry <= 0; expected all > 0.")

    @property
    def names(self) -> tuple[str, ...]:
        """a, b, c, ..."""
        return tuple("abcdefghijklmnopqrstuvwxyz"[: len(self.shift)])

    def _forms(self) -> list[tuple[Tensor, Tensor]]:
        """Each loss as 1/2 z'Qz + q'z."""
        count = len(self.shift)
        matrix, shift = constant(self.matrix, DOUBLE), constant(self.shift, DOUBLE)
        forms = []
        for i in range(count):
            quadratic, linear = torch.zeros_like(matrix), torch.zeros_like(shift)
            quadratic[i, :] += matrix[i]
            quadratic[:, i] += matrix[i]
            quadratic[i, i] = matrix[i, i]
            if self.private:
                quadratic += torch.diag(constant(self.private, DOUBLE)[i])
                quadratic[i, i] = matrix[i, i]
            linear[i] = shift[i]
            forms.append((quadratic, linear))
        return forms

    def game(self) -> Game:
        """Scalars of float64 from zero."""
        players = {}
        for name, (quadratic, linear) in zip(self.names, self._forms(), strict=True):
            players[name] = Player(_loss_of(self.names, quadratic, linear), torch.zeros((), dtype=torch.float64))
        return Game(**players)

    def nash(self) -> Mapping[str, Tensor]:
        """-M^-1 m."""
        z = -torch.linalg.solve(constant(self.matrix, DOUBLE), constant(self.shift, DOUBLE))
        return dict(zip(self.names, z, strict=True))

    def jacobian(self) -> Tensor:
        """M."""
        return constant(self.matrix, DOUBLE)

    def stackelberg(self) -> Mapping[str, Tensor]:
        """By substitution from the last player to the first: each $z_i$ is affine in those who move before it.

        Raises:
            ArithmeticError: If an earlier player's loss, with the answers put in, is not convex.
        """
        forms, count = self._forms(), len(self.shift)
        # Columns: z as an affine function of (z_1 .. z_k, 1), for k from n down to 0.
        lift = torch.cat([torch.eye(count, dtype=torch.float64), torch.zeros(count, 1, dtype=torch.float64)], 1)
        for k in reversed(range(count)):
            quadratic, linear = forms[k]
            total = lift.T @ quadratic @ lift
            total[:, -1] += lift.T @ linear
            if not float(total[k, k]) > 0.0:
                raise ArithmeticError(f"Player {self.names[k]!r} has no best commitment: its total curvature is <= 0.")
            answer = -total[k] / total[k, k]  # z_k as a row over (z_1 .. z_k, 1)
            keep = [*range(k), k + 1]
            lift = lift[:, keep] + torch.outer(lift[:, k], answer[keep])
        return dict(zip(self.names, lift[:, 0], strict=True))


def saddle(own: tuple[float, float], coupling: float, shift: tuple[float, float] = (0.0, 0.0)) -> QuadraticPlayers:
    r"""A zero-sum game $\tfrac12 p a^2 + c\, a b - \tfrac12 q b^2 + s a - t b$ of a, who minimises it, and b.

    Each player's loss holds the other's square with the other sign, as zero-sum asks.

    Args:
        own: p and q.
        coupling: c.
        shift: s and t.
    """
    first, second = own
    return QuadraticPlayers(((first, coupling), (-coupling, second)), shift, private=((0.0, -second), (-first, 0.0)))


def cournot_players(intercept: float, slope: float, costs: Numbers) -> QuadraticPlayers:
    r"""Cournot's oligopoly: firm i minimises $-q_i (a - b \sum_j q_j - c_i)$.

    Args:
        intercept: a.
        slope: b.
        costs: c, one a firm.
    """
    count = len(costs)
    matrix = tuple(tuple(2.0 * slope if i == j else slope for j in range(count)) for i in range(count))
    return QuadraticPlayers(matrix, tuple(cost - intercept for cost in costs))


def bertrand_players(alpha: float, beta: float, gamma: float, costs: Numbers) -> QuadraticPlayers:
    r"""Bertrand's oligopoly: firm i minimises $-(p_i - c_i) (\alpha - \beta p_i + \gamma \sum_{j \ne i} p_j)$.

    The term $\gamma c_i p_j$, which firm i cannot move, is left out: it is linear in the others' prices, and matters to
    a leader. Use `Bertrand` for the duopoly with an order of play.

    Args:
        alpha: Demand at prices of 0.
        beta: What an own price takes from it.
        gamma: What each other price adds to it.
        costs: c, one a firm.
    """
    count = len(costs)
    matrix = tuple(tuple(2.0 * beta if i == j else -gamma for j in range(count)) for i in range(count))
    return QuadraticPlayers(matrix, tuple(-(alpha + beta * cost) for cost in costs))


def _loss_of(names: tuple[str, ...], quadratic: Tensor, linear: Tensor) -> Callable[..., Tensor]:
    """1/2 z'Qz + q'z as a function of the players by name."""

    def loss(**variables: Tensor) -> Tensor:
        z = torch.stack([variables[name] for name in names])
        return 0.5 * (z @ (quadratic.to(z) @ z)) + linear.to(z) @ z

    # A Player reads the names of its objective's parameters, and there are as many as players.
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return loss
