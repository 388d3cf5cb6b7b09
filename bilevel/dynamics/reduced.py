"""The leader's own part of a stochastic hypergradient, with less variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel.dynamics.base import Dynamics, State
from bilevel.dynamics.field import Field, Leaves
from bilevel.dynamics.play import OpenedStep
from bilevel.tree import cut, join
from bilevel.variance import VarianceReduction


@final
@dataclass(frozen=True)
class VarianceReduced(Dynamics):
    r"""Leaders' gradients from their own batches, corrected by what other batches told before.

    A leader's loss f has partial derivatives in its own variables, \(f_x\), and in those of its followers, \(f_y\).
    Both are means over its data, are corrected together, and only then go through the followers' answers:

    $$
    d_x = \hat f_x + \hat f_y^\top \frac{dy}{dx}.
    $$

    With `SingleLoop(variance=...)` it is SABA or SRBA for leaders with minibatches; `SingleLoop` receives the corrected
    \(\hat f_y\). The followers' own batches are their responses' business.

    Costs what the reduction costs: `SAGA` a table of the gradients for each batch, in this rule's state; `SARAH` two
    evaluations a step and a pass over the leader's data in each period.

    Args:
        reduction: `bilevel.variance.SAGA()` or `bilevel.variance.SARAH(period)`.

    Raises:
        ValueError: What the reduction raises for data that it cannot take.

    Examples:
        >>> from bilevel.variance import SAGA
        >>> VarianceReduced(SAGA())
        VarianceReduced(reduction=SAGA())
    """

    reduction: VarianceReduction

    def __post_init__(self) -> None:
        if not isinstance(self.reduction, VarianceReduction):
            raise TypeError(
                f"VarianceReduced: reduction={self.reduction!r}; expected bilevel.variance.SAGA() or "
                "bilevel.variance.SARAH(period)."
            )

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The hypergradients of the corrected losses."""
        point = field.tracked()
        with torch.enable_grad():
            opened = field.play.open(point)
        followers = [name for name in opened.answers if name not in field.names]
        found, memory = {}, dict(state)
        for name in field.names:
            mean = _OwnSlopes(field, name, (name, *followers), opened)
            whole, memory[name] = self.reduction.direction(mean, state.get(name, {}))
            parts = mean.split(whole)
            own = parts[name]
            pairs = [
                (answer, part)
                for follower in followers
                for answer, part in zip(opened.answers[follower], parts[follower], strict=True)
                if answer.requires_grad
            ]
            if pairs:
                answers, cotangents = zip(*pairs, strict=True)
                through = torch.autograd.grad(
                    answers, point[name], cotangents, retain_graph=True, materialize_grads=True
                )  # fmt: skip
                own = [direct + indirect for direct, indirect in zip(own, through, strict=True)]
            found[name] = own
        return found, memory


class _OwnSlopes:
    """A leader's partial derivatives in some players' variables, stacked, as a mean over its batches."""

    def __init__(self, field: Field, name: str, wanted: Sequence[str], opened: OpenedStep) -> None:
        self.owner, self._field, self._wanted, self._opened = name, field, wanted, opened
        self.batch, self.epoch = field.play.batch(name)
        self.length = field.play.pass_length(name)

    @cached_property
    def point(self) -> Tensor:
        """The wanted players' leaves as one vector."""
        return join([leaf.detach() for other in self._wanted for leaf in self._opened.leaves[other]])

    def split(self, vector: Tensor) -> Leaves:
        """The wanted players' leaves."""
        parts = iter(cut(vector, [leaf.shape for name in self._wanted for leaf in self._opened.leaves[name]]))
        return {name: [next(parts) for _ in self._opened.leaves[name]] for name in self._wanted}

    def here(self) -> Tensor:
        """On the step's batch, where it is."""
        return self._slopes(self._opened.losses[self.owner], self._opened.leaves)

    def at(self, point: Tensor) -> Tensor:
        """On the step's batch elsewhere."""
        return self._elsewhere(point, ())

    def everywhere(self) -> Tensor:
        """The mean over the pass."""
        batches = self._field.play.whole_pass(self.owner, "VarianceReduced")
        found = [self._elsewhere(self.point, (batch,)) for batch in batches]
        return sum(found[1:], found[0]) / len(found)

    def _elsewhere(self, point: Tensor, batch: tuple[Any, ...]) -> Tensor:
        moved = {name: [leaf.requires_grad_() for leaf in leaves] for name, leaves in self.split(point).items()}
        with torch.enable_grad():
            every = {**self._opened.leaves, **moved}
            return self._slopes(self._field.play.own(self.owner, every, batch), every)

    def _slopes(self, loss: Tensor, leaves: Mapping[str, Sequence[Tensor]]) -> Tensor:
        wanted = [leaf for name in self._wanted for leaf in leaves[name]]
        return join(list(torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True))).detach()
