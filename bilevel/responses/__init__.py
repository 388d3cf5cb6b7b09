"""What a leader assumes about its follower while it differentiates: one file a strategy."""

from bilevel.responses.base import Response, State
from bilevel.responses.hypernetwork import Hypernetwork
from bilevel.responses.implicit import Implicit
from bilevel.responses.inexactness import AsLeaderMoves, Geometric, Inexactness
from bilevel.responses.networks import MLP, Elementwise, Linear, LowRank
from bilevel.responses.unrolled import Unrolled

__all__ = [
    "MLP",
    "AsLeaderMoves",
    "Elementwise",
    "Geometric",
    "Hypernetwork",
    "Implicit",
    "Inexactness",
    "Linear",
    "LowRank",
    "Response",
    "State",
    "Unrolled",
]
