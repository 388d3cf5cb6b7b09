"""What is being solved: players, their objectives, their variables and data, and what vanishes where they rest."""

from bilevel.game._game import Game
from bilevel.game.data import Batch, Position, Stream
from bilevel.game.follower import Follower, HeldResidual
from bilevel.game.player import Player
from bilevel.game.residual import Residual, UserResidual
from bilevel.game.rounding import Size
from bilevel.game.situation import Buffers

__all__ = [
    "Batch",
    "Buffers",
    "Follower",
    "Game",
    "HeldResidual",
    "Player",
    "Position",
    "Residual",
    "Size",
    "Stream",
    "UserResidual",
]
