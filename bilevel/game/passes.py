"""One pass after another over data, each with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader

from bilevel.game.own_state import Generating, Kept, OwnState, generators_in, keepers
from bilevel.game.persistent import PersistentLoader
from bilevel.randomness import global_generators

Source = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches: an iterable that can be iterated again and again, or a function that makes one for each pass."""

Place = tuple[int, int, int]
"""Seed, pass and batch."""


class _End:
    """Comes where a pass ends."""


END: Final = _End()


class Reader:
    """Reads pass after pass of one source: batch number i of pass e is a function of (seed, e, i).

    A pass begins with the generators seeded from (seed, e): PyTorch's global ones, and those of a DataLoader and its
    samplers, and those of any library that the data hold. While batches are made these generators are in the pass's own
    state, and otherwise in everybody else's, so that data may draw random numbers batch by batch. Whoever has
    `set_epoch` is told the pass. What samplers and iterable data keep in themselves besides goes on from pass to pass,
    each reader's by itself; what it was at the beginning of a pass is `kept`.

    Lets go of workers and files when nobody refers to it any more.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self._source = source
        self._passes: Source | PersistentLoader = source
        if isinstance(source, DataLoader) and source.persistent_workers:
            self._passes = PersistentLoader(source)
        self._parts = _parts(source)
        own = [part.generator for part in self._parts if isinstance(part, _Generating)]
        torchs = [*global_generators(device), *(g for g in own if isinstance(g, torch.Generator))]
        found: list[Generating] = [*torchs, *generators_in(self._parts)]
        self._generators = list({id(generator): generator for generator in found}.values())
        self._states: list[Any] = []
        self._own, self._begun = OwnState(keepers(source, self._parts)), False
        self.kept: Kept = {}
        """What the data kept in themselves as the present pass began, where it was not as at first."""
        self.iterator: Iterator[Any] = iter(())
        self.place: Place = (0, 0, 0)

    @property
    def resumes(self) -> bool:
        """Whether one iterator object serves all passes."""
        return isinstance(self._passes, PersistentLoader)

    def begin(self, seed: int, epoch: int, kept: Kept) -> None:
        """Begin a pass; `kept` counts for the first one."""
        if not self._begun:
            self._own.begin(kept)
        self._own.enter()
        self._begun, self.kept = True, self._own.kept()
        for part in self._parts:
            if isinstance(part, _Counting):
                part.set_epoch(epoch)
        with self._own_numbers(seed=(seed * 1_000_003 + epoch) % 2**63):
            self.iterator = iter(self._passes if isinstance(self._passes, Iterable) else self._passes())
        self.place = (seed, epoch, 0)

    def read(self) -> Any:
        """The batch at its place, after which it moves on; `END` where there is none."""
        with self._own_numbers():
            batch = next(self.iterator, END)
        if batch is not END:
            seed, epoch, index = self.place
            self.place = (seed, epoch, index + 1)
        return batch

    @contextmanager
    def _own_numbers(self, *, seed: int | None = None) -> Iterator[None]:
        """The pass's random state inside, everybody else's outside."""
        outside = [generator.get_state() for generator in self._generators]
        self._own.enter()
        try:
            if seed is None:
                for generator, state in zip(self._generators, self._states, strict=True):
                    generator.set_state(state)
            else:
                for generator in self._generators:
                    generator.manual_seed(seed)
            yield
        finally:
            self._own.leave()
            self._states = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, outside, strict=True):
                generator.set_state(state)


@runtime_checkable
class _Counting(Protocol):
    """Who orders each pass by its number, as a DistributedSampler does."""

    def set_epoch(self, epoch: int, /) -> object: ...


@runtime_checkable
class _Generating(Protocol):
    """Who may draw from a generator of its own, as a RandomSampler does."""

    generator: torch.Generator | None


@runtime_checkable
class _Sampling(Protocol):
    """Who takes what another sampler gives, as a BatchSampler does."""

    sampler: Iterable[Any]


def _parts(source: Source) -> list[object]:
    """The source, and of a DataLoader what decides on its order."""
    parts: list[object] = [source]
    if isinstance(source, DataLoader):
        within = source.batch_sampler
        parts += [source.dataset, source.sampler, within]
        parts += [within.sampler] if isinstance(within, _Sampling) else []
    return list({id(part): part for part in parts}.values())
