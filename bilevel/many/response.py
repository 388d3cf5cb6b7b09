"""What a response needs to answer many games at once."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.game import Game
from bilevel.inner.torch_optim import OptimizerFactory, player_parameters
from bilevel.linear import LinearSolver
from bilevel.linear.base import SolvesLinearSystems
from bilevel.many.inner import entrywise
from bilevel.many.linear import BatchedLinearSolver
from bilevel.responses.promise import Size
from bilevel.tree import leaves


def linear_solver_of(game: Game, follower: str, solver: LinearSolver) -> SolvesLinearSystems:
    """`solver` itself, or of many games one that gives each its own scalars and its own end."""
    if game.count is None:
        return solver
    widths = tuple(leaf[0].numel() for leaf in leaves(game.initial(follower)))
    return BatchedLinearSolver(solver=solver, count=game.count, widths=widths)


def worst_above(norm: Size, threshold: Size, relative: Size) -> str | None:
    """How far a follower's gradient is above a threshold, in words, in units of the start; None where it is not."""
    if not isinstance(relative, Tensor):
        return None if norm <= threshold else f"{relative:.3g} of its value at the start"
    above = ~(norm <= threshold)
    if not bool(above.any()):
        return None
    worst = int(torch.where(above, relative, 0.0).argmax())
    return (
        f"up to {float(relative[worst]):.3g} of its value at the start in {int(above.sum())} of {len(relative)} games, "
        f"the worst being game {worst},"
    )


def games_above(norm: Size, threshold: Size) -> list[int] | None:
    """The games whose follower's gradient is above its threshold; None where there is one game alone."""
    return (~(norm <= threshold)).nonzero().flatten().tolist() if isinstance(norm, Tensor) else None


def refuse_mixing(response: str, optimizer: OptimizerFactory, game: Game, follower: str) -> None:
    """Raise `TypeError` when a response steps many games by an optimiser that would mix them."""
    if game.count is None:
        return
    tuned = player_parameters(optimizer, dict.fromkeys(game.names))
    if tuned:
        raise TypeError(
            f"{response}: its optimiser takes the variables of {tuned[0]!r}, one in each game; there is one optimiser "
            "for all games. Solve them one by one: solve(games.game(i), ...)."
        )
    if not entrywise(optimizer, leaves(game.initial(follower))):
        raise TypeError(
            f"{response}: its optimiser does not move each entry by itself, so that player {follower!r} would mix "
            f"{game.count} games. Use SGD, Adam or another entrywise one with groups that do not depend on shapes, or "
            "solve them one by one: solve(games.game(i), ...)."
        )
