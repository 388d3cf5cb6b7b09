"""A run's state as all games have it, and the part of it that belongs to a rank's own games."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import CheckpointError
from bilevel.tree import leaves

EACH = "each game"
"""The one key of a dict whose value is a list with one entry a game."""

_RANKS = "each rank"
_OF = "\ngames "
_DIVIDED = ("states", "buffers", "memory", "lagrangians", "leaders", "first")


@dataclass(frozen=True)
class Shares:
    """Which games are whose: ranks have so many of them each, in order.

    A tensor belongs to games where its leading dimension is their number, and a vector where it has one entry for each
    unknown of each game, leaf after leaf. What is neither is the same on all ranks, or a rank's own number.
    """

    counts: tuple[int, ...]

    @classmethod
    def even(cls, count: int, ranks: int) -> Shares:
        """As many for each as can be."""
        return cls(tuple((rank + 1) * count // ranks - rank * count // ranks for rank in range(ranks)))

    @property
    def total(self) -> int:
        """All games."""
        return sum(self.counts)

    def first(self, rank: int) -> int:
        """The number of a rank's first game."""
        return sum(self.counts[:rank])

    def divided(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """What of a run's state is not the same on all ranks."""
        return {key: run[key] for key in (*_DIVIDED, "warned") if key in run}

    def merged(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the ranks have `divided`, as all games have it."""
        found = {key: self.whole([part[key] for part in parts], key) for key in parts[0] if key != "warned"}
        if "warned" in parts[0]:
            found["warned"] = {
                key if _OF in key else f"{key}{_OF}{self.first(rank)} {self.first(rank) + self.counts[rank]}": entry
                for rank, part in enumerate(parts)
                for key, entry in part["warned"].items()
            }
        return found

    def own(self, run: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """A run's state as a rank has it; as it came where it is of other games."""
        identity = run.get("identity")
        form = identity.get("form") if isinstance(identity, dict) else None
        if not isinstance(form, dict) or form.get("games") != self.total:
            return dict(run)
        found = {**run, **{key: self.part(run[key], rank) for key in _DIVIDED if key in run}}
        return {**found, "warned": self._own_log(run.get("warned", {}), rank)}

    # Trees -----------------------------------------------------------------------------------------------------------

    def whole(self, parts: Sequence[Any], path: str = "", widths: Sequence[int] = ()) -> Any:
        """The ranks' trees as one."""
        first, key = parts[0], path.rsplit(".", 1)[-1]
        if all(isinstance(part, dict) for part in parts):
            return self._of_dicts(parts, path, widths)
        if all(isinstance(part, list | tuple) and len(part) == len(first) for part in parts):
            rows = zip(*parts, strict=True)
            return type(first)(self.whole(row, f"{path}.{place}", widths) for place, row in enumerate(rows))
        if all(isinstance(part, Tensor) for part in parts):
            if key == "step" and not _alike(parts):  # of Adam, in games that have taken more steps or fewer
                pairs = zip(parts, self.counts, strict=True)
                return torch.cat([one.reshape(-1).double().expand(count) for one, count in pairs])
            sizes = [count * sum(widths) for count in self.counts]
            if self._rows(parts, self.counts):
                return torch.cat(list(parts))
            if all(part.ndim == 1 and len(part) == size for part, size in zip(parts, sizes, strict=True)):
                pairs = zip(parts, self.counts, strict=True)
                split = [torch.split(part, [count * width for width in widths]) for part, count in pairs]
                return torch.cat([piece for column in zip(*split, strict=True) for piece in column])
        if _alike(parts):
            return first
        if all(_is_number(part) for part in parts):
            return {_RANKS: list(parts)}
        raise CheckpointError(
            f"DataParallel: the ranks' states differ at {path!r} in a way that is not known to be one game's each: "
            f"{', '.join(_form(part) for part in parts)}. Play these games in one process."
        )

    def part(self, tree: Any, rank: int | None, widths: Sequence[int] = ()) -> Any:
        """A rank's own part of a tree of all games; of None the tree itself, as one process has it."""
        if isinstance(tree, dict):
            if set(tree) == {_RANKS}:
                values = tree[_RANKS]
                mine = rank is not None and len(values) == len(self.counts)
                return values[rank] if mine else _largest(values)
            if set(tree) == {EACH}:
                return {EACH: tree[EACH] if rank is None else tree[EACH][self._place(rank)]}
            widths = widths if rank is None else _widths(tree) or widths
            found = {key: self.part(value, rank, widths) for key, value in tree.items()}
            step = found.get("step")
            if rank is not None and isinstance(step, Tensor) and step.ndim:
                first = step.reshape(-1)[0]  # one for all, where it is the same in all: as the inner solver leaves it
                found["step"] = first.to(torch.get_default_dtype()).cpu() if bool((step == first).all()) else step
            return _as(tree, found)
        if isinstance(tree, list | tuple):
            return type(tree)(self.part(one, rank, widths) for one in tree)
        if not isinstance(tree, Tensor) or rank is None:
            return tree
        if self._rows([tree], [self.total]):
            return tree[self._place(rank)].clone()
        if tree.ndim == 1 and widths and len(tree) == self.total * sum(widths):
            pieces = torch.split(tree, [self.total * width for width in widths])
            rows = [piece.reshape(self.total, -1)[self._place(rank)] for piece in pieces]
            return torch.cat([row.reshape(-1) for row in rows])
        return tree

    def _of_dicts(self, parts: Sequence[dict[str, Any]], path: str, widths: Sequence[int]) -> dict[str, Any]:
        if all(set(part) == {EACH} for part in parts):
            return {EACH: [one for part in parts for one in part[EACH]]}
        filled = next((part for part in parts if part), {})
        # An optimiser remembers nothing yet where no game of a rank has moved.
        given = [part or self._blank(filled, rank) for rank, part in enumerate(parts)]
        if any(set(part) != set(filled) for part in given):
            raise CheckpointError(
                f"DataParallel: the ranks' states differ at {path!r}: {[sorted(map(str, part)) for part in given]}. "
                "Play these games in one process."
            )
        widths = _widths(filled) or widths
        found = {key: self.whole([part[key] for part in given], f"{path}.{key}", widths) for key in filled}
        return _as(filled, found)

    def _blank(self, like: Mapping[str, Any], rank: int) -> dict[str, Any]:
        def zeros(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.new_zeros((self.counts[rank], *value.shape[1:]) if value.ndim else ())

        return {key: zeros(value) for key, value in like.items()}

    def _place(self, rank: int) -> slice:
        return slice(self.first(rank), self.first(rank) + self.counts[rank])

    def _own_log(self, log: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """A rank's warnings: those of games that it has the first of."""
        place = self._place(rank)
        found = {}
        for key, entry in log.items():
            name, _, games = key.partition(_OF)
            first, last = map(int, games.split()) if games else (0, self.total)
            if place.start <= first < place.stop:
                found[name if (first, last) == (place.start, place.stop) else key] = entry
        return found

    @staticmethod
    def _rows(parts: Sequence[Tensor], counts: Sequence[int]) -> bool:
        return all(
            # Bytes are a generator's state.
            part.dtype != torch.uint8 and part.ndim > 0 and len(part) == count and part.shape[1:] == parts[0].shape[1:]
            for part, count in zip(parts, counts, strict=True)
        )


def alone(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's state as one process has it, whoever wrote it."""
    if not _marked(run):
        return dict(run)
    shares = Shares(())
    return {**run, **{key: shares.part(run[key], None) for key in _DIVIDED if key in run}}


def moved(tree: Any, place: Callable[[Tensor], Tensor]) -> Any:
    """A tree of plain data with its tensors elsewhere."""
    if isinstance(tree, dict):
        return _as(tree, {key: moved(value, place) for key, value in tree.items()})
    if isinstance(tree, list | tuple):
        return type(tree)(moved(value, place) for value in tree)
    return place(tree.detach()) if isinstance(tree, Tensor) else tree


def _as(like: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A dict of the kind of another, which a tree's form tells apart."""
    return OrderedDict(found) if isinstance(like, OrderedDict) else found


def _marked(tree: Any) -> bool:
    """Whether ranks have left numbers of their own in it."""
    if isinstance(tree, dict):
        return set(tree) == {_RANKS} or any(map(_marked, tree.values()))
    return isinstance(tree, list | tuple) and any(map(_marked, tree))


def _widths(state: Mapping[str, Any]) -> list[int]:
    """The entries of each leaf of a follower's unknowns in one game; [] where this is no follower's state."""
    if "follower" not in state or "variables" not in state:
        return []
    unknowns = leaves((state["variables"], state.get("multipliers") or {}))
    return [leaf[0].numel() for leaf in unknowns]


def _alike(parts: Sequence[Any]) -> bool:
    return all(_same(parts[0], part) for part in parts[1:])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.shape, one.dtype) == (other.shape, other.dtype)
        return alike and torch.equal(one, other) if not one.is_floating_point() else alike and _same_bits(one, other)
    if type(one) is not type(other):
        return False
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _is_number(part: Any) -> bool:
    return isinstance(part, int | float) or (isinstance(part, Tensor) and part.ndim == 0)


def _largest(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values)).amax()
    return next((value for value in values if value != value), max(values))  # noqa: PLR0124 - NaN


def _form(part: Any) -> str:
    return f"{list(part.shape)} of {part.dtype}" if isinstance(part, Tensor) else f"{type(part).__name__}"
