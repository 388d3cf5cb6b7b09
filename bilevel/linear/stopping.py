"""When a Krylov solver has enough, judged by what its solution is needed for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bilevel.autodiff import concrete
from bilevel.errors import require_kinds
from bilevel.linear.base import loosened
from bilevel.linear.norms import norm


class Stopping(ABC):
    """When a solver has enough, besides its residual."""

    rtol: float

    @abstractmethod
    def loosened(self, factor: float) -> Stopping:
        """The same, content with an error this many times larger."""

    @abstractmethod
    def watch(self, interest: Callable[[Tensor], Tensor]) -> Watch:
        """Looks for one solve; `interest: [n]` to what matters of it `[m]`."""


@final
@dataclass(frozen=True)
class HypergradientTolerance(Stopping):
    r"""Enough, once the hypergradient itself has settled to a relative error of about `rtol`.

    A residual says little about the hypergradient $C^\top u$ on an ill-conditioned follower: the part of u that it sees
    can be found long before, or long after, the residual is small. So $q_i = C^\top u$ is looked at in steps
    $k_1 < k_2 < \dots$ Changes $d_i = |q_i - q_{i-1}|$ shrink by $t_i = d_i / d_{i-1}$, and

    $$
    \text{error of } q_i \approx d_i \frac{t}{1 - t}, \qquad t = \max(t_i, \tfrac14).
    $$

    It stops when that is below rtol $|q_i|$ twice running. An estimate, not a bound: an iteration that stands still
    for a while, as conjugate gradients do between clusters of eigenvalues, looks settled; `certify` bounds the error.
    By hand, inside torch.func and with create_graph, u takes the place of $C^\top u$. What is solved down to rounding
    before it was looked at often enough is enough as well, where rounding leaves u right to `rtol`.

    Costs a mixed product a look, which is next to nothing where the leader enters by penalties, and at most a
    Hessian-vector product; each counts as one.

    Args:
        rtol: The relative error of the hypergradient.
        first: The step of the first look.
        spacing: Each later look is in a step so many times the last one's.

    Examples:
        >>> from bilevel.linear import ConjugateGradient, LinearOperator
        >>> curvature = torch.logspace(0, 3, 500, dtype=torch.float64)
        >>> system, b = LinearOperator(lambda v: curvature * v, True), torch.ones(500, dtype=torch.float64)
        >>> found = ConjugateGradient(rtol=1e-12, stopping=HypergradientTolerance(1e-2)).solve(system, b)
        >>> found.error < 1e-2
        True
    """

    rtol: float = 1e-3
    first: int = 4
    spacing: float = 1.2

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if not 0.0 < self.rtol < 1.0 or self.first < 1 or not self.spacing > 1.0:
            raise ValueError(
                f"{self}: expected 0 < rtol < 1, first of at least 1, and a spacing above 1. Leave stopping= out to "
                "stop by the residual."
            )

    def loosened(self, factor: float) -> HypergradientTolerance:
        """The same with `rtol` this many times larger, up to 1/2 where it is below that."""
        return replace(self, rtol=loosened(self.rtol, factor))

    def watch(self, interest: Callable[[Tensor], Tensor]) -> Watch:
        """Looks for one solve; `interest: [n]` to what matters of it `[m]`."""
        return Watch(self, interest)


class Watch:
    """The looks at one solve."""

    def __init__(self, stopping: HypergradientTolerance, interest: Callable[[Tensor], Tensor]) -> None:
        self._stopping, self._interest = stopping, interest
        self._next = float(stopping.first)
        self._last: Tensor | None = None
        self._change = math.inf
        self._good = 0
        self.error = math.inf
        """The estimate at the last look; infinite before there was one."""

    @property
    def satisfied(self) -> bool:
        """Whether two looks in a row were good enough."""
        return self._good >= 2

    def due(self, step: int) -> bool:
        """Whether to look after this many steps."""
        return step >= self._next

    def look(self, step: int, solution: Tensor) -> None:
        """Judge the solution `[n]` after `step` steps."""
        self._next = max(step + 1.0, step * self._stopping.spacing)
        seen = self._interest(solution)
        if self._last is not None:
            size = norm(seen)
            change = concrete(norm(seen - self._last) / torch.where(size > 0.0, size, 1.0))
            shrinks = change / self._change if self._change > 0.0 else 0.0
            # The sum of all changes to come, if they go on shrinking like that; one lucky look is not believed whole.
            shrinks = max(shrinks, 0.25)
            known = self._change < math.inf and shrinks < 1.0
            self.error = change * shrinks / (1.0 - shrinks) if known else math.inf
            self._good = self._good + 1 if self.error <= self._stopping.rtol else 0
            self._change = change
        self._last = seen
