"""What many games at once and many tasks of one leader have in common: one `torch.func.vmap` over all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from bilevel.autodiff import in_all_rows
from bilevel.game import Buffers, Follower, Game
from bilevel.game.data import Batch
from bilevel.many.follower import BatchedFollower, among, refuse_mixing
from bilevel.many.numbering import told_of
from bilevel.randomness import random_state, set_random_state
from bilevel.tree import Structure, Variables, leaves, map_leaves, rebuilt


class Stack(Game):
    """`count` games of one form: losses are `[count]`, and variables have a leading dimension, but for the `shared`.

    A game, `_one`, gives the form; functions are written for one game, and one vmap runs them for all. Derivatives are
    plain autograd's, of the sum of the losses: its gradient in one game's variables is that of this game's loss.
    """

    _one: Game
    _count: int
    _dims: Mapping[str, Any]
    shared: frozenset[str] = frozenset()
    """The players who are one for all games."""
    noun: str = "game"
    """What one of them is called."""
    offset: int = 0
    """The number of the first one, where other processes play those before it."""

    @property
    def count(self) -> int:
        """How many games there are."""
        return self._count

    @property
    def told(self) -> str:
        """All of them, in words."""
        return told_of(self.count, self.noun, self.offset)

    @abstractmethod
    def game(self, index: int) -> Game:
        """One of them, by itself."""

    def dim_of(self, player: str) -> int | None:
        """The dimension of a player's variables that tells games apart, as `in_dims` of vmap."""
        return None if player in self.shared else 0

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss in each game `[count]`, and the buffers after it."""
        if self.members(player) != (player,):
            return self._evaluate_group(player, variables, batch, buffers)
        objective = self._parts.players[player].objective
        return self._at_once(
            lambda given, batch, current, _: self._one.evaluate(player, given, batch, current),
            player, self._parts.given(player, objective, variables), batch, buffers, {},
        )  # fmt: skip

    def call(
        self,
        player: str,
        function: Callable[..., Any],
        variables: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers | None,
        extra: Mapping[str, Variables],
    ) -> tuple[Variables, Buffers]:
        """A function called in each game as the player's objective is; its answers have the leading dimension."""
        if "batch" not in self._parts.named(player, function):
            batch = None  # else it would be looked at as something that varies
        return self._at_once(
            lambda given, batch, current, extra: self._one.call(player, function, given, batch, current, extra),
            player, self._parts.given(player, function, variables), batch, buffers, extra,
        )  # fmt: skip

    def member_moments(
        self, member: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
    ) -> dict[str, Tensor]:
        """In each game those of its own, `[count, ...]`."""
        given = self._parts.given(member, self._parts.players[member].objective, variables)
        found: Any = self._at_once(
            lambda given, batch, current, _: (self._one.member_moments(member, given, batch, current), {}),
            member, given, batch, buffers, {},
        )[0]  # fmt: skip
        return found  # type: ignore[no-any-return]

    def _at_once(
        self,
        function: Callable[..., tuple[Variables, Buffers]],
        player: str,
        given: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers | None,
        extra: Mapping[str, Variables],
    ) -> tuple[Variables, Buffers]:
        """`function(given, batch, buffers, extra)` in all games by one vmap; an anticipated player was asked before."""
        current = self._parts.lent_buffers(player, given, buffers)
        parts = (dict(given), batch, current, dict(extra))
        # One flat list of what varies: vmap would walk the nests again and again.
        values: list[Any] = []
        dims: list[int | None] = []
        for name, tree in parts[0].items():
            values += leaves(tree)
            dims += [self.dim_of(name)] * (len(values) - len(dims))
        values += leaves(batch)
        dims += self._flat_dims(player, batch)
        for name, tree in current.items():
            values += leaves(tree)
            dims += [self.dim_of(name)] * (len(values) - len(dims))
        values += leaves(parts[3])
        dims += [0] * (len(values) - len(dims))
        varying = [place for place, dim in enumerate(dims) if dim is not None]
        if not varying:
            alike = self._alike(function, parts)
            if alike is not None:
                return alike[0], self._buffers_after(alike[1])
        forms: list[Any] = []

        def one(*mine: Tensor) -> tuple[Tensor, ...]:
            every = list(values)
            for place, value in zip(varying, mine, strict=False):
                every[place] = value
            result = function(*rebuilt(parts, every))
            forms.append(map_leaves(lambda _: 0, result))
            return tuple(leaves(result))

        # Where nothing varies, an argument that nobody reads says how many there are.
        given_over = [values[place] for place in varying] or [torch.empty(self.count, device=self.device)]
        found = in_all_rows(one, self.count, given_over)
        answer, after = rebuilt(forms[0], found)
        return answer, self._buffers_after(after)

    def _alike(self, function: Callable[..., Any], parts: tuple[Any, ...]) -> Any:
        """What a function of nothing that varies returns, once for all; None where it draws random numbers."""
        before = random_state(self.device)
        result = function(*parts)
        drawn = any(not torch.equal(state, before[kind]) for kind, state in random_state(self.device).items())
        if drawn or not all(isinstance(leaf, Tensor) for leaf in leaves(result)):
            set_random_state(before, self.device)
            return None
        return map_leaves(lambda leaf: leaf.expand(self.count, *leaf.shape), result)

    def _buffers_after(self, after: Buffers) -> Buffers:
        """Those of the shared players are one again: the mean over the games, of counts the first."""
        return {
            name: map_leaves(lambda b: b.mean(0) if b.is_floating_point() else b[0], tree)
            if name in self.shared
            else tree
            for name, tree in after.items()
        }

    def form_of_one(self, player: str) -> Structure:
        """How a player's variables are laid out in one game."""
        return self._one.structure(player)

    def each(self, function: Callable[..., Any], *trees: Any) -> Any:
        """`function(*trees)` in each game by one vmap; a tensor without dimensions is the same in all."""
        dims = map_leaves(lambda leaf: None if leaf.ndim == 0 else 0, trees)
        return torch.func.vmap(function, in_dims=dims)(*trees)

    def follower(
        self,
        others: Mapping[str, Variables],
        state: Mapping[str, Any],
        batch: Batch = None,
        *,
        further: Iterable[str] = (),
    ) -> Follower:
        """The follower of all games at once, whose solvers keep them apart."""
        return BatchedFollower(self, others, state, batch, further)

    def refuse_mixing(self, asker: str, player: str, optimizer: Callable[..., Any]) -> None:
        """Refuse an optimiser that does not move each entry by itself."""
        refuse_mixing(asker, optimizer, self, player)

    def described_norm(self, norm: Tensor) -> str:
        """In which games it is not finite."""
        return f"no finite norm{among(norm, self.noun, self.offset)}"

    def batch_dims(self, player: str, batch: Batch) -> Any:
        """Which leaves of a player's batch have the leading dimension, as `in_dims` of vmap: 0 or None for each."""
        return rebuilt(batch, self._flat_dims(player, batch))

    def _flat_dims(self, player: str, batch: Batch) -> list[int | None]:
        return _spread(self._dims.get(player), batch)

    def batch_of(self, player: str, batch: Batch, index: int) -> Batch:
        """One game's part of a player's batch."""
        return rows_of(batch, self._dims.get(player), index)

    @property
    def record_keys(self) -> tuple[str, ...]:
        """The median, and the worst."""
        return ("", ".worst")

    def total(self, loss: Tensor) -> Tensor:
        """The sum over games: its gradient in one game's variables is that of this game's loss."""
        return loss.sum()

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of a player's leaves in each game, `[count]`."""
        # Leaf by leaf: gradients of matrices are transposed, and to join them would copy all.
        rows = [tensor.abs() if tensor.ndim == 1 else vector_norm(tensor, dim=_inner(tensor)) for tensor in tensors]
        return rows[0] if len(rows) == 1 else vector_norm(torch.stack(rows), dim=0)

    def _repeated(self, leaf: Tensor) -> Tensor:
        return leaf.expand(self.count, *leaf.shape).clone()


def _inner(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions after the first."""
    return tuple(range(1, tensor.ndim))


def _spread(dims: Any, batch: Batch) -> list[int | None]:
    """0 or None for each leaf of a batch; what is no tensor has no dimension."""
    if dims is None or isinstance(dims, int):
        return [dims if isinstance(leaf, Tensor) else None for leaf in leaves(batch)]
    parts = [(dims[key], batch[key]) for key in batch] if isinstance(dims, Mapping) else zip(dims, batch, strict=True)
    return [dim for dims, part in parts for dim in _spread(dims, part)]


def rows_of(batch: Batch, dims: Any, rows: int | Tensor) -> Batch:
    """Some games' part of a batch; `dims` says which leaves have the leading dimension."""
    if dims is None:
        return batch
    if isinstance(dims, int):
        return map_leaves(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)
    if isinstance(dims, Mapping):
        return {key: rows_of(batch[key], dims[key], rows) for key in batch}
    return type(batch)(rows_of(part, dim, rows) for part, dim in zip(batch, dims, strict=True))
