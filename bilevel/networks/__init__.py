"""The networks of learned responses: from the leaders' variables to a follower's change.

Flat ones (`Linear()`, `LowRank(rank)`, `MLP(hidden)`, `Elementwise()`) map one vector to another; `Uncentred(...)` is a
flat one that learns its value too. Networks of leaves (`RowScaled()`, `RowColumnScaled()`, `SelfTuning()`,
`LowRankLayers(rank)`) move each layer by itself, for millions of weights. Subclass `FlatNetwork` or `LeafNetwork` for
one of your own.
"""

from bilevel.networks.flat import MLP, Elementwise, FlatNetwork, Linear, LowRank, Uncentred
from bilevel.networks.leafwise import LeafNetwork, LowRankLayers, RowColumnScaled, RowScaled, SelfTuning

__all__ = [
    "MLP",
    "Elementwise",
    "FlatNetwork",
    "LeafNetwork",
    "Linear",
    "LowRank",
    "LowRankLayers",
    "RowColumnScaled",
    "RowScaled",
    "SelfTuning",
    "Uncentred",
]
