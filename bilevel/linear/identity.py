"""The identity in place of the inverse: the cheapest answer, and often a useful one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.linear.base import LinearOperator, LinearSolution, LinearSolver, norm


@final
@dataclass(frozen=True, kw_only=True)
class Identity(LinearSolver):
    """Takes scale * I for the inverse, and reports how wrong that is.

    u = scale * b. `damping` enters the residual only; `initial` is not used.

    Costs one product, for the residual; give `rtol` to be warned by it. With scale the follower's learning rate this
    is one-step unrolling. It keeps the sign of the hypergradient only where A is close to a multiple of I.

    Source: Luketina et al., arXiv 1511.06727 (T1-T2); Neumann with no terms in Lorraine et al., arXiv 1911.02590.

    >>> found = Identity(scale=0.5).solve(LinearOperator(lambda v: 2.5 * v), torch.tensor([4.0]))
    >>> found.solution, found.residual_norm
    (tensor([2.]), tensor(1.))
    """

    rtol: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        self._require("scale", 0.0 < self.scale < math.inf, "a positive number, about 1 over a typical eigenvalue of A")

    def solve(self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None) -> LinearSolution:
        """scale * rhs `[n]`."""
        size = self._size(rhs, initial)
        if concrete(size) == 0.0:
            return self._conclude(torch.zeros_like(rhs), size, size, 0)
        solution = self.scale * rhs
        residual = operator.damped(self.damping).residual(rhs, solution)
        return self._conclude(solution, norm(residual), size, 1, remedy="another scale, another solver")
