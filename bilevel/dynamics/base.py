"""What a rule of play is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

Field = Callable[[Mapping[str, list[Tensor]]], dict[str, list[Tensor]]]
"""From the leaves of every leading player to the gradient of each one's own loss in its own leaves."""


class Dynamics(ABC):
    """Turns the field of own gradients into the direction that each player descends."""

    @abstractmethod
    def directions(self, field: Field, point: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """What each player's optimiser receives as its gradient, leaf by leaf."""
