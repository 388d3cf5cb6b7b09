"""The loop: leaders step along their hypergradients, followers answer, and the end says how far to trust it."""

from bilevel.solving._solve import solve
from bilevel.solving.solution import Solution
from bilevel.solving.solutions import Solutions
from bilevel.solving.spread import Spread

__all__ = ["Solution", "Solutions", "Spread", "solve"]
