"""Options of the cross entropy that a training loss calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from bilevel.constraints import Coordinate, Interval, Log, Unit
from bilevel.game.modules import CallableVariables
from bilevel.hyper.criterion import CriterionMode
from bilevel.hyper.declared.base import Declaration, Loss, check_range, started
from bilevel.tree import Variables


class _Criterion(Declaration):
    """An option of the cross entropy that the training loss calls."""

    within: Coordinate
    option: str

    def init(self, model: nn.Module) -> Variables:
        """One number."""
        return started(self.within, self.within.tensor(next(model.parameters(), None)))

    def changed(self, loss: Loss, strength: Variables) -> Loss:
        """The loss, whose calls of torch's cross entropy have this option."""

        def shaped(weights: CallableVariables, batch: Any) -> Tensor:
            with CriterionMode(type(self).__name__, {self.option: strength}) as mode:
                found = loss(weights, batch)
            mode.require_called()
            return found

        return shaped


@final
@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(_Criterion):
    """Label smoothing of every `torch.nn.functional.cross_entropy` or `nn.CrossEntropyLoss` that the loss calls.

    Args:
        within: Its range and start.

    Examples:
        >>> LabelSmoothing().init(nn.Linear(2, 2)).start
        tensor(0.0500)
    """

    name = "label_smoothing"
    option = "smoothing"

    within: Coordinate = Unit(0.0, 0.5, start=0.05)  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        check_range(self.within, "LabelSmoothing")


@final
@dataclass(frozen=True, kw_only=True)
class Focusing(_Criterion):
    """The focal loss's exponent in every cross entropy that the loss calls.

    Args:
        within: Its range and start.

    Examples:
        >>> Focusing().init(nn.Linear(2, 2)).start
        tensor(0.5000)
    """

    name = "focusing"
    option = "focusing"

    within: Coordinate = Interval(0.0, 5.0, start=0.5)  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        check_range(self.within, "Focusing")


@final
@dataclass(frozen=True, kw_only=True)
class Temperature(_Criterion):
    """What logits are divided by in every cross entropy that the loss calls.

    Args:
        within: Its range and start.

    Examples:
        >>> Temperature().init(nn.Linear(2, 2)).start
        tensor(1.)
    """

    name = "temperature"
    option = "temperature"

    within: Coordinate = Log(0.1, 10.0, start=1.0)  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        check_range(self.within, "Temperature")


@final
@dataclass(frozen=True)
class ClassWeights(_Criterion):
    """One weight a class in every cross entropy that the loss calls. Its mean is weighted: their scale drops out.

    Args:
        classes: How many.
        within: Their range and start.

    Examples:
        >>> ClassWeights(3).init(nn.Linear(2, 3)).start
        tensor([1., 1., 1.])
    """

    name = "class_weights"
    option = "class_weights"

    classes: int
    within: Coordinate = Log(0.1, 10.0, start=1.0)  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        if isinstance(self.classes, bool) or not isinstance(self.classes, int) or self.classes < 2:
            raise ValueError(f"ClassWeights: classes={self.classes!r}; expected a number of at least 2.")
        check_range(self.within, "ClassWeights")

    def init(self, model: nn.Module) -> Variables:
        """One number a class."""
        one = self.within.tensor(next(model.parameters(), None))
        return started(self.within, one.expand(self.classes).clone())
