"""What a declaration is: a hyperparameter that a training loss has not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bilevel.constraints import Coordinate
from bilevel.game.modules import CallableVariables
from bilevel.game.player import kind
from bilevel.tree import Variables

Loss = Callable[[CallableVariables, Any], Tensor]
"""A training loss of the model's player, which can be called, and a batch."""


class Declaration(ABC):
    """A hyperparameter that a plain training loss does not mention. `Tuning` puts a list of them around the loss.

    A declaration of your own is a frozen dataclass with these three.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in a solution, unless `Tuning` is told otherwise."""

    @abstractmethod
    def init(self, model: nn.Module) -> Variables:
        """What it starts as for a model: a range such as `bilevel.Unit(0.0, 0.9, start=0.2)`, or a pytree of them."""

    @abstractmethod
    def changed(self, loss: Loss, strength: Variables) -> Loss:
        """The loss with this strength, which is of the form of `init`; differentiable in it."""


def started(within: Coordinate, at: Tensor) -> Coordinate:
    """A range with another start."""
    found: Coordinate = replace(within, start=at)  # type: ignore[type-var]  # ranges are dataclasses
    return found


def check_range(within: object, who: str) -> None:
    """Raise `TypeError` for a range that is none."""
    if not isinstance(within, Coordinate):
        raise TypeError(
            f"{who}: within is {kind(within)}; expected a range such as bilevel.Log(1e-6, 1e-1) or "
            "bilevel.Unit(0.0, 0.9)."
        )


def check_patterns(of: object, who: str) -> None:
    """Raise `TypeError` for what is no sequence of names."""
    if of is not None and (isinstance(of, str) or not isinstance(of, Sequence)):
        raise TypeError(f"{who}: of={of!r}; expected a list of names, with wildcards: of=['*.weight'].")
