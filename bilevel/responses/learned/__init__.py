"""The follower's best response, learned while the leader moves."""

from bilevel.responses.learned.footprint import Memory
from bilevel.responses.learned.hypernetwork import Hypernetwork
from bilevel.responses.learned.sampling import Draws, Perturbations, Sampler

__all__ = ["Draws", "Hypernetwork", "Memory", "Perturbations", "Sampler"]
