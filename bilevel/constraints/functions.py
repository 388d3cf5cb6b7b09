"""Functions as constraints, as solvers and the derivative see them: c(y) <= 0 and e(y) = 0 on flat vectors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from bilevel.tree import Variables, named_leaves

INEQUALITY, EQUALITY = "inequality", "equality"
DOMAIN, DOMAIN_EQUALITY = "domain", "domain equality"
INEQUALITIES, EQUALITIES = (INEQUALITY, DOMAIN), (EQUALITY, DOMAIN_EQUALITY)
"""The kinds of what is to be <= 0, and of what is to be 0: the user's functions, and the walls of a domain."""


class Linearised(NamedTuple):
    """The constraints at a point: c `[m]`, e `[p]`, and their Jacobians A `[m, n]` and E `[p, n]`."""

    c: Tensor
    e: Tensor
    A: Tensor
    E: Tensor


class Constrained(Protocol):
    r"""One player's programme, all else standing still: $\min_y f(y)$ subject to $c(y) \le 0$ and $e(y) = 0$.

    All vectors are flat, float64 and on the CPU; values are as exact as `epsilon` says.
    """

    @property
    def labels(self) -> Labels:
        """What its constraints are called."""

    @property
    def epsilon(self) -> float:
        """The rounding of the player's own dtype."""

    def loss_and_gradient(self, y: Tensor) -> tuple[float, Tensor]:
        """f and its gradient `[n]`."""

    def linearised(self, y: Tensor) -> Linearised:
        """The constraints and their Jacobians."""

    def hessian(self, y: Tensor, inequality: Tensor, equality: Tensor) -> Tensor:
        """The Hessian in y `[n, n]` of the Lagrangian f + l'c + m'e, with l `[m]` and m `[p]`."""


@dataclass(frozen=True)
class Labels:
    """What a player's constraints are called: its own name, and one name for each entry of c and of e."""

    player: str
    inequality: tuple[str, ...]
    equality: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Those of c, then those of e."""
        return (*self.inequality, *self.equality)


def entry_names(what: str, tree: Variables) -> tuple[str, ...]:
    """A name for each entry of what a constraint returned: `inequality['roads'][2]`."""
    found: list[str] = []
    for path, leaf in named_leaves(tree):
        indices = itertools.product(*(range(size) for size in leaf.shape))
        found += [f"{what}{path}{list(index) if index else ''}" for index in indices]
    return tuple(found)
