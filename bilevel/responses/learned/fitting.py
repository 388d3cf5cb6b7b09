"""The expected loss of a learned map over perturbed leaders: its gradients, and what a fit leaves of the slope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.game import Follower
from bilevel.networks.flat import Parameters
from bilevel.randomness import random_kept, random_state
from bilevel.responses.learned.maps import LearnedMap
from bilevel.responses.learned.ranges import Ranges


@final
@dataclass(frozen=True)
class Fitting:
    """A follower that answers by a learned map around `origin: [n]`, with inputs in units of `unit`.

    The others' variables are vectors in their free coordinates (`Ranges`), in which the map is one.
    """

    follower: Follower
    ranges: Ranges
    learned: LearnedMap
    origin: Tensor
    unit: float

    def answer(self, w0: Sequence[Tensor], parameters: Parameters, x: Tensor) -> list[Tensor]:
        """The follower's leaves at the others' variables `x: [n]`, or `[rows, n]` for a map that takes many."""
        return self.learned(w0, parameters, (x - self.origin) / self.unit)

    def gradients(
        self, w0: Sequence[Tensor], network: Parameters, constants: Parameters, points: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean loss over `points: [rows, n]`, and its gradients in w0's leaves and the network's parameters."""
        # BatchNorm's statistics advance in place, which vmap refuses: then one row after the other.
        together = self.learned.batched and not self.follower.buffers
        total = points.new_zeros(())
        slopes: list[Tensor] = []
        for rows in torch.split(points, len(points) if together else 1):
            own = [leaf.detach().requires_grad_() for leaf in w0]
            learned = {name: p.detach().requires_grad_() for name, p in network.items()}
            with torch.enable_grad():
                loss = self._losses(own, {**learned, **constants}, rows).sum() / len(points)
                found = torch.autograd.grad(loss, [*own, *learned.values()], materialize_grads=True)
            total = total + loss.detach()
            slopes = [a + b for a, b in zip(slopes, found, strict=True)] if slopes else list(found)
        return total, slopes

    def examine(
        self, w0: Sequence[Tensor], parameters: Parameters, x: Tensor, step: Tensor
    ) -> tuple[float, float, float]:
        """|f_y| at the answer to `x: [n]`, and how the slope's equation H J + f_yx = 0 is met in a direction.

        When the leader moves by `step`, the follower's gradient changes by f_yx step; a right slope undoes that change.
        Second comes what is left of the change, third its size.
        Takes three gradients, on one batch and one set of random numbers.
        """
        random = random_state(self.follower.game.device)
        centred = self.learned.centred and torch.equal(x, self.origin)

        def slopes(at: Tensor, others: Tensor) -> tuple[Tensor, ...]:
            own = [leaf.detach().requires_grad_() for leaf in w0]  # y is w0 and a displacement: f_y is the slope in w0
            with torch.enable_grad(), random_kept(self.follower.game.device, start=random):
                # At its centre the answer is w0 itself: no second tensor of its size is needed.
                loss = self._of(own, others) if centred and at is x else self._loss(own, parameters, at, others)
                return torch.autograd.grad(loss, own, materialize_grads=True)

        # In this order no more than two gradients are held, and a displaced answer beside one only.
        there = slopes(x + step, x + step)
        here = slopes(x, x)
        answered = _distance(there, here)
        del there
        unanswered = _distance(slopes(x, x + step), here)
        return _norm(here), answered, unanswered

    def _loss(
        self, w0: Sequence[Tensor], parameters: Parameters, at: Tensor, others: Tensor, *, advance: bool = False
    ) -> Tensor:
        """The follower's loss at its answer to `at`, when the others play `others`."""
        # Nobody else holds the answer: backward frees each leaf of it as soon as it is through.
        return self._of(self.answer(w0, parameters, at), others, advance=advance)

    def _of(self, y: Sequence[Tensor], others: Tensor, *, advance: bool = False) -> Tensor:
        form = self.follower.input_form
        natural = form.unflatten(self.ranges.natural(others))
        return self.follower.loss(self.follower.form.build(y), natural, advance_buffers=advance)

    def _losses(self, w0: Sequence[Tensor], parameters: Parameters, points: Tensor) -> Tensor:
        """The loss `[rows]` at each of `points: [rows, n]` and the answer to it."""
        if len(points) == 1:
            return self._loss(w0, parameters, points[0], points[0], advance=True)[None]

        def one(x: Tensor, y: list[Tensor]) -> Tensor:
            natural = self.follower.input_form.unflatten(self.ranges.natural(x))
            return self.follower.loss(self.follower.form.build(y), natural)

        return torch.func.vmap(one, randomness="different")(points, self.answer(w0, parameters, points))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in tensors))


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(a - b)) for a, b in zip(one, other, strict=True)))
