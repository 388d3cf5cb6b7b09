"""Rules of players who shape each other's learning: they differentiate through the others' next gradient step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.dynamics.base import Dynamics, State, require_positive
from bilevel.dynamics.field import Field, Leaves
from bilevel.errors import require_kinds


@final
@dataclass(frozen=True)
class LOLA(Dynamics):
    r"""Learning with opponent-learning awareness, to first order in the others' step.

    Player $i$ descends the gradient in $z_i$ of

    $$
    L_i - \eta \sum_{j \ne i} \langle \nabla_j L_i, \nabla_j L_j \rangle,
    $$

    which is $(I - \eta J_o)\, \xi - \eta \chi$: `LookAhead`, and the term
    $\chi_i = \sum_j J_{ji}^\top \nabla_j L_i$ that shapes how the others learn. Its fixed points need not be the game's
    (those of `LookAhead` are).

    Costs a gradient of each player's loss in everybody's variables a step, and one backward pass through it. Source:
    Foerster et al. 2017 (arXiv 1709.04326); Letcher et al. 2019 (arXiv 1811.08469).

    Args:
        step_size: $\eta$, the step that the others are assumed to take.

    Raises:
        ValueError: If `step_size` is not a positive finite number.
    """

    step_size: float

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "step_size", self.step_size)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The gradient of each player's own Taylor expansion."""
        with torch.enable_grad():
            point = field.tracked()
            losses = field.losses(point)
            every = [(name, leaf) for name in field.names for leaf in point[name]]
            # One backward pass has a loss's derivatives in everybody's variables; None in those it does not read.
            slopes = {name: _seen(losses[name], [leaf for _, leaf in every]) for name in field.names}
            own = [slopes[name][place] for place, (name, _) in enumerate(every)]
            found = {}
            for name in field.names:
                shaped = losses[name]
                for (other, _), crossed, theirs in zip(every, slopes[name], own, strict=True):
                    if other != name and crossed is not None and theirs is not None:
                        shaped = shaped - self.step_size * (crossed * theirs).sum()
                found[name] = _last(shaped, point[name])
        return found, state


@final
@dataclass(frozen=True)
class ExactLOLA(Dynamics):
    r"""Learning with opponent-learning awareness, through the others' very step instead of its first order.

    Player $i$ descends the gradient in $z_i$ of

    $$
    L_i\big(z_i,\; z_j - \eta \nabla_j L_j(z) \text{ for all } j \ne i\big).
    $$

    It differs from `LOLA` by terms of order $\eta^2$.

    Costs an evaluation of all losses at $n + 1$ points and a backward pass through two for each player. Source:
    Foerster et al. 2017 (arXiv 1709.04326), eq. 4.2.

    Args:
        step_size: $\eta$, the step that the others are assumed to take.

    Raises:
        ValueError: If `step_size` is not a positive finite number.
    """

    step_size: float

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "step_size", self.step_size)

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The gradient of each player's loss after the others' step."""
        with torch.enable_grad():
            point = field.tracked()
            losses = field.losses(point)
            moved: Leaves = {}
            for name in field.names:
                steps = zip(point[name], _slopes(losses[name], point[name]), strict=True)
                moved[name] = [leaf - self.step_size * slope for leaf, slope in steps]
            found = {}
            for name in field.names:
                there = {other: point[name] if other == name else moved[other] for other in field.names}
                found[name] = _last(field.losses(there)[name], point[name])
        return found, state


def _seen(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    """A loss's derivatives, None where it does not depend on a leaf."""
    if not loss.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)


def _slopes(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True))


def _last(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [slope.detach() for slope in torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)]
