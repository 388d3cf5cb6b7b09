"""The same point of the same game in float64, by which arithmetic of fewer digits is judged."""

from __future__ import annotations

import warnings

import torch

from bilevel.certificates.point import LeaderFollowerPoint
from bilevel.game.parts import Move
from bilevel.randomness import random_kept, random_state
from bilevel.tree import map_leaves


def in_float64(given: LeaderFollowerPoint) -> LeaderFollowerPoint | None:
    """The point in float64, where `torch.autocast` leaves tensors alone; None where it is there or cannot be had.

    It cannot where a loss captured tensors of the game's own dtype, or draws random numbers: those of float64 are
    others, so it would be another loss.
    """
    if given.y.dtype == torch.float64:
        return None
    game, leader, follower = given.game, given.leader, given.follower
    move = Move(None, torch.float64)
    variables = {**given.others, follower: given.held.form.unflatten(given.y)}
    batches = {leader: given.batch, follower: given.held.batch}
    try:
        with warnings.catch_warnings(), random_kept(game.device, start=given.random):
            warnings.simplefilter("ignore")  # the game itself has given them
            point = LeaderFollowerPoint(
                game.to(dtype=torch.float64),
                leader,
                follower,
                {name: map_leaves(move, value) for name, value in variables.items()},
                buffers={name: map_leaves(move, value) for name, value in given.buffers.items()},
                batches={name: move.batch(batch) for name, batch in batches.items() if batch is not None},
                seed=given.seed,
            )
            return None if _draws(point) else point
    except Exception:  # a loss may fail in float64 in any way; in its own precision it has been evaluated
        return None


def _draws(point: LeaderFollowerPoint) -> bool:
    """Whether a loss takes random numbers."""
    game, together = point.game, point.held.form.unflatten(point.y)
    members, joined = game.members(point.follower), game.members(point.follower) != (point.follower,)
    variables = {**point.others, point.follower: together, **(together if joined else {})}
    before = random_state(game.device)
    with torch.no_grad():
        game.loss(point.leader, variables, point.batch, point.buffers)
        for name in members:
            batch = point.held.batch[name] if joined and point.held.batch is not None else point.held.batch
            game.loss(name, variables, batch, point.buffers)
    after = random_state(game.device)
    return any(not torch.equal(before[kind], after[kind]) for kind in before)
