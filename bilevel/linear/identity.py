"""The identity in place of the inverse: the cheapest answer, and often a useful one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from bilevel.errors import require_kinds
from bilevel.linear.base import LinearSolver
from bilevel.linear.system import Candidate, LinearSystem


@final
@dataclass(frozen=True, kw_only=True)
class Identity(LinearSolver):
    """Takes scale * I for the inverse, u = scale * b, and reports how wrong that is.

    Costs one product, for the residual, and warns where 0 were a better answer; give `rtol` to be warned earlier.
    `damping` enters the residual only, and it takes no initial. With scale the follower's learning rate this is
    one-step unrolling. It keeps the sign of the hypergradient only where A is close to a multiple of I.
    Source: Luketina et al., arXiv 1511.06727 (T1-T2); Neumann with no terms in Lorraine et al., arXiv 1911.02590.

    Args:
        scale: About 1 over a typical eigenvalue of A.

    Examples:
        >>> import torch
        >>> from bilevel.linear import LinearOperator
        >>> found = Identity(scale=0.5).solve(LinearOperator(lambda v: 2.5 * v), torch.tensor([4.0]))
        >>> found.solution, found.residual_norm
        (tensor([2.]), tensor(1.))
    """

    rtol: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        super().__post_init__()
        self._require("scale", 0.0 < self.scale < math.inf, "a positive number, about 1 over a typical eigenvalue of A")

    @property
    def tells_indefinite(self) -> bool:
        """It asks nothing of A, and states so: its derivative is an estimate."""
        return True

    @property
    def takes_random(self) -> bool:
        """Yes: it takes no product but to measure one."""
        return True

    @property
    def remedy(self) -> str:
        """It has no steps to take more of."""
        return "another scale, another solver"

    @property
    def takes_parts(self) -> bool:
        """Yes."""
        return True

    def iterate(self, system: LinearSystem) -> Candidate:
        """scale * rhs."""
        return system.measure(self.scale * system.rhs)
