"""What vanishes where a follower rests that has a domain, or a non-smooth term in its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.constraints import ConstraintSet, Penalty
from bilevel.constraints.base import Limits, Margins
from bilevel.game.residual import Found, Kinks, OwnGradient, Residual
from bilevel.game.situation import Situation
from bilevel.tree import Variables, leaves

Scale = float | Tensor
"""The step s of the residual: a number, or of many games one each, `[count]`."""


@final
@dataclass(frozen=True, eq=False)
class ConstrainedGradient(Residual):
    r"""The gradient where nothing holds the player, and the distance to its bounds where something does.

    $$F(y) = \frac{y - P_s(y - s\, \nabla_y f(y))}{s}$$

    P projects onto the domain, or is the proximal map of the non-smooth term, or first the one and then the other. F
    vanishes at the same points for every s > 0, and its derivative there gives the same dy/dx. Away from them s says
    which bounds are taken to hold: it should be about the inverse of the largest curvature, which is measured once.

    Args:
        domain: The set that the player stays in.
        prox: The term that its loss has besides its objective.
        scale: s.
        solvers: whether the domain is the inner solver's, and not the player's own.
    """

    domain: ConstraintSet | None
    prox: Penalty | None
    scale: Scale = 1.0
    solvers: bool = False
    symmetric = False
    minimises = False
    differentiates_loss = False

    def __call__(self, at: Situation, y: Sequence[Tensor]) -> Found:
        """F."""
        loss, slopes, after = OwnGradient()(at, y)
        return loss, self.at_rest(at, y, slopes), after

    # What steps go by ------------------------------------------------------------------------------------------------

    @property
    def field(self) -> Residual:
        """The gradient of the objective: what a step goes along before it is projected."""
        return OwnGradient()

    @property
    def projects(self) -> bool:
        """Yes."""
        return True

    @property
    def told(self) -> str:
        """Its set and its term, in words."""
        parts = [f"the domain {self.domain!r}"] if self.domain is not None else []
        return " and ".join([*parts, *([f"the term {self.prox!r}"] if self.prox is not None else [])])

    @property
    def entrywise(self) -> bool:
        """Whether each entry is projected by itself, whatever the steps of the others."""
        return self.prox is None and (self.domain is None or self.domain.entrywise)

    @property
    def any_step(self) -> bool:
        """Whether the map is the same for every length of a step."""
        return self.prox is None

    @property
    def needs_scale(self) -> bool:
        """Yes."""
        return True

    @property
    def step(self) -> Scale:
        """s."""
        return self.scale

    @property
    def given_by_solver(self) -> bool:
        """`solvers`."""
        return self.solvers

    def scaled(self, scale: Scale) -> ConstrainedGradient:
        """The same with another s."""
        return replace(self, scale=scale)

    def at_rest(self, at: Situation, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """F, from the gradient at y."""
        s = [spread(self.scale, leaf) for leaf in y]
        ahead = [leaf - size * slope for leaf, size, slope in zip(y, s, slopes, strict=True)]
        found = self.settled(at, ahead, self.scale)
        return [(leaf - end) / size for leaf, end, size in zip(y, found, s, strict=True)]

    def settled(self, at: Situation, z: Sequence[Tensor], step: Scale) -> list[Tensor]:
        """P, of many games in each."""

        def mapped(tree: Variables, size: Tensor, given: Mapping[str, Variables]) -> Variables:
            if self.prox is not None:
                tree = self.prox.settled(given).apply(tree, size)
            return tree if self.domain is None else self.domain.settled(given).project(tree)

        return leaves(self._each(at, mapped, z, step))

    # Its bounds ------------------------------------------------------------------------------------------------------

    @property
    def option_players(self) -> tuple[str, ...]:
        """The players that the options of its set and its term depend on."""
        parts = [part for part in (self.domain, self.prox) if part is not None]
        return tuple(dict.fromkeys(name for part in parts for name in part.players))

    def bounds(self, at: Situation) -> Limits | None:
        """The bounds of each entry, where nothing else holds the player."""
        if self.prox is not None or self.domain is None or not self.domain.entrywise:
            return None
        domain = self.domain

        def limits(tree: Variables, size: Tensor, given: Mapping[str, Variables]) -> Any:
            found = domain.settled(given).limits(tree)
            assert found is not None
            return [leaf.clone() for bounds in found for leaf in bounds]

        y = leaves(at.game.initial(at.player))
        with torch.no_grad():
            found = self._each(at, limits, y, 1.0)
        return found[: len(y)], found[len(y) :]

    def outside(self, at: Situation, y: Sequence[Tensor]) -> float:
        """The distance of y from the domain, of one game."""
        if self.domain is None:
            return 0.0
        return float(self.domain.settled(at.given(self.domain.players)).distance(at.form.build(list(y))))

    def term(self, at: Situation, y: Sequence[Tensor]) -> Tensor | float:
        """The non-smooth term at y, of one game."""
        if self.prox is None:
            return 0.0
        return self.prox.settled(at.given(self.prox.players)).value(at.form.build(list(y)))

    def require_valid(self, at: Situation) -> None:
        """Raise `ValueError` where the players have made the set empty, or a weight negative."""
        if not self.option_players or at.game.count > 1:
            return
        given = at.given(self.option_players)
        for part in (self.domain, self.prox):
            if part is not None:
                part.settled(given).check(at.game.initial(at.player), f"Player {at.player!r}")

    def kinks(self, at: Situation, y: Sequence[Tensor]) -> Kinks:
        """The walls that hold with a multiplier of about 0, or that y is about to touch.

        There P has no derivative. What counts as about 0 is what rounding and the rest of F leave open.
        """
        with torch.no_grad():
            _, slopes, _ = OwnGradient()(at, y)
            left = at.game.norms(self.at_rest(at, y, slopes))
            near = self._margins(at, y, slopes, self.scale)
            # Where the set of walls that hold depends on s, y is not yet where it tells them apart.
            nearer = self._margins(at, y, slopes, 0.1 * self.scale)
        sizes = torch.stack([leaf.abs().amax() for leaf in y]).amax()
        rounding = 1e3 * torch.finfo(sizes.dtype).eps * (1.0 + sizes)
        found: Kinks = []
        for wall, margin in near.items():
            slack = spread(2.0 * self.scale * left, margin) + rounding
            open_ = (margin.abs() <= slack) | (margin.sign() != nearer[wall].sign())
            found += [(*wall, place, bool(margin[tuple(place)] < 0.0)) for place in open_.nonzero().tolist()]
        return found

    def _margins(self, at: Situation, y: Sequence[Tensor], slopes: Sequence[Tensor], scale: Scale) -> Margins:
        def margins(tree: Variables, size: Tensor, given: Mapping[str, Variables]) -> Margins:
            found: Margins = {}
            if self.prox is not None:
                prox = self.prox.settled(given)
                found |= prox.margins(tree, size)
                tree = prox.apply(tree, size)
            if self.domain is not None:
                found |= self.domain.settled(given).margins(tree, size)
            return found

        ahead = [leaf - spread(scale, leaf) * slope for leaf, slope in zip(y, slopes, strict=True)]
        return self._each(at, margins, ahead, scale)  # type: ignore[no-any-return]

    def _each(self, at: Situation, function: Any, z: Sequence[Tensor], step: Scale) -> Any:
        """`function(tree, step, players)` in each game."""
        size = torch.as_tensor(step, dtype=z[0].dtype, device=z[0].device)
        return at.game.each(function, at.form.build(list(z)), size, at.given(self.option_players))


def spread(scale: Scale, leaf: Tensor) -> Any:
    """A number, or one for each game, in a shape that goes with a leaf `[count, ...]`."""
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return scale
    return scale.reshape(-1, *[1] * (leaf.ndim - 1))


__all__ = ["ConstrainedGradient", "Scale", "spread"]
