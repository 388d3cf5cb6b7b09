"""Where players may be: sets with a projection, terms with a proximal map, and coordinates."""

from bilevel.constraints.base import ConstraintSet, Penalty, ProximalMap
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
    "Ball",
    "Box",
    "ConstraintSet",
    "ElasticNet",
    "GroupLasso",
    "Halfspace",
    "NonNegative",
    "Penalty",
    "PositiveSemidefinite",
    "Product",
    "ProximalMap",
    "SecondOrderCone",
    "Simplex",
]
