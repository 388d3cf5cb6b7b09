"""All the problems."""

from __future__ import annotations

from games.published.convex import CONVEX, SCALABLE
from games.published.linear import LINEAR
from games.published.nonconvex import NONCONVEX
from games.published.problem import Problem


def problems() -> dict[str, Problem]:
    """By name."""
    return {problem.name: problem for problem in (*LINEAR, *CONVEX, *SCALABLE, *NONCONVEX)}
