"""What a rule of play is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
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

    @property
    def rests_with_bounds(self) -> bool:
        """Whether its steps, projected onto the players' domains, rest where projected gradients do.

        So they do where at rest a direction is a positive multiple of the player's own gradient there. A rule that
        looks ahead, or that corrects the gradient, is at rest where its direction vanishes, and not at a bound.
        """
        return False

    @abstractmethod
    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """What each player's optimiser receives as its gradient, leaf by leaf, and the next state.

        Args:
            field: The players' own gradients on the present batches, and their Jacobian.
            state: What the last call returned; {} before the first step.
        """
