"""How players who move at the same time follow the field of their own gradients."""

from bilevel.dynamics.base import Dynamics
from bilevel.dynamics.corrected import Competitive, Consensus, LookAhead, SymplecticAdjustment
from bilevel.dynamics.extrapolating import Extragradient, NegativeMomentum, Optimistic
from bilevel.dynamics.field import Field, Jacobian
from bilevel.dynamics.opponents import LOLA, ExactLOLA
from bilevel.dynamics.ordered import FollowTheRidge, TotalGradient
from bilevel.dynamics.play import OpenedStep, Play
from bilevel.dynamics.reduced import VarianceReduced
from bilevel.dynamics.simultaneous import Alternating, Simultaneous, TwoTimescale
from bilevel.dynamics.value_function import BOME, F2SA, F2SA2, VPBGD, BothLosses, ValueFunction, ValueFunctionMethod

__all__ = [
    "BOME",
    "F2SA",
    "F2SA2",
    "LOLA",
    "VPBGD",
    "Alternating",
    "BothLosses",
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
    "OpenedStep",
    "Optimistic",
    "Play",
    "Simultaneous",
    "SymplecticAdjustment",
    "TotalGradient",
    "TwoTimescale",
    "ValueFunction",
    "ValueFunctionMethod",
    "VarianceReduced",
]
