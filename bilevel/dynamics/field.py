"""The field of own gradients, and its Jacobian as an operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel._returned import described, require_leaves
from bilevel.dynamics.play import Play
from bilevel.tree import Made, join

Leaves = dict[str, list[Tensor]]
Evaluate = Callable[[Mapping[str, list[Tensor]], Sequence[str], bool], dict[str, list[Tensor]]]
"""From everybody's leaves to the named players' own gradients; with True, such that can be differentiated again."""

Losses = Callable[[Mapping[str, list[Tensor]]], dict[str, Tensor]]
"""From everybody's leaves to everybody's loss, differentiable in all of them."""


class Field:
    r"""The players' own gradients $\xi(z)$, stacked `[n]`, as a rule of play asks for them.

    Batches and random numbers are the same at every point that is asked for within one step, unless a rule moves on to
    the next ones by `play`. `solve` makes the field;
    `point` is where the players are, by name, and `products` counts the products with a player's rows of the Jacobian.

    Args:
        evaluate: From everybody's leaves to the named players' own gradients.
        point: Where the players are.
        movers: Those whose gradients are asked for: everybody (None), unless players move in turn.
        losses: From everybody's leaves to everybody's loss; None where no rule needs it.
        play: The step itself; None where no rule needs it.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        point: Mapping[str, list[Tensor]],
        movers: Sequence[str] | None = None,
        losses: Losses | None = None,
        play: Play | None = None,
    ) -> None:
        self._evaluate = evaluate
        self._losses = losses
        self._play = play
        self.movers = tuple(point if movers is None else movers)
        self._noted: Callable[[str, list[Tensor]], object] | None = None
        # A player who moves alone looks at those whom its loss reads, and the others' are not made.
        self.point: Mapping[str, list[Tensor]] = Made(point, lambda name: self._looked(name, point[name]))
        self.products = 0
        """How many products with a player's rows of J have been asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        """The players, in order of play."""
        return tuple(self.point)

    def noting(self, noted: Callable[[str, list[Tensor]], object]) -> Field:
        """The same, which tells of each player whose point is looked at for the first time."""
        self._noted = noted
        return self

    def _looked(self, name: str, leaves: list[Tensor]) -> list[Tensor]:
        found = [leaf.detach() for leaf in leaves]
        if self._noted is not None:
            self._noted(name, found)
        return found

    def at(self, point: Mapping[str, list[Tensor]]) -> Leaves:
        """The movers' part of xi at a point, everybody's leaves; one gradient of each."""
        self._require_point("at", point)
        return self._evaluate(_tracked(point), self.movers, False)

    def here(self) -> Leaves:
        """The movers' part of xi where the players are."""
        return self._evaluate(_tracked(self.point), self.movers, False)

    def linearised(self) -> Jacobian:
        """xi and J where the players are, on one retained graph."""
        tracked = {name: [t.detach().requires_grad_() for t in leaves] for name, leaves in self.point.items()}
        with torch.enable_grad():
            return Jacobian(tracked, self._evaluate(tracked, self.names, True), self._count)

    def _count(self, products: int) -> None:
        self.products += products

    def losses(self, point: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """Everybody's loss at a point, differentiable in everybody's leaves; counted as one gradient of each.

        For rules that need how one player's variables move another's loss, which own gradients do not tell.

        Raises:
            ValueError: If the field was built without `losses`.
        """
        if self._losses is None:
            raise ValueError("This Field was built without losses=, which the rule needs.")
        self._require_point("losses", point)
        return self._losses(point)

    @property
    def play(self) -> Play:
        """The step itself: each player's loss at any point, its batches, and the followers' answers.

        Raises:
            ValueError: If the field was built without `play`.
        """
        if self._play is None:
            raise ValueError("This Field was built without play=, which the rule needs.")
        return self._play

    def tracked(self) -> Leaves:
        """Fresh leaves where the players are, that require grad."""
        return {name: [t.detach().requires_grad_() for t in leaves] for name, leaves in self.point.items()}

    def stack(self, leaves: Mapping[str, list[Tensor]]) -> Tensor:
        """One vector `[n]` of everybody's leaves, in order of play."""
        return join([leaf for name in self.names for leaf in leaves[name]])

    def split(self, vector: Tensor) -> Leaves:
        """The leaves that make up a vector `[n]`."""
        return _split("Field.split", vector, self.point)

    def _require_point(self, method: str, point: Mapping[str, Sequence[Tensor]]) -> None:
        if set(point) != set(self.names):
            raise ValueError(
                f"Field.{method} was given a point of players {list(point)}; expected everybody's leaves, "
                f"{list(self.names)}."
            )
        for name, here in self.point.items():
            require_leaves(point[name], here, f"Field.{method}: the point of player {name!r}")


def _tracked(point: Mapping[str, list[Tensor]]) -> Mapping[str, list[Tensor]]:
    return Made(point, lambda name: [leaf.detach().requires_grad_() for leaf in point[name]])


def _split(method: str, vector: Tensor, like: Mapping[str, list[Tensor]], names: Sequence[str] | None = None) -> Leaves:
    """The leaves of these players that make up a vector."""
    names = tuple(like) if names is None else names
    sizes = [leaf.numel() for name in names for leaf in like[name]]
    first = like[names[0]][0]
    if not isinstance(vector, Tensor) or vector.shape != (sum(sizes),) or vector.dtype != first.dtype:
        raise ValueError(
            f"{method} was given {described(vector)}; expected one vector [{sum(sizes)}] of {first.dtype}, the leaves "
            f"of {list(names)} one after the other, as Field.stack makes it."
        )
    parts = iter(torch.split(vector, sizes))
    return {name: [next(parts).reshape(leaf.shape) for leaf in like[name]] for name in names}


@dataclass(frozen=True, eq=False)
class Jacobian:
    r"""The Jacobian of the field, $J = d\xi / dz$ `[n, n]`, at a point, by products; and $\xi$ itself `[n]`.

    Block $(i, j)$ is the derivative of player $i$'s own gradient in player $j$'s variables. $S$ and $A$ are its
    symmetric and antisymmetric parts, $J_o$ what lies off the diagonal blocks.

    A transposed product costs one backward pass of all gradients, a plain one two, those of the diagonal one for each
    player.

    Args:
        leaves: Every player's variables, leaf by leaf.
        slopes: Every player's own gradient there, on a graph that is kept.
        count: Told of each product, as one for each player.
    """

    leaves: Leaves
    slopes: Leaves
    count: Callable[[int], object] = lambda products: None

    @property
    def names(self) -> tuple[str, ...]:
        """The players, in order of play."""
        return tuple(self.leaves)

    @property
    def value(self) -> Tensor:
        """xi `[n]`."""
        return self._flat(self.slopes).detach()

    def transposed(self, vector: Tensor) -> Tensor:
        """J'v."""
        self.count(len(self.names))
        return self._pull(vector).detach()

    def matvec(self, vector: Tensor) -> Tensor:
        """J v, by differentiating w -> J'w, which is linear in w, along v."""
        self.count(len(self.names))
        with torch.enable_grad():
            w = torch.zeros_like(vector).requires_grad_()
            pulled = self._pull(w, create_graph=True)
            if not pulled.requires_grad:
                return torch.zeros_like(vector)
            (moved,) = torch.autograd.grad(pulled, w, vector, retain_graph=True, materialize_grads=True)
        return moved.detach()

    def diagonal(self, vector: Tensor) -> Tensor:
        """The own Hessians' products: block diag(J) v."""
        self.count(len(self.names))
        parts, out = self._split(vector), []
        for name in self.names:
            out += self._grads(self.slopes[name], self.leaves[name], parts[name])
        return join(out).detach()

    def off_diagonal(self, vector: Tensor) -> Tensor:
        """J_o v = J v - block diag(J) v."""
        return self.matvec(vector) - self.diagonal(vector)

    def off_diagonal_transposed(self, vector: Tensor) -> Tensor:
        """J_o'v; the diagonal blocks are Hessians, and symmetric."""
        return self.transposed(vector) - self.diagonal(vector)

    def symmetric(self, vector: Tensor) -> Tensor:
        """S v = (J v + J'v) / 2."""
        return 0.5 * (self.matvec(vector) + self.transposed(vector))

    def antisymmetric(self, vector: Tensor) -> Tensor:
        """A v = (J v - J'v) / 2."""
        return 0.5 * (self.matvec(vector) - self.transposed(vector))

    def between(self, rows: Sequence[str], columns: Sequence[str], vector: Tensor) -> Tensor:
        """J_rc v: how the own gradients of players `rows` change when players `columns` move by v."""
        return self.part(self.matvec(self._spread(columns, vector)), rows)

    def between_transposed(self, rows: Sequence[str], columns: Sequence[str], vector: Tensor) -> Tensor:
        """J_rc'v, for v of the players `rows`; of the size of the players `columns`."""
        return self.part(self.transposed(self._spread(rows, vector)), columns)

    def part(self, vector: Tensor, names: Sequence[str]) -> Tensor:
        """What of a vector `[n]` belongs to these players."""
        parts = self._split(vector)
        return join([part for name in names for part in parts[name]])

    def _spread(self, names: Sequence[str], vector: Tensor) -> Tensor:
        given = _split("Jacobian", vector, self.leaves, [name for name in self.names if name in names])
        return join(
            [part for name in self.names for part in given.get(name) or map(torch.zeros_like, self.leaves[name])]
        )

    def _flat(self, leaves: Mapping[str, list[Tensor]]) -> Tensor:
        return join([leaf for name in self.names for leaf in leaves[name]])

    def _split(self, vector: Tensor) -> Leaves:
        return _split("Jacobian", vector, self.leaves)

    def _pull(self, vector: Tensor, *, create_graph: bool = False) -> Tensor:
        parts = self._split(vector)
        outputs = [slope for name in self.names for slope in self.slopes[name]]
        wanted = [leaf for name in self.names for leaf in self.leaves[name]]
        weights = [part for name in self.names for part in parts[name]]
        return join(self._grads(outputs, wanted, weights, create_graph=create_graph))

    def _grads(
        self, outputs: list[Tensor], wanted: list[Tensor], weights: list[Tensor], *, create_graph: bool = False
    ) -> list[Tensor]:
        pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
        if not pairs:  # losses linear in everything: no curvature at all
            return [torch.zeros_like(leaf) for leaf in wanted]
        return list(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [w for _, w in pairs],
                retain_graph=True,
                create_graph=create_graph,
                materialize_grads=True,
            )
        )
