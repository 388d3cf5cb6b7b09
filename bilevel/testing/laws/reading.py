"""Laws of reading: each loss sees its batches in order, and nothing is read that nobody sees."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bilevel.game import Game, Player
from bilevel.responses import Response
from bilevel.solving import solve
from bilevel.testing.families import Quadratic
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.base import Law
from bilevel.testing.laws.short_runs import few_steps, quiet, sgd
from bilevel.testing.subject import NotOffered, Subject

_AHEAD = 2
"""How many batches a worker prepares before they are asked for: a DataLoader's own default."""


class _Rows(Dataset[Any]):
    """Numbered rows, which count how often each is read, in whichever process."""

    def __init__(self, length: int) -> None:
        self.reads = torch.zeros(length, dtype=torch.int64)
        self.reads.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self.reads.numel()

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        self.reads[index] += 1
        return index, torch.tensor(0.125 * (index % 5), dtype=torch.float64)


def _only_one(batch: Sequence[Any]) -> Any:
    return batch[0]


def _firsts(seen: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(seen))


def _turns(seen: Sequence[int]) -> int:
    """How often another batch follows."""
    return sum(one != other for one, other in zip(seen, [None, *seen], strict=False))


class _Shown:
    """A game whose two losses share one loader, and which batches each of them has seen."""

    def __init__(self, known: KnownGame, loader: DataLoader[Any]) -> None:
        self.seen: dict[str, list[int]] = {"x": [], "y": []}

        def leader(x: Tensor, y: Tensor, batch: tuple[int, Tensor]) -> Tensor:
            self.seen["x"].append(int(batch[0]))
            return known.leader(x, y) + batch[1] * y.sum()

        def follower(x: Tensor, y: Tensor, batch: tuple[int, Tensor]) -> Tensor:
            self.seen["y"].append(int(batch[0]))
            return known.follower(x, y) + batch[1] * y.sum()

        # Each has a place of its own in the one loader.
        self.game = Game(x=Player(leader, known.x0, loader), y=Player(follower, known.y0, loader))

    def run(self, response: Response, steps: int) -> int:
        """How many batches the losses are shown in a run from the start."""
        for numbers in self.seen.values():
            numbers.clear()
        with quiet():
            solve(self.game, y=response, optimizer=sgd, steps=steps)
        return sum(_turns(numbers) for numbers in self.seen.values())


def batches_in_order(subject: Subject, known: KnownGame) -> None:
    """A run shows each loss its batches in order, from the first one on, and reads none that it does not show."""
    response, rows = few_steps(subject), _Rows(64)
    shown = _Shown(known, DataLoader(rows, batch_size=1, collate_fn=_only_one))
    for run in ("a run", "a second run of the same game"):
        rows.reads.zero_()
        count = shown.run(response, 4)
        for name, numbers in shown.seen.items():
            first = _firsts(numbers)
            assert first == list(range(len(first))), f"{run} shows {name!r} the batches {first}; expected 0, 1, 2, ..."
        reads = int(rows.reads.sum())
        # Each of the two may have read one more, which nobody has asked for yet.
        assert reads <= count + 2, f"{run} reads {reads} batches to show {count}"


def every_example_in_a_pass(subject: Subject, known: KnownGame) -> None:
    """Two players who share a loader with persistent workers see every example once in a pass, each for himself."""
    if sys.platform != "linux":
        raise NotOffered("Workers are started by fork here, which Linux alone does safely.")
    response, rows = few_steps(subject), _Rows(5)
    loader = DataLoader(
        rows,
        batch_size=1,
        collate_fn=_only_one,
        num_workers=1,
        prefetch_factor=_AHEAD,
        persistent_workers=True,
        multiprocessing_context="fork",  # another start would import the user's program anew
    )
    shown = _Shown(known, loader)
    for run in ("a run", "a second run of the same game"):
        rows.reads.zero_()
        count = shown.run(response, len(rows))
        for name, numbers in shown.seen.items():
            first = _firsts(numbers)
            assert first == list(range(len(rows))), (
                f"in {run} of {len(rows)} steps {name!r} sees the examples {first} of a loader with persistent "
                f"workers that the other player reads too; expected each of {len(rows)}, in order"
            )
        # A worker of each is ahead, once where the last run ended or the game was made, and once where this one ends.
        most, reads = count + 2 * 2 * _AHEAD, int(rows.reads.sum())
        assert reads <= most, f"{run} reads {reads} examples to show {count}, with workers that are {_AHEAD} ahead"


def _known() -> st.SearchStrategy[KnownGame]:
    return st.just(Quadratic(curvatures=(1.0, 0.5), coupling=((1.0,), (0.5,)), at=(0.5,), target=(1.0, -1.0)))


READING = (
    Law("batches", "in order, and read once", _known, batches_in_order, 0.1),
    Law("workers", "persistent ones give each reader every example", _known, every_example_in_a_pass, 0.1),
)
