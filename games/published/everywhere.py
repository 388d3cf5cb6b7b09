"""The global optimum of a follower with few variables: a grid over its bounds, and SLSQP from its best places."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

import bilevel as bl
from bilevel.extend import InnerSolver, Problem
from bilevel.tree import join


@final
@dataclass(frozen=True)
class Everywhere(InnerSolver):
    """Searches a box; of one variable or two, since it costs `points` to the power of their number.

    Args:
        low: The box's lower ends.
        high: Its upper ends.
        points: Of the grid in each variable.
        polished: From so many places SLSQP goes on.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    points: int = 25
    polished: int = 2

    @property
    def takes_constraints(self) -> bool:
        """Yes."""
        return True

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The best of SLSQP's answers."""
        programme = problem.constraints
        assert programme is not None
        axes = [torch.linspace(a, b, self.points).tolist() for a, b in zip(self.low, self.high, strict=True)]
        seen: list[tuple[float, Tensor]] = []
        for place in itertools.product(*axes):
            point = torch.tensor(place, dtype=torch.float64)
            at = programme.linearised(point)
            if not len(at.c) or float(at.c.max()) <= 1e-9:
                seen.append((programme.loss_and_gradient(point)[0], point))
        seen.sort(key=lambda pair: pair[0])
        # Neighbours on the grid lead to the same end.
        width = max(b - a for a, b in zip(self.low, self.high, strict=True)) / (self.points - 1)
        chosen: list[Tensor] = []
        for _, point in seen:
            if all(float((point - other).abs().max()) > 2.5 * width for other in chosen):
                chosen.append(point)
            if len(chosen) == self.polished:
                break
        solver = bl.Scipy("SLSQP")
        ends = []
        for point in chosen or [join(y).detach().double()]:
            start = [leaf.clone() for leaf in problem.form.split(point.to(y[0]))]
            end, _ = solver.minimise(problem, start, None, steps=steps, threshold=threshold)
            ends.append(end)
        losses = [programme.loss_and_gradient(join(end).double())[0] for end in ends]
        return ends[losses.index(min(losses))], None
