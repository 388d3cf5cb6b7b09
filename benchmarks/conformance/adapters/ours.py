"""Our own, through the same door as the others."""

from __future__ import annotations

from pytrees import slope

import bilevel as bl
from bilevel.tree import detached


def _by(response, leader, follower, x, y):
    game = bl.Game(
        x=bl.Player(leader, detached(x)),
        y=bl.Player(follower, detached(y)),
    )
    answer, _ = response(game, {"x": x}, response.init(game))
    return slope(leader(x, answer), x)


def unrolled(leader, follower, x, y, *, optimizer, steps):
    """`bl.Unrolled`."""
    return _by(bl.Unrolled(optimizer, steps=steps), leader, follower, x, y)


def implicit(leader, follower, x, y, *, optimizer, steps):
    """`bl.Implicit` by conjugate gradients."""
    solver = bl.ConjugateGradient(max_steps=50, rtol=1e-10)
    return _by(bl.Implicit(optimizer, steps=steps, tolerance=1e-10, linear_solver=solver), leader, follower, x, y)
