"""The augmented Lagrangian: a leader's functions as terms of its loss, with multipliers that are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import require_kinds

State = dict[str, Tensor]
"""The multipliers l `[games, m]` and m `[games, p]`; of each game the penalty, how far it may grow, the last update's
measure of violation, the steps since, and L's gradient right after it."""

_SETTLED = 0.3
"""The part of L's gradient that is small enough to learn multipliers from."""

_PATIENCE = 10
"""So many times `every` steps are enough."""


@final
@dataclass(frozen=True)
class AugmentedLagrangian:
    r"""A leader with `inequality=` or `equality=`, moved by any torch.optim optimiser: `solve(optimizer=this)`.

    $$
    L = f + \frac{\rho}{2} \sum_i \Big( \max(0,\, c_i + l_i / \rho)^2 - (l_i / \rho)^2 \Big)
        + m^\top e + \frac{\rho}{2} |e|^2
    $$

    Its gradient goes through the followers' responses, as the loss's does. Once that gradient has fallen to a part of
    what it was, or after ten times `every` steps, the multipliers become \(l \leftarrow \max(0, l + \rho c)\) and
    \(m \leftarrow m + \rho e\), kept within `largest`. Where the violation, that of complementarity included, has not
    fallen by the factor `decrease` since, \(\rho\) grows; where it has doubled, the last \(\rho\) was too large for the
    optimiser, and it never grows so far again. It is the default for such a leader, with the optimiser of `solve`.

    Costs what a step of the leader costs without functions. It ends as exact as the optimiser: SGD with too large a
    rate for \(\rho\) times the squared slope of the functions diverges, and Adam at a constant rate keeps moving by
    that rate. Where the functions and the followers are smooth and there are at most a few hundred variables,
    `solve(optimizer=bl.Scipy("SLSQP"))` is faster and exact.

    Args:
        optimizer: From tensors to a torch.optim optimiser; None: Adam, lr 0.01.
        penalty: \(\rho\) at the start, in the loss's unit over the functions' unit squared.
        every: Leader steps between updates of the multipliers, at least.
        growth: The factor of \(\rho\).
        decrease: By which factor the violation must fall from update to update, or \(\rho\) grows.
        max_penalty: Where \(\rho\) stops, since larger ones make the loss stiff.
        largest: A safeguard: no multiplier becomes larger.
        tolerance: The violation, in the functions' own units, above which the solution warns.

    Raises:
        ValueError: For options out of range.

    Source: Hestenes 1969, Powell 1969, Rockafellar 1974; the safeguards: Andreani, Birgin, Martinez and Schuverdt 2007.

    Examples:
        >>> AugmentedLagrangian(penalty=10.0).growth
        2.0
    """

    optimizer: Callable[..., Any] | None = None
    penalty: float = 1.0
    every: int = 10
    growth: float = 2.0
    decrease: float = 0.7
    max_penalty: float = 1e4
    largest: float = 1e8
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        require_kinds(self)
        if not (self.optimizer is None or callable(self.optimizer)) or isinstance(self.optimizer, AugmentedLagrangian):
            raise TypeError(
                f"AugmentedLagrangian: optimizer is {self.optimizer!r}; expected a function from tensors to a "
                "torch.optim optimiser, such as partial(torch.optim.SGD, lr=0.1)."
            )
        if self.every < 1:
            raise ValueError(f"AugmentedLagrangian: every={self.every}; expected at least 1.")
        for name in ("penalty", "largest", "tolerance"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"AugmentedLagrangian: {name}={getattr(self, name)}; expected a positive number.")
        if not (self.growth >= 1.0 and 0.0 < self.decrease < 1.0 and self.max_penalty >= self.penalty):
            raise ValueError(
                f"AugmentedLagrangian: growth={self.growth}, decrease={self.decrease}, max_penalty={self.max_penalty}, "
                f"penalty={self.penalty}; expected growth >= 1, 0 < decrease < 1 and max_penalty >= penalty."
            )

    def first(self, c: Tensor, e: Tensor) -> State:
        """Before the first step, in the form of functions c `[games, m]` and e `[games, p]`."""
        start = c.new_full(c.shape[:1], self.penalty)
        return {
            "l": torch.zeros_like(c),
            "m": torch.zeros_like(e),
            "penalty": start,
            "cap": start + self.max_penalty,
            "measure": start * torch.inf,
            "since": torch.zeros_like(start),
            "gradient": start * torch.inf,
        }

    def term(self, state: State, c: Tensor, e: Tensor) -> Tensor:
        """What it adds to the loss `[games]`."""
        penalty = state["penalty"][:, None]
        shift = state["l"] / penalty
        above = (c + shift).clamp(min=0.0).square() - shift.square()
        return (0.5 * penalty * above).sum(1) + (state["m"] * e + 0.5 * penalty * e.square()).sum(1)

    def updated(self, state: State, c: Tensor, e: Tensor, gradient: Tensor) -> State:
        """The state after a step at these values of the functions, where L's gradient had this norm `[games]`."""
        since = state["since"] + 1.0
        reference = torch.where(since == 1.0, gradient, state["gradient"])
        settled = (gradient <= _SETTLED * reference) | (since >= _PATIENCE * self.every)
        due = settled & (since >= self.every)
        l, m = (found.clamp(min=-self.largest, max=self.largest) for found in self.multipliers(state, c, e))
        off = torch.cat([torch.maximum(c, -state["l"] / state["penalty"][:, None]), e], 1)
        measure, last, penalty = off.abs().amax(1), state["measure"], state["penalty"]
        worse = (measure > 2.0 * last) & (penalty > self.penalty)
        cap = torch.where(worse, penalty / self.growth, state["cap"]).clamp(max=self.max_penalty)
        slow = (measure > self.decrease * last) & (measure > 0.1 * self.tolerance)
        grown = torch.where(slow, penalty * self.growth, penalty)
        new = {"l": l, "m": m, "penalty": torch.minimum(grown, cap), "cap": cap, "measure": measure}
        new |= {"since": torch.zeros_like(since), "gradient": reference}
        old = {**state, "since": since, "gradient": reference}
        return {name: torch.where(due.reshape(-1, *[1] * (new[name].ndim - 1)), new[name], old[name]) for name in old}

    def multipliers(self, state: State, c: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Those with which the Lagrangian's gradient is L's: of c `[games, m]`, at least 0, and of e `[games, p]`."""
        penalty = state["penalty"][:, None]
        return (state["l"] + penalty * c).clamp(min=0.0), state["m"] + penalty * e
