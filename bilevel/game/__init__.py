"""What is being solved: players, their objectives, their variables and data."""

from bilevel.game._game import Buffers, Game, Player
from bilevel.game.data import Batch, Position, Stream

__all__ = ["Batch", "Buffers", "Game", "Player", "Position", "Stream"]
