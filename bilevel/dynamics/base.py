"""What a rule of play is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bilevel.dynamics.field import Field

State = dict[str, Any]
"""What a rule remembers from step to step: tensors by name, which a checkpoint holds."""

Point = Mapping[str, list[Tensor]]
"""The leaves of every moving player's variables."""


class Dynamics(ABC):
    r"""Turns the field of own gradients $\xi(z)$ into the direction that each player descends.

    A rule is configuration; its state is an argument and a return value. Directions go to the players' own
    optimisers; the formulas' exact rates are those of plain SGD with the rule's own step size.
    """

    @property
    def alternates(self) -> bool:
        """Whether players move one after the other within a step, each seeing the moves before its own."""
        return False

    def placed(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the players whom the rule moves itself: their entry in `directions` is where they go.

        They have no optimiser in `solve`.
        """
        return ()

    def report(self, state: State) -> Mapping[str, float]:
        """Numbers of the rule's own that a run's history tells of each step, as `dynamics.name`."""
        return {}

    @abstractmethod
    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """What each player's optimiser receives as its gradient, leaf by leaf, and the next state.

        Args:
            field: The players' own gradients on the present batches, and their Jacobian.
            state: What the last call returned; {} before the first step.
        """
