"""What a response promises of its derivative, how it behaves from call to call, and what it reports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from bilevel.game import Size


class Promise(ABC):
    """What the derivative of a response's answer is the derivative of."""

    @property
    @abstractmethod
    def of_steps(self) -> bool:
        """Whether it is, or estimates, the derivative of the steps taken; else that of the optimum."""

    @property
    @abstractmethod
    def stated_bias(self) -> float:
        """The largest relative error of the Jacobian that it stands for; NaN where it states none."""


@final
@dataclass(frozen=True)
class Optimum(Promise):
    """dy*/dx, the derivative of the follower's optimum, as exact as the call's own tolerances and report say."""

    @property
    def of_steps(self) -> bool:
        """No."""
        return False

    @property
    def stated_bias(self) -> float:
        """None at all."""
        return 0.0


@final
@dataclass(frozen=True)
class Steps(Promise):
    """The exact derivative of the variables after the steps that the call took, from where it started."""

    @property
    def of_steps(self) -> bool:
        """Yes."""
        return True

    @property
    def stated_bias(self) -> float:
        """None at all."""
        return 0.0


@final
@dataclass(frozen=True)
class Estimate(Promise):
    """An estimate of another promise's derivative, with its bias stated.

    Args:
        of: what is estimated, `Optimum()` or `Steps()`.
        bias: the largest relative error of the Jacobian, |J - J*| <= bias |J*|, that the response stands for once its
            follower has converged; NaN where it can state none beforehand, and its report tells the error instead.
        reason: where the bias comes from, in a few words.
    """

    of: Promise
    bias: float = math.nan
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse what states nothing."""
        if not isinstance(self.of, Optimum | Steps):
            raise TypeError(f"Estimate: of={self.of!r}; expected Optimum() or Steps().")
        if self.bias < 0.0:
            raise ValueError(f"Estimate: bias={self.bias}; expected a relative error >= 0, or NaN for none.")

    @property
    def of_steps(self) -> bool:
        """What it estimates."""
        return self.of.of_steps

    @property
    def stated_bias(self) -> float:
        """`bias`."""
        return self.bias


@final
@dataclass(frozen=True)
class Behaviour:
    """How a response behaves from call to call, where strategies differ and the laws must know.

    Args:
        warm: whether a call starts where the last one stopped.
        random: whether a call draws random numbers of its own, beside those that the losses draw.
        steps_in_transforms: whether a call inside a `torch.func` transform takes the steps that it takes outside; else
            it answers by its state as it stands.
        warns: whether an answer that is far from what is promised comes with a warning.
        rtol: relative residual to which the equation for the derivative is solved; 0 where there is none, or where it
            is solved as well as it can be.
    """

    warm: bool = False
    random: bool = False
    steps_in_transforms: bool = True
    warns: bool = True
    rtol: float = 0.0


@final
@dataclass(frozen=True)
class Report:
    """What a response's state says of its calls so far.

    Args:
        gradients: gradients of the follower's loss, over all calls.
        products: Hessian-vector products, over all calls whose backward pass was told by `after_backward`.
        stationarity: |gradient| at the last answer in units of that at the start of the game; NaN before a call.
        residual: relative residual of the equation for the last derivative; None where there is no such equation, NaN
            where it is not known yet.
        error: estimated relative error of the last hypergradient; NaN where nothing estimates it.
        loosened: how many times looser than configured the last call's tolerances were.
    """

    gradients: int
    products: int
    stationarity: Size
    residual: Size | None = None
    error: float = math.nan
    loosened: float = 1.0
