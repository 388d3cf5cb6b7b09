"""Where a follower begins, when that is a function of those who move before it: `Player(start=...)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bilevel.game.modules import CallableVariables
from bilevel.game.player import Player
from bilevel.game.residual import PlayedGame
from bilevel.randomness import random_kept
from bilevel.tree import Structure, Variables, leaves, map_leaves, named_leaves

StartsAlone = Mapping[str, tuple[str, ...]]
"""Player -> the variables of others, in words, that reach it by its start and reach nobody's loss."""


def formed(player: str, found: Variables, form: Structure) -> Variables:
    """What a start returned, as variables of the player; raises `ValueError` where it is of another form."""
    plain = dict(found) if isinstance(found, CallableVariables) else found
    if form.fits(plain):
        return plain
    # A module's variables and those of another like it may come in another order.
    given = dict(named_leaves(plain))
    wanted = [path for path, _ in named_leaves(form.build(range(len(form.shapes))))]  # type: ignore[arg-type]
    if set(given) != set(wanted) or [_shape(given[path]) for path in wanted] != [tuple(shape) for shape in form.shapes]:
        expected = {path or "tensor": tuple(shape) for path, shape in zip(wanted, form.shapes, strict=True)}
        shapes = {path or "tensor": _shape(leaf) for path, leaf in given.items()}
        raise ValueError(f"Player {player!r}: its start returned {shapes}; expected the form of its init, {expected}.")
    return form.build([given[path] for path in wanted])


def check_start_names(name: str, players: Mapping[str, Player]) -> None:
    """Refuse a start with parameters that name nobody who moves before the player."""
    order = list(players)
    earlier = order[: order.index(name)]
    player = players[name]
    for parameter in player.start_names:
        if parameter not in (*earlier, "batch"):
            raise ValueError(
                f"Player {name!r}: its start has a parameter {parameter!r}, which names no player who moves before it; "
                f"those are {earlier}. Rename it, declare that player earlier, or give the parameter a default value."
            )
    if player.start is None:
        return
    if not player.start_names:
        raise ValueError(f"Player {name!r}: its start has no parameters, so that it depends on nobody. Say init=.")
    if "batch" in player.start_names and player.data is None:
        raise ValueError(f"Player {name!r}: its start takes `batch`, but the player has no data=.")


def start_dependence(
    game: PlayedGame, name: str, players: Mapping[str, Player], initial: Mapping[str, Variables]
) -> dict[str, set[str]]:
    """Player -> the paths of its leaves that a player's start depends on; refuses what cannot be started at."""
    if players[name].start is None:
        return {}
    named = [other for other in players[name].start_names if other != "batch"]
    trial = {other: map_leaves(lambda t: t.detach().clone().requires_grad_(), initial[other]) for other in named}
    batch, _ = game.draw(name, game.start(name))
    with random_kept(game.device), torch.enable_grad():
        found = game.starting_point(name, trial, batch)
    for (path, leaf), like in zip(named_leaves(found), leaves(initial[name]), strict=True):
        if leaf.dtype != like.dtype or not bool(torch.isfinite(leaf).all()):
            raise ValueError(
                f"Player {name!r}: its start{path} is {leaf.dtype} with {_finite(leaf)} entries; expected finite "
                f"numbers of {like.dtype}."
            )
    attached = [leaf.sum() for leaf in leaves(found) if leaf.requires_grad]
    owners = [(other, path, leaf) for other, v in trial.items() for path, leaf in named_leaves(v)]
    grads: Sequence[Tensor | None] = [None] * len(owners)
    if attached and owners:
        grads = torch.autograd.grad(torch.stack(attached).sum(), [leaf for *_, leaf in owners], allow_unused=True)
    reached: dict[str, set[str]] = {}
    for (other, path, _), grad in zip(owners, grads, strict=True):
        if grad is not None:
            reached.setdefault(other, set()).add(path)
    for other in named:
        if other not in reached:
            raise ValueError(
                f"Player {name!r}: its start takes {other!r} and does not depend on it. Use the argument itself, "
                "without .detach() or .item(), or leave the parameter out."
            )
    return reached


def _shape(leaf: object) -> object:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__


def _finite(leaf: Tensor) -> str:
    return "finite" if bool(torch.isfinite(leaf).all()) else "NaN or infinite"
