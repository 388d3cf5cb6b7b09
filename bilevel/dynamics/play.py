"""One step of the game itself, for rules of play that need more than own gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from bilevel.tree import Variables


@dataclass(frozen=True, eq=False)
class OpenedStep:
    """The losses at a point as functions of everybody's variables, those of followers included.

    Attributes:
        answers: Everybody's leaves; those of followers are differentiable in the leaves of the point.
        leaves: The same values as leaves that require grad, on which the losses depend.
        losses: Each player's loss of them.
    """

    answers: dict[str, list[Tensor]]
    leaves: dict[str, list[Tensor]]
    losses: dict[str, Tensor]


class Play(Protocol):
    """What a rule may ask of the step that it is in. Each loss that it asks for is counted as one gradient."""

    def open(self, point: Mapping[str, list[Tensor]]) -> OpenedStep:
        """The followers' answers to the leaders' point, and the losses there, apart."""

    def own(self, name: str, leaves: Mapping[str, Sequence[Tensor]], batch: tuple[Any] | tuple[()]) -> Tensor:
        """A player's loss at everybody's leaves; on the batch in the tuple, or with () on its present one."""

    def batch(self, name: str) -> tuple[Any, int | None]:
        """A player's present batch, and the pass that it is of."""

    def advance(self, names: Sequence[str]) -> None:
        """Move the players on to their next batches, and to other random numbers."""

    def whole_pass(self, name: str, asker: str) -> Iterator[Any]:
        """All the batches of a player's present pass; `DataError`, in which `asker` reads them, where it has no end."""

    def pass_length(self, name: str) -> int | None:
        """How many batches a pass of a player's has, as far as its data say."""

    def tree(self, name: str, leaves: Sequence[Any]) -> Variables:
        """Leaves in the form of a player's variables."""

    def require_minimum(self, asker: str, name: str) -> None:
        """Raise `TypeError` for a player that minimises no loss of its own."""
