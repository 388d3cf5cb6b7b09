"""What a leader assumes about its follower while it differentiates: one room a strategy."""

from bilevel.responses.base import Response, State
from bilevel.responses.implicit import Implicit
from bilevel.responses.inexactness import AsLeaderMoves, Geometric, Inexactness
from bilevel.responses.learned import Hypernetwork
from bilevel.responses.promise import Behaviour, Estimate, Optimum, Promise, Report, Steps
from bilevel.responses.unrolled import Differentiation, ForwardMode, ReverseMode, Segments, Unrolled

__all__ = [
    "AsLeaderMoves",
    "Behaviour",
    "Differentiation",
    "Estimate",
    "ForwardMode",
    "Geometric",
    "Hypernetwork",
    "Implicit",
    "Inexactness",
    "Optimum",
    "Promise",
    "Report",
    "Response",
    "ReverseMode",
    "Segments",
    "State",
    "Steps",
    "Unrolled",
]
