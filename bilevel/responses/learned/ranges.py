"""The others' variables in the coordinates that their optimisers move: what a learned map is a map from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.constraints import Coordinate
from bilevel.game import Follower


@final
@dataclass(frozen=True)
class Ranges:
    """To and from free coordinates, a range for each of the leaves that make up a vector `[..., n]`.

    A perturbation of a natural value could leave its range, and a decay between 1e-6 and 0.1 has no one scale.
    """

    sizes: tuple[int, ...]
    kinds: tuple[Coordinate | None, ...]

    @staticmethod
    def of(follower: Follower) -> Ranges:
        """Those of the others whom a follower answers to."""
        game, names = follower.game, follower.inputs
        kinds = [kind for name in names for kind in game.coordinates(name) or [None] * len(game.structure(name).shapes)]
        return Ranges(tuple(x.numel() for x in follower.xs), tuple(kinds))

    def free(self, natural: Tensor) -> Tensor:
        """The coordinates of natural values; the values themselves where nobody has a range."""
        return self._mapped(natural, lambda kind, part: kind.inverse(part))

    def natural(self, free: Tensor) -> Tensor:
        """The natural values of coordinates."""
        return self._mapped(free, lambda kind, part: kind.natural(part))

    def _mapped(self, vector: Tensor, change: Callable[[Coordinate, Tensor], Tensor]) -> Tensor:
        if not any(self.kinds):
            return vector
        parts = zip(self.kinds, torch.split(vector, list(self.sizes), dim=-1), strict=True)
        return torch.cat([part if kind is None else change(kind, part) for kind, part in parts], dim=-1)
