"""Finite games: what every profile of mixed strategies pays, and what each player would gain by leaving it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

import bilevel as bl

Profile = Sequence[Tensor]
"""A mixed strategy of each player: probabilities `[n_i]` that sum to one."""


@final
@dataclass(frozen=True, eq=False)
class FiniteGame:
    r"""N players with n_1, ..., n_N actions: `payoffs[i]` `[n_1, ..., n_N]` is what player i receives, to maximise.

    They are kept in float64; `FiniteGame.of` takes arrays and lists. Payoffs live at this boundary
    only: the `bl.Game`s made from it have losses, minus them. `names` are the players' names there (default row and
    column, or player1, player2, ...). Expected payoffs are the multilinear extension

        u_i(p) = sum over actions a of  payoffs[i][a] prod_j p_j[a_j]

    and cost the product of all action counts. Raises `ValueError` for shapes that disagree and values that are not
    finite.

    >>> pennies = FiniteGame.zero_sum([[1.0, -1.0], [-1.0, 1.0]])
    >>> pennies.nash_conv(pennies.uniform())
    0.0
    >>> pennies.nash_conv([torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])])
    1.0
    """

    payoffs: tuple[Tensor, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        payoffs = tuple(torch.as_tensor(table, dtype=torch.float64) for table in self.payoffs)
        count = len(payoffs)
        names = tuple(self.names) or (
            ("row", "column") if count == 2 else tuple(f"player{i + 1}" for i in range(count))
        )
        if count < 1 or any(table.shape != payoffs[0].shape or table.ndim != count for table in payoffs):
            raise ValueError(
                f"FiniteGame: payoffs of {count} players have shapes {[list(t.shape) for t in payoffs]}; expected one "
                "shape for all, with one dimension for each player's actions."
            )
        if payoffs[0].numel() == 0 or not all(bool(table.isfinite().all()) for table in payoffs):
            raise ValueError("FiniteGame: a payoff is missing, NaN or infinite; expected finite numbers.")
        if len(names) != count or len(set(names)) != count or not all(name.isidentifier() for name in names):
            raise ValueError(f"FiniteGame: names={names}; expected {count} different Python identifiers.")
        object.__setattr__(self, "payoffs", payoffs)
        object.__setattr__(self, "names", names)

    # Makers ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def of(*payoffs: Any, names: tuple[str, ...] = ()) -> FiniteGame:
        """From one table a player: arrays, nested lists or tensors `[n_1, ..., n_N]`."""
        return FiniteGame(tuple(torch.as_tensor(table, dtype=torch.float64) for table in payoffs), names)

    @staticmethod
    def zero_sum(payoff: Any, names: tuple[str, ...] = ()) -> FiniteGame:
        """What the row player receives `[m, n]`, the column player pays."""
        table = torch.as_tensor(payoff, dtype=torch.float64)
        return FiniteGame((table, -table), names)

    @staticmethod
    def symmetric(payoff: Any, names: tuple[str, ...] = ()) -> FiniteGame:
        """Two players in the same position: `payoff[a, b]` `[n, n]` is what a receives against b."""
        table = torch.as_tensor(payoff, dtype=torch.float64)
        if table.ndim != 2 or table.shape[0] != table.shape[1]:
            raise ValueError(f"FiniteGame.symmetric: payoff has shape {list(table.shape)}; expected [n, n].")
        return FiniteGame((table, table.T), names)

    def permuted(self, order: Sequence[int]) -> FiniteGame:
        """The same game with its players in another order."""
        if sorted(order) != list(range(len(self.payoffs))):
            raise ValueError(
                f"FiniteGame.permuted: order={list(order)}; expected each of 0 to {len(self.payoffs) - 1}."
            )
        tables = tuple(self.payoffs[i].permute(*order) for i in order)
        return FiniteGame(tables, tuple(self.names[i] for i in order))

    # What it is -----------------------------------------------------------------------------------------------------

    @property
    def actions(self) -> tuple[int, ...]:
        """How many actions each player has."""
        return tuple(self.payoffs[0].shape)

    @property
    def is_zero_sum(self) -> bool:
        """Whether two players' payoffs sum to the same number everywhere, to rounding: then to zero for their play."""
        if len(self.payoffs) != 2:
            return False
        total = self.payoffs[0] + self.payoffs[1]
        # Beside the payoffs' own rounding, and not beside a number that was added to all of them.
        rounding = 4.0 * torch.finfo(torch.float64).eps * max(float(table.abs().max()) for table in self.payoffs)
        return float(total.max() - total.min()) <= max(1e-12 * float(self.ranges.max()), rounding)

    @property
    def ranges(self) -> Tensor:
        """Each player's largest payoff less its smallest `[N]`: the unit that what it gains is read in."""
        return torch.stack([table.max() - table.min() for table in self.payoffs])

    def normalised(self) -> FiniteGame:
        """The same game in units of each player's own: its smallest payoff is 0, its range between 1 and 2.

        A player's payoffs plus a number, times a positive one, leave best responses and equilibria as they are; this
        factor is a power of two, so that nothing is rounded but what is subtracted.
        """
        tables = []
        for table, width in zip(self.payoffs, self.ranges.tolist(), strict=True):
            _, exponent = math.frexp(width)
            tables.append((table - table.min()) * 2.0 ** (1 - exponent) if width > 0.0 else torch.zeros_like(table))
        return FiniteGame(tuple(tables), self.names)

    def uniform(self) -> list[Tensor]:
        """Everybody plays every action alike."""
        return [torch.full((n,), 1.0 / n, dtype=torch.float64) for n in self.actions]

    def pure(self, *actions: int) -> list[Tensor]:
        """The profile in which player i plays `actions[i]`."""
        if len(actions) != len(self.actions) or any(not 0 <= a < n for a, n in zip(actions, self.actions, strict=True)):
            raise ValueError(f"FiniteGame.pure: actions={actions}; expected one for each player, below {self.actions}.")
        return [torch.eye(n, dtype=torch.float64)[a] for a, n in zip(actions, self.actions, strict=True)]

    # What a profile is worth ----------------------------------------------------------------------------------------

    def deviations(self, profile: Profile, player: int) -> Tensor:
        """What each action of a player `[n_player]` pays while the others keep to `profile`; differentiable in it."""
        table = self.payoffs[player].movedim(player, 0)
        for strategy in reversed([p for i, p in enumerate(profile) if i != player]):
            table = table.to(strategy) @ strategy
        return table

    def expected(self, profile: Profile) -> Tensor:
        """Everybody's expected payoff `[N]`; differentiable in the profile."""
        return torch.stack([self.deviations(profile, i).to(profile[i]) @ profile[i] for i in range(len(self.payoffs))])

    def regrets(self, profile: Profile) -> Tensor:
        """What each player would gain `[N]`, >= 0, by its best action against the others' strategies; exact."""
        self.check(profile)
        exact = [strategy.detach().to(torch.float64) for strategy in profile]
        # A number added to all payoffs of a player is nothing to it, and would hide what it gains in rounding.
        shifted = FiniteGame(tuple(table - table.min() for table in self.payoffs), self.names)
        found = []
        for i, strategy in enumerate(exact):
            pays = shifted.deviations(exact, i)
            # As a mean of differences >= 0, so that no rounding of a difference of means can be negative.
            found.append(((pays.max() - pays) * strategy).sum())
        return torch.stack(found)

    def nash_conv(self, profile: Profile) -> float:
        """The sum of all regrets: 0 exactly at the Nash equilibria; for two in a zero-sum game the duality gap."""
        return float(self.regrets(profile).sum())

    def exploitability(self, profile: Profile) -> float:
        """NashConv over the number of players."""
        return self.nash_conv(profile) / len(self.payoffs)

    def check(self, profile: Profile) -> None:
        """Raise `ValueError` unless it is one distribution for each player, to 1e-6."""
        if len(profile) != len(self.actions):
            raise ValueError(f"FiniteGame: a profile of {len(profile)} strategies for {len(self.actions)} players.")
        for name, count, strategy in zip(self.names, self.actions, profile, strict=True):
            if tuple(strategy.shape) != (count,):
                raise ValueError(
                    f"FiniteGame: the strategy of {name!r} has shape {list(strategy.shape)}; expected [{count}]."
                )
            value = strategy.detach()
            if not bool(value.isfinite().all()) or float(value.min()) < -1e-6 or abs(float(value.sum()) - 1.0) > 1e-6:
                raise ValueError(
                    f"FiniteGame: the strategy of {name!r} is {value.tolist()}; expected probabilities that sum to one."
                )

    # As a differentiable game -----------------------------------------------------------------------------------------

    def over_logits(self, init: Sequence[Tensor] | None = None, *, entropy: float = 0.0) -> bl.Game:
        """Everybody chooses logits `[n_i]` (at first 0), plays their softmax, and loses minus its expected payoff.

        With `entropy` > 0 each also receives that much times its own strategy's entropy: its best response is then
        softmax(deviations / entropy), unique and smooth (a quantal response, McKelvey and Palfrey 1995), and a follower
        has an answer inside the simplex that implicit differentiation can follow. Logits have one direction too many,
        along which nothing changes: a Hessian there is singular, so that `Dense` solvers refuse it.
        """
        if not entropy >= 0.0:
            raise ValueError(f"FiniteGame.over_logits: entropy={entropy}; expected a number >= 0.")
        start = [torch.zeros(n, dtype=torch.float64) for n in self.actions] if init is None else list(init)

        def loss(chosen: Mapping[str, Tensor], i: int) -> Tensor:
            profile = [chosen[name].softmax(-1) for name in self.names]
            bonus = entropy * (profile[i] * chosen[self.names[i]].log_softmax(-1)).sum() if entropy else 0.0
            return bonus - self.deviations(profile, i).to(profile[i]) @ profile[i]

        return self._game(loss, start)

    def over_simplex(self, init: Sequence[Tensor] | None = None) -> bl.Game:
        """Everybody chooses probabilities `[n_i]` themselves (at first uniform); losses are minus the expected payoffs.

        Off the simplex a loss goes on as a constant: a player's gradient there is that along the simplex, minus its
        deviations less their mean, and vanishes where all its actions pay alike. So `certify_nash` certifies an
        equilibrium in which everybody plays every action; at one on the border a gradient points outwards, and
        `regrets` tells what it is worth. Nothing keeps a gradient step inside the simplex; `games.matrix.learning` has
        the rules that stay there.
        """
        start = self.uniform() if init is None else list(init)
        self.check(start)

        def loss(chosen: Mapping[str, Tensor], i: int) -> Tensor:
            profile = [chosen[name] for name in self.names]
            pays = self.deviations(profile, i).to(profile[i])
            return pays.mean() * (profile[i].sum() - 1.0) - pays @ profile[i]

        return self._game(loss, start)

    def profile(self, variables: Mapping[str, Any]) -> list[Tensor]:
        """The mixed strategies that logits by player's name mean: of a solution of `over_logits`."""
        return [variables[name].detach().softmax(-1) for name in self.names]

    def _game(self, losses: Callable[[Mapping[str, Tensor], int], Tensor], start: Sequence[Tensor]) -> bl.Game:
        players = {}
        for i, name in enumerate(self.names):

            def loss(*, i: int = i, **chosen: Tensor) -> Tensor:
                return losses(chosen, i)

            # A Player reads the names of its objective's parameters, and there are as many as players.
            keywords = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in self.names]
            loss.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
            players[name] = bl.Player(loss, start[i])
        return bl.Game(**players)
