"""The global optimum of a linear or convex quadratic bilevel programme, with a proof."""

from bilevel.certificates.globally._solve_globally import solve_globally
from bilevel.certificates.globally.answer import GlobalAnswer

__all__ = ["GlobalAnswer", "solve_globally"]
