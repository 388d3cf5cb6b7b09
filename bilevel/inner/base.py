"""What an inner solver is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from bilevel.data import Batch
from bilevel.tree import Structure, Variables


class Problem(Protocol):
    """min over y of f(y), the other players standing still.

    `form` is the layout of y; `others` are the other players' variables, detached; `batch` is the present batch.
    """

    form: Structure
    batch: Batch

    @property
    def others(self) -> Mapping[str, Variables]:
        """The other players' variables, detached."""

    def gradients(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient of each leaf on the present batch; counted as one gradient."""

    def advance(self) -> None:
        """Move on to the next batch."""


class InnerSolver(ABC):
    """Finds a follower's optimum; nothing of it is differentiated."""

    @abstractmethod
    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The leaves of y after at most `steps` steps, or sooner once |gradient| <= `threshold`; and what to remember.

        `memory` is None or what an earlier call returned: tensors, numbers, lists and dicts of them.
        """
