"""The functions that constrain a leader, at everybody's variables: values, names, and how far they are broken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.constraints import ConstraintSet
from bilevel.constraints.functions import DOMAIN, EQUALITIES, INEQUALITIES, entry_names
from bilevel.dynamics import Dynamics
from bilevel.errors import InfeasibleWarning, NonFiniteError
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.game.kkt import KKT
from bilevel.game.situation import Situation
from bilevel.many import Tasks
from bilevel.randomness import random_kept
from bilevel.solving.warning_log import RunWarning
from bilevel.tree import Variables, flatten, leaves, map_leaves, named_leaves

Values = Mapping[str, Variables]
"""Kind of constraint -> what it is, the inequalities first."""

_TOLD = 4


class LeaderFunctions:
    """One leader's `inequality` and `equality`, and with `walls` those of its domain too.

    Raises `ValueError` for one that neither the leader nor any follower can change, before any work.
    """

    def __init__(self, game: Game, name: str, followers: Sequence[str], domain: ConstraintSet | None = None) -> None:
        player = game.players[name]
        self.game, self.name, self._domain = game, name, domain
        self._rests = KKT(player.inequality, player.equality, domain)
        start = {
            n: map_leaves(lambda t: t.requires_grad_(n == name or n in followers), game.initial(n))  # noqa: B023
            for n in game.names
        }
        batch, _ = game.draw(name, game.start(name))
        with torch.enable_grad():
            here = Situation(game, name, start, batch, game.buffers())
            found = KKT(player.inequality, player.equality).values(here, start)
        for kind, tree in found.items():
            for path, leaf in named_leaves(tree):
                if not leaf.requires_grad:
                    raise ValueError(
                        f"solve: the {kind}{path} of {name!r} depends on none of {[name, *followers]}: neither the "
                        "leader nor a follower's response can move it. Give it to the player that it binds."
                    )

    def first(self) -> Values:
        """What they are where everybody starts."""
        game = self.game
        start = {n: game.initial(n) for n in game.names}
        with torch.no_grad(), random_kept(game.device):
            return self.values(start, game.draw(self.name, game.start(self.name))[0], game.buffers())

    def walls(self) -> tuple[Tensor, Tensor]:
        """Which of the inequalities `[m]` and of the equalities `[p]` are no bounds of single entries."""
        bounds = self._domain is not None and self._domain.entrywise
        seen: dict[bool, list[Tensor]] = {True: [], False: []}
        for kind, tree in self.first().items():
            count = sum(leaf.numel() for leaf in leaves(tree))
            seen[kind in INEQUALITIES].append(torch.full((count,), not (kind == DOMAIN and bounds)))
        above, level = (torch.cat([torch.zeros(0, dtype=torch.bool), *seen[side]]) for side in (True, False))
        return above, level

    def values(self, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers) -> Values:
        """What the functions are, by kind."""
        return self._rests.values(Situation(self.game, self.name, variables, batch, buffers), variables)

    def rows(self, values: Values) -> tuple[Tensor, Tensor]:
        """The inequalities `[games, m]` and the equalities `[games, p]`."""
        count = self.game.count
        like = leaves(values)[0].new_zeros(count, 0)
        above, level = (
            [leaf.reshape(count, -1) for kind in kinds if kind in values for leaf in leaves(values[kind])]
            for kinds in (INEQUALITIES, EQUALITIES)
        )
        return torch.cat([like, *above], 1), torch.cat([like, *level], 1)

    def require_finite(self, values: Values, step: int) -> None:
        """Raise `NonFiniteError` for a function that has no value where the players are."""
        for kind, tree in values.items():
            for path, leaf in named_leaves(tree):
                if not bool(torch.isfinite(leaf).all()):
                    raise NonFiniteError(
                        f"Player {self.name!r}: its {kind}{path} is NaN or infinite in step {step}. Keep the leader "
                        "where it is defined by a domain= or another start, or lower the learning rate."
                    )

    def violation(self, values: Values) -> Tensor:
        """The largest entry of max(c, 0) and |e|: a 0-d tensor, or `[games]` of many."""
        c, e = self.rows(values)
        found = torch.cat([c.clamp(min=0.0), e.abs()], 1).amax(1)
        return found if self.game.record_keys != ("",) else found[0]

    def formed(self, values: Values, l: Tensor, m: Tensor) -> dict[str, Variables]:
        """Multipliers `[games, m]` and `[games, p]` in the form of the values."""
        parts = {True: l, False: m}
        found: dict[str, Variables] = {}
        for kind, tree in values.items():

            def taken(leaf: Tensor, above: bool = kind in INEQUALITIES) -> Tensor:
                size = leaf.numel() // self.game.count
                mine, parts[above] = parts[above][:, :size], parts[above][:, size:]
                return mine.reshape(leaf.shape).detach().clone()

            found[kind] = map_leaves(taken, tree)
        return found

    def told(self, values: Values, tolerance: float) -> str | None:
        """In words which are broken by more than the tolerance, and by how much; None where none is. Of one game."""
        found: list[tuple[float, str]] = []
        for kind, tree in values.items():
            for entry, value in zip(entry_names(kind, tree), flatten(tree).tolist(), strict=True):
                off = max(value, 0.0) if kind in INEQUALITIES else abs(value)
                if off > tolerance:
                    found.append((off, f"{entry} is {value:.4g}, wanted {'<= 0' if kind in INEQUALITIES else '= 0'}"))
        if not found:
            return None
        found.sort(key=lambda pair: -pair[0])
        more = f", and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        return ", ".join(text for _, text in found[:_TOLD]) + more


def functions_of(
    game: Game, leading: Sequence[str], followers: Sequence[str], driven: Collection[str], dynamics: Dynamics
) -> dict[str, LeaderFunctions]:
    """Those that constrain leaders; of one whom SciPy has `driven`, the walls of its domain too."""
    found: dict[str, LeaderFunctions] = {}
    for name in leading:
        members = [game.players[member] for member in game.members(name)]
        if name in driven:
            found[name] = LeaderFunctions(game, name, followers, members[0].domain)
        elif any(player.constraints for player in members):
            if not dynamics.rests_with_bounds:
                raise TypeError(
                    f"solve: {dynamics!r} looks ahead, corrects the gradient or evaluates losses by itself, and the "
                    f"functions of {name!r} are terms of a Lagrangian that it does not know. Use Simultaneous(), "
                    "Alternating(), TwoTimescale(), Optimistic() or NegativeMomentum()."
                )
            if isinstance(game, Tasks):
                game.require_one(f"solve: {name!r} leads and has functions as constraints, which")
            found[name] = LeaderFunctions(game, name, followers)
    return found


def broken(functions: LeaderFunctions, values: Values, violation: Tensor, tolerance: float) -> RunWarning:
    """A warning of a leader's functions that do not hold where it ended."""
    games: frozenset[int] | None = None
    if violation.ndim:
        stack: Any = functions.game
        games = frozenset((violation > tolerance).nonzero().flatten().add(stack.offset).tolist())
        what = f"in {len(games)} of {stack.told}, by {float(violation.max()):.3g} at most"
    else:
        what = str(functions.told(values, tolerance))
    text = (
        f"The run ended where the functions of {functions.name!r} are broken: {what}. Give it more steps=, another "
        'start, or optimizer=bl.Scipy("SLSQP"); with an AugmentedLagrangian a larger penalty= or a lower learning rate.'
    )
    return RunWarning(text, games, InfeasibleWarning)
