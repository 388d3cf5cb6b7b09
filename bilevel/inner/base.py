"""What an inner solver is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from bilevel.game.data import Batch
from bilevel.tree import Structure, Variables


class Problem(Protocol):
    """min over y of f(y), the other players standing still.

    `form` is the layout of y; `others` are the other players' variables, detached; `batch` is the present batch.
    Of several players together the loss is a sum that none of them minimises: only the gradients, each member's own,
    say where they settle.
    """

    name: str
    form: Structure
    batch: Batch

    @property
    def joint(self) -> bool:
        """Whether y is of several players together, so that f is to be ignored."""

    @property
    def others(self) -> Mapping[str, Variables]:
        """The other players' variables, detached."""

    def gradients(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient of each leaf on the present batch; counted as one gradient."""

    def advance(self) -> None:
        """Move on to the next batch."""


def refuse_joint(problem: Problem, what: str) -> None:
    """Raise `TypeError` for a solver that goes by the loss, which several players together do not have."""
    if problem.joint:
        raise TypeError(
            f"{what} minimises one loss, and {problem.name!r} is several players with a loss each. Use "
            "bilevel.ScipyRoot(), or a torch.optim optimiser that steps along gradients alone, SGD or Adam."
        )


class InnerSolver(ABC):
    """Finds a follower's optimum; nothing of it is differentiated."""

    @abstractmethod
    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The leaves of y after at most `steps` steps, or sooner once |gradient| <= `threshold`; and what to remember.

        `memory` is None or what an earlier call returned: tensors, numbers, lists and dicts of them.
        """
