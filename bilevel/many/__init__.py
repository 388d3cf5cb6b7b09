"""Many small games of one form, played as one: composed around what plays a single game."""

from bilevel.many.games import Games

__all__ = ["Games"]
