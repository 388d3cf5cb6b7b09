"""The law of learned slopes: their warning tells the bad from the good."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.errors import BilevelWarning
from bilevel.game import Game, Player
from bilevel.responses import Response
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import NotOffered, ResponseSubject, Subject

_RIGHT = 0.01
"""A hypergradient that is wrong by no more of its size is right: a fit that is done has rounding and noise left."""


@dataclass(frozen=True)
class Opposed:
    """f = (y - x)^2 / 2 and g = slope y - x / 2: the direct term is -1/2, and all of it slope - 1/2.

    Who has learned nothing of the follower's slope, 1, answers -1/2, which for a slope of 1 has the wrong sign.
    """

    slope: float

    def game(self) -> Game:
        """The leader at 1/2, the follower at its optimum there."""
        half = torch.tensor(0.5, dtype=torch.float64)

        def lead(x: Tensor, y: Tensor) -> Tensor:
            return self.slope * y - 0.5 * x

        def follow(x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * (y - x) ** 2

        return Game(x=Player(lead, half), y=Player(follow, half))

    def hypergradient(self) -> float:
        """By hand."""
        return self.slope - 0.5


def warning_separates(subject: Subject, known: Opposed) -> None:
    """Whose slope is learned warns while its hypergradient has the wrong sign, and not once it is right."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response warns.")
    if not (subject.estimates and subject.response.behaviour.warns and subject.adjustable):
        raise NotOffered("It learns no slope about which it would warn.")
    if subject.of_steps:
        raise NotOffered("It promises the derivative of its steps.")
    if not math.isnan(subject.promise.stated_bias):
        raise NotOffered("It states a bias, and a sign may be wrong within it.")
    wanted = known.hypergradient()
    for steps in (1, 4, 16, 64, 256, 1024):
        found, told = _after(subject.with_steps(steps), known)
        wrong = abs(found - wanted) / abs(wanted)
        assert found * wanted > 0.0 or told, (
            f"after {steps} steps the hypergradient is {found:.3g} and should be {wanted:.3g}, and nothing warns"
        )
        assert wrong > _RIGHT or not told, f"after {steps} steps it is right to {wrong:.0e}, and it warns: {told[0]}"


def _after(response: Response, known: Opposed) -> tuple[float, list[str]]:
    game = known.game()
    x = game.initial("x").requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y, _ = response(game, {"x": x}, response.init(game))
        (found,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
    told = [str(entry.message) for entry in caught if issubclass(entry.category, BilevelWarning)]
    return float(found), told


def _games() -> st.SearchStrategy[Opposed]:
    return st.sampled_from((Opposed(1.0), Opposed(3.0)))


CALIBRATION = (Law("learned slopes", "the warning tells bad from good", _games, warning_separates, 0.3),)
