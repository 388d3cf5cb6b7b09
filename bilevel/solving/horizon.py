"""Whether a follower that looks only so many steps ahead shows its leaders the way that a longer look shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bilevel.errors import BilevelError, BilevelWarning, UnreliableResponseWarning
from bilevel.game import Game
from bilevel.randomness import random_kept
from bilevel.responses.base import FartherLook
from bilevel.solving.followers import Followers
from bilevel.solving.history import History
from bilevel.solving.warning_log import Log, caught, logged

FIRST, SPACING = 16, 4
"""Leader steps in which it is looked: 16, 64, 256, ..."""

SMALLEST = 1e-3
"""A hypergradient so many times below the first step's says that the leader has arrived, and not which way to go."""

RIGHT_WAY = 0.9
"""A cosine above which a hypergradient that is too long leads where it should."""

_KEY = f"{UnreliableResponseWarning.__name__} Short horizon:"


def due(step: int) -> bool:
    """Whether to look in this step."""
    while step > FIRST and step % SPACING == 0:
        step //= SPACING
    return step == FIRST


def _cheap(game: Game, follower: str) -> bool:
    """Whether a follower's next batches can be looked at twice: there are none, or a list of them."""
    return all(
        data is None or isinstance(data, list | tuple)
        for data in (game.players[member].data for member in game.members(follower))
    )


def _short_horizon(
    follower: str, look: FartherLook, own: Callable[[], Tensor], farther: Callable[[], Tensor], first: float
) -> BilevelWarning | None:
    """A warning where the longer horizon's hypergradient `[n]` is another one; `first` is the first step's norm."""
    with caught():  # what the longer look says of itself is nobody's business
        try:
            near, far = own(), farther()
        except (BilevelError, ValueError):  # it left what can be computed, or its rates end: it is no measure
            return None
    size = float(torch.linalg.vector_norm(far))
    if not SMALLEST * first < size < float("inf"):
        return None
    missing = float(torch.linalg.vector_norm(far - near)) / size
    if not missing > look.tolerance:
        return None
    cosine = float(near @ far) / (float(torch.linalg.vector_norm(near)) * size or 1.0)
    if cosine > RIGHT_WAY and float(torch.linalg.vector_norm(near)) > size:  # longer, the same way: no edge lies there
        return None
    way = "points the other way" if cosine < 0.0 else f"has a cosine of {cosine:.2f} to it"
    return UnreliableResponseWarning(
        f"Short horizon: the response of player {follower!r} {look.told} from the same place give another "
        f"hypergradient. Of that, the one in use misses {missing:.0%}, and it {way}: norm {float(near.norm()):.3g} for "
        f"{size:.3g}. What only a few steps gain is not what the leader wants in the end: regularisation, for one, is "
        "driven to an edge. Give it more steps=, use Implicit, or accept it by tolerance=None."
    )


def looked_farther(
    game: Game, followers: Followers, history: History, step: int, log: Log, slopes: Callable[[Followers], Tensor]
) -> Log:
    """The log with what a longer look from where the players are has found; `slopes` are the leaders' through it."""
    looks = {name: response.farther for name, response in followers.responses.items()}
    if len(looks) != 1 or game.record_keys != ("",):
        return log
    ((name, look),) = looks.items()
    # Where a leader acts by the follower's start alone, so many steps are meant: in the end the start is forgotten.
    if look is None or not _cheap(game, name) or game.starts_alone(name):
        return log
    first = history.records()[0]["gradient_norm"]
    farther = Followers(game, {name: look.response})
    with random_kept(game.device):
        found = _short_horizon(name, look, partial(slopes, followers), partial(slopes, farther), first)
    return logged(log, [] if found is None else [found], step)


def carried(log: Log, step: int) -> Log:
    """The log in a step without a look: what the last look found still holds."""
    entry = log.get(_KEY)
    if entry is None or entry["last"] != step - 1:
        return log
    return {**log, _KEY: {**entry, "last": step}}
