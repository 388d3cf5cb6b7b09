"""The follower's optimum as a function that the user knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.base import InnerSolver, Problem
from bilevel.tree import Variables, leaves


@dataclass(frozen=True)
class ClosedForm(InnerSolver):
    """A follower's optimum by the user's own function, or by any solver that she calls in it.

    The function may be anything, NumPy included: it is not differentiated. Its answer is checked: the follower's
    gradient there is measured, and `Implicit` warns when it is not stationary.

    Args:
        function: Has parameters named after players (and `batch`), as objectives have, and returns the follower's
            variables.

    Raises:
        ValueError: In a call, if the function's answer has not the shapes of the follower's init.

    Examples:
        >>> ClosedForm(lambda x: x + 1)  # doctest: +ELLIPSIS
        ClosedForm(function=<function ...>)
    """

    function: Callable[..., Variables]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those of the function's parameters."""
        return tuple(inspect.signature(self.function).parameters)

    @property
    def takes_constraints(self) -> bool:
        """Whatever the function heeds; its answer is checked."""
        return True

    @property
    def takes_equilibria(self) -> bool:
        """As `takes_constraints`."""
        return True

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The function's answer; nothing is remembered."""
        given = {**problem.others, "batch": problem.batch}
        arguments = {name: given[name] for name in self.names if name in given}
        with torch.no_grad():
            found = leaves(self.function(**arguments))
        if [t.shape for t in found] != list(problem.form.shapes):
            raise ValueError(
                f"ClosedForm: the function returned shapes {[tuple(t.shape) for t in found]}; expected those of the "
                f"follower's init, {[tuple(s) for s in problem.form.shapes]}."
            )
        return [t.detach().to(old).clone() for t, old in zip(found, y, strict=True)], None
