"""What a leader assumes about its follower while it differentiates: one file a strategy."""

from bilevel.responses.base import Response, State
from bilevel.responses.hypernetwork import Hypernetwork
from bilevel.responses.implicit import Implicit
from bilevel.responses.leafwise import LeafNetwork, LowRankLayers, RowColumnScaled, RowScaled, SelfTuning
from bilevel.responses.networks import MLP, Elementwise, Linear, LowRank
from bilevel.responses.unrolled import Unrolled

__all__ = [
    "MLP",
    "Elementwise",
    "Hypernetwork",
    "Implicit",
    "LeafNetwork",
    "Linear",
    "LowRank",
    "LowRankLayers",
    "Response",
    "RowColumnScaled",
    "RowScaled",
    "SelfTuning",
    "State",
    "Unrolled",
]
