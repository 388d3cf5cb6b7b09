"""What a leader assumes about its follower while it differentiates: one file a strategy."""

from bilevel.responses.base import Response, State
from bilevel.responses.differentiation import Differentiation, ReverseMode
from bilevel.responses.forward_mode import ForwardMode
from bilevel.responses.hypernetwork import Hypernetwork
from bilevel.responses.implicit import Implicit
from bilevel.responses.inexactness import AsLeaderMoves, Geometric, Inexactness
from bilevel.responses.leafwise import LeafNetwork, LowRankLayers, RowColumnScaled, RowScaled, SelfTuning
from bilevel.responses.networks import MLP, Elementwise, Linear, LowRank
from bilevel.responses.segments import Segments
from bilevel.responses.unrolled import Unrolled

__all__ = [
    "MLP",
    "AsLeaderMoves",
    "Differentiation",
    "Elementwise",
    "ForwardMode",
    "Geometric",
    "Hypernetwork",
    "Implicit",
    "Inexactness",
    "LeafNetwork",
    "Linear",
    "LowRank",
    "LowRankLayers",
    "Response",
    "ReverseMode",
    "RowColumnScaled",
    "RowScaled",
    "Segments",
    "SelfTuning",
    "State",
    "Unrolled",
]
