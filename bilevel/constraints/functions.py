"""Functions as constraints, as solvers and the derivative see them: c(y) <= 0 and e(y) = 0 on flat vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bilevel.tree import Variables, named_leaves

Functions = Callable[..., Variables] | Mapping[str, Callable[..., Variables]] | Sequence[Callable[..., Variables]]
"""A function, or a dict or a list of functions, whose values are together what is constrained."""

INEQUALITY, EQUALITY = "inequality", "equality"
DOMAIN, DOMAIN_EQUALITY = "domain", "domain equality"
INEQUALITIES, EQUALITIES = (INEQUALITY, DOMAIN), (EQUALITY, DOMAIN_EQUALITY)
"""The kinds of what is to be <= 0, and of what is to be 0: the user's functions, and the walls of a domain."""


class Linearised(NamedTuple):
    """The constraints at a point: c `[m]`, e `[p]`, and their Jacobians A `[m, n]` and E `[p, n]`.

    `bearers` `[m + p, n]` says of players who answer together whose entries each constraint's multiplier pushes:
    1 where an entry is of a player who bears it, else 0. None of one player, who bears all.
    """

    c: Tensor
    e: Tensor
    A: Tensor
    E: Tensor
    bearers: Tensor | None = None

    @property
    def push_c(self) -> Tensor:
        """What the multipliers of c push along, `[m, n]`: A, in the entries of who bears each of them."""
        return self.A if self.bearers is None else self.A * self.bearers[: len(self.A)]

    @property
    def push_e(self) -> Tensor:
        """The same of e, `[p, n]`."""
        return self.E if self.bearers is None else self.E * self.bearers[len(self.A) :]


class Constrained(Protocol):
    r"""One player's programme, all else standing still: $\min_y f(y)$ subject to $c(y) \le 0$ and $e(y) = 0$.

    All vectors are flat, float64 and on the CPU; values are as exact as `epsilon` says. Of several players who answer
    together f is no loss to minimise: its gradient is their own gradients, stacked, and the Hessian is not symmetric.
    """

    @property
    def minimises(self) -> bool:
        """Whether y is to minimise f; else each of several players minimises its own."""

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


def named_functions(what: str, functions: Any) -> dict[str, Callable[..., Variables]]:
    """Each function with its name as a user would write it, `inequality['river']`; of one function alone `what`."""
    return {} if functions is None else {f"{what}{path}": function for path, function in named_leaves(functions)}


def entry_names(what: str, tree: Variables) -> tuple[str, ...]:
    """A name for each entry of what a constraint returned: `inequality['roads'][2]`."""
    found: list[str] = []
    for path, leaf in named_leaves(tree):
        indices = itertools.product(*(range(size) for size in leaf.shape))
        found += [f"{what}{path}{list(index) if index else ''}" for index in indices]
    return tuple(found)
