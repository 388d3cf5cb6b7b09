"""How players who move at the same time follow the field of their own gradients."""

from bilevel.dynamics.base import Dynamics
from bilevel.dynamics.corrected import Competitive, Consensus, LookAhead, SymplecticAdjustment
from bilevel.dynamics.extrapolating import Extragradient, NegativeMomentum, Optimistic
from bilevel.dynamics.field import Field, Jacobian
from bilevel.dynamics.opponents import LOLA, ExactLOLA
from bilevel.dynamics.ordered import FollowTheRidge, TotalGradient
from bilevel.dynamics.simultaneous import Alternating, Simultaneous, TwoTimescale

__all__ = [
    "LOLA",
    "Alternating",
    "Competitive",
    "Consensus",
    "Dynamics",
    "ExactLOLA",
    "Extragradient",
    "Field",
    "FollowTheRidge",
    "Jacobian",
    "LookAhead",
    "NegativeMomentum",
    "Optimistic",
    "Simultaneous",
    "SymplecticAdjustment",
    "TotalGradient",
    "TwoTimescale",
]
