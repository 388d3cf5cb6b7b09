"""Variables of which each process holds a part: sums over them are over all parts, and losses see them whole."""

from bilevel.sharding.layout import Layout
from bilevel.sharding.tensor import Peers, ShardedTensor

__all__ = ["Layout", "Peers", "ShardedTensor"]
