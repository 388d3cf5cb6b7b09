"""Sets as functions: the walls of a domain, for a player whom functions constrain as well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.constraints.base import ConstraintSet, number
from bilevel.constraints.sets import Affine, Ball, Halfspace, Product, Simplex
from bilevel.tree import Variables, flatten, named_leaves


class Walls(NamedTuple):
    """By name, what is to be <= 0 and what is to be 0 in every entry."""

    inequalities: dict[str, Tensor]
    equalities: dict[str, Tensor]


def has_walls(domain: ConstraintSet) -> bool:
    """Whether a set is one of smooth functions; the cones and the ball of the 1-norm are not."""
    if isinstance(domain, Product):
        return all(part is None or has_walls(part) for _, part in domain.items)
    round_ball = isinstance(domain, Ball) and domain.p == 2.0
    return domain.entrywise or round_ball or isinstance(domain, Simplex | Halfspace | Affine)


def walls(domain: ConstraintSet, y: Variables, *, known: bool) -> Walls:
    """The walls of a set whose options are settled, at y.

    `known`: whether its bounds are plain numbers, so that sides that are open altogether can be left out.
    """
    if isinstance(domain, Product):
        found = Walls({}, {})
        for key, part in domain.items:
            if part is not None:
                inner = walls(part, y[key], known=known)
                found.inequalities.update({f"{key}.{name}": value for name, value in inner.inequalities.items()})
                found.equalities.update({f"{key}.{name}": value for name, value in inner.equalities.items()})
        return found
    if domain.entrywise:
        return Walls(_bounds(domain, y, known), {})
    flat = flatten(y)
    if isinstance(domain, Simplex):
        total = number(domain.total, flat)
        rows = {f"total{path}": leaf.sum(-1) - total for path, leaf in named_leaves(y)}
        return Walls({f"low{path}": -leaf for path, leaf in named_leaves(y)}, rows)
    if isinstance(domain, Halfspace):
        return Walls({"plane": flatten(domain.normal).to(flat) @ flat - number(domain.offset, flat)}, {})
    if isinstance(domain, Affine):
        return Walls({}, {"rows": domain.matrix.to(flat) @ flat - number(domain.right, flat)})
    if isinstance(domain, Ball) and domain.p == 2.0:
        return Walls({"ball": flat @ flat - number(domain.radius, flat) ** 2}, {})
    raise TypeError(f"{domain!r} is no set of smooth functions.")


def _bounds(domain: ConstraintSet, y: Variables, known: bool) -> dict[str, Tensor]:
    limits = domain.limits(y)
    assert limits is not None
    found: dict[str, Tensor] = {}
    for (path, leaf), low, high in zip(named_leaves(y), *limits, strict=True):
        for name, bound, side in (("low", low, -1.0), ("high", high, 1.0)):
            if known and not bool(torch.isfinite(bound).any()):
                continue
            # An open side is a wall that never binds, and not one at infinity, which times 0 would be NaN.
            shut = torch.isfinite(bound)
            found[f"{name}{path}"] = torch.where(shut, side * (leaf - torch.where(shut, bound, 0.0)), -1.0)
    return found
