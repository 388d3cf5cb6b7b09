"""The records of a run's steps, and the names under which they tell each number."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.tree import Variables

Record = dict[str, float]
"""What is told of one step: a loss for each player, each follower's stationarity, the run's own counts and times."""

Observe = Callable[[Mapping[str, Variables]], Mapping[str, float]]
"""From everybody's variables to further numbers of a record."""

RUN_KEYS = ("step", "gradient_norm", "gradients", "products", "seconds", "work")
"""A record's own keys; no player's loss stands under one of them."""


def loss_key(player: str) -> str:
    """Where a record holds a player's loss: under its name, or `name.loss` where the name is one of the run's keys."""
    return f"{player}.loss" if player in RUN_KEYS else player


def summary(name: str, value: Any) -> Record:
    """What a record tells of a number: itself; of many games' `[count]` the median, and the largest as `name.worst`."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return {name: float(value)}
    return {name: float(value.median()), f"{name}.worst": float(value.max())}


def refuse_ambiguous(
    players: Iterable[str], followers: Iterable[str], endings: Iterable[str] = ("",), constrained: Iterable[str] = ()
) -> None:
    """Raise `ValueError` when two numbers of a record would have one key: of players `y` and `y.stationarity`, say."""
    keys = [*RUN_KEYS, *map(loss_key, players), *(f"{name}.stationarity" for name in followers)]
    keys += [f"{name}.violation" for name in constrained]
    keys = [f"{key}{ending}" for ending in endings for key in keys]
    twice = sorted(key for key, count in Counter(keys).items() if count > 1)
    if twice:
        raise ValueError(f"solve: the records would hold two numbers under {twice[0]!r}. Rename the player.")


class History:
    """Records in columns: eight bytes a number in memory and in a checkpoint."""

    def __init__(self, saved: Sequence[dict[str, Any]] = ()) -> None:
        self._blocks = [
            _Block(tuple(block["names"]), tuple(block["whole"]), array("d", block["rows"].reshape(-1).tolist()))
            for block in saved
        ]

    def append(self, record: Record) -> None:
        """One more."""
        names, whole = tuple(record), tuple(isinstance(number, int) for number in record.values())
        if not self._blocks or (self._blocks[-1].names, self._blocks[-1].whole) != (names, whole):
            self._blocks.append(_Block(names, whole, array("d")))
        self._blocks[-1].numbers.extend(record.values())

    @property
    def last(self) -> Record:
        """The last one."""
        return self._blocks[-1].last()

    def records(self) -> list[Record]:
        """All of them, in order."""
        return [record for block in self._blocks for record in block.records()]

    def state(self) -> list[dict[str, Any]]:
        """All of it, as tensors and strings."""
        return [
            {"names": list(block.names), "whole": list(block.whole), "rows": block.rows()} for block in self._blocks
        ]


class _Block:
    """Records with the same names, row after row; `whole` says which numbers are integers."""

    def __init__(self, names: tuple[str, ...], whole: tuple[bool, ...], numbers: array[float]) -> None:
        self.names, self.whole, self.numbers = names, whole, numbers

    def rows(self) -> Tensor:
        """One row a record `[records, names]`."""
        return torch.frombuffer(self.numbers, dtype=torch.float64).clone().reshape(-1, len(self.names))

    def last(self) -> Record:
        """The last of them, as a dict."""
        row = self.numbers[-len(self.names) :]
        return {n: (int if whole else float)(v) for n, whole, v in zip(self.names, self.whole, row, strict=True)}

    def records(self) -> list[Record]:
        """As dicts."""
        kinds = [int if whole else float for whole in self.whole]
        rows = zip(*[iter(self.numbers)] * len(self.names), strict=True)
        return [{n: kind(v) for n, kind, v in zip(self.names, kinds, row, strict=True)} for row in rows]
