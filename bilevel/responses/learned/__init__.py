"""The follower's best response, learned while the leader moves."""

from bilevel.responses.learned.hypernetwork import Hypernetwork

__all__ = ["Hypernetwork"]
