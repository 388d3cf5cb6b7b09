"""Where players may be: sets with a projection, terms with a proximal map, coordinates, and functions."""

from bilevel.constraints.base import ConstraintSet, Penalty, ProximalMap
from bilevel.constraints.choice import Choice
from bilevel.constraints.coordinates import Coordinate, Interval, Log, Positive, Unit
from bilevel.constraints.functions import Constrained, Labels, Linearised
from bilevel.constraints.lagrangian import AugmentedLagrangian
from bilevel.constraints.proximal import L1, ElasticNet, GroupLasso
from bilevel.constraints.sets import (
    Affine,
    Ball,
    Box,
    Halfspace,
    NonNegative,
    PositiveSemidefinite,
    Product,
    SecondOrderCone,
    Simplex,
)

__all__ = [
    "L1",
    "Affine",
    "AugmentedLagrangian",
    "Ball",
    "Box",
    "Choice",
    "Constrained",
    "ConstraintSet",
    "Coordinate",
    "ElasticNet",
    "GroupLasso",
    "Halfspace",
    "Interval",
    "Labels",
    "Linearised",
    "Log",
    "NonNegative",
    "Penalty",
    "Positive",
    "PositiveSemidefinite",
    "Product",
    "ProximalMap",
    "SecondOrderCone",
    "Simplex",
    "Unit",
]
