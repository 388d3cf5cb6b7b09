"""The networks of learned responses: from the leaders' variables to a follower's change."""

from bilevel.networks.flat import MLP, Elementwise, Linear, LowRank
from bilevel.networks.leafwise import LeafNetwork, LowRankLayers, RowColumnScaled, RowScaled, SelfTuning

__all__ = [
    "MLP",
    "Elementwise",
    "LeafNetwork",
    "Linear",
    "LowRank",
    "LowRankLayers",
    "RowColumnScaled",
    "RowScaled",
    "SelfTuning",
]
