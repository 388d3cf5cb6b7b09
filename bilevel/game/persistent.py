"""A DataLoader's persistent workers, which begin every pass as new workers would."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, MapDataPipe, get_worker_info

from bilevel.game.own_state import OwnState, generators_in, keepers


@final
class PersistentLoader:
    """The passes of a loader with `persistent_workers=True`, each a function of the random state that it begins in.

    PyTorch goes on with the workers' random numbers from pass to pass, and draws fewer of the main process's in a later
    pass than in the first one. A pass would then depend on those before it, and on nothing that a position holds. Here
    the workers are seeded anew in each pass, and both kinds of pass draw the same.

    The workers are its own: whoever iterates the user's loader meanwhile resets other ones. They stop when this object
    goes. What a `worker_init_fn` does is done once, and not in each pass.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        # How many passes before this one, the seed of its workers, and that of generators that the data hold.
        self._begun = torch.zeros(3, dtype=torch.int64)
        self._begun.share_memory_()  # type: ignore[no-untyped-call]
        self._running = False
        self._loader = copy.copy(loader)
        # Not by setattr: a DataLoader refuses another data set, lest its sampler belong to the first.
        own: dict[str, Any] = {"_iterator": None}
        if isinstance(loader.dataset, IterDataPipe | MapDataPipe):
            own["persistent_workers"] = False  # they are seeded by another way, which is closed to a wrapper
        else:
            own["dataset"] = _Seeded(loader.dataset, self._begun)
            own["worker_init_fn"] = _Unwrapping(loader.worker_init_fn)
        vars(self._loader).update(own)

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        if self._running and loader.persistent_workers:
            # What a new iterator does: it begins its sampler, draws the workers' seed, and begins the sampler again.
            iter(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
            seed = int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator))
            # The pass's own seed, as the reader of these passes has just begun with it.
            self._begun.copy_(torch.tensor([int(self._begun[0]) + 1, seed, torch.initial_seed() % 2**63]))
        self._running = True
        return iter(loader)


class _Seeded:
    """A data set in a worker, which seeds the worker where a pass begins that is not its first."""

    def __init__(self, dataset: Any, begun: Tensor) -> None:
        self.dataset, self._begun, self._seen = dataset, begun, 0
        self._own: OwnState | None = None

    def _now(self) -> Any:
        if self._own is None:
            iterable = isinstance(self.dataset, IterableDataset)
            self._own = OwnState(keepers(self.dataset, [self.dataset]) if iterable else [])
            self._own.begin({})
        number, seed, own = self._begun.tolist()
        if number != self._seen:
            self._seen = number
            _seed_worker(seed)
            self._own.leave()
            self._own.begin({})  # as in a new worker, which gets the main process's
            for generator in generators_in([self.dataset]):
                generator.manual_seed(own)
        return self.dataset

    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        dataset = self._now()
        together = getattr(dataset, "__getitems__", None)  # PyTorch's own optional protocol
        return together(indices) if together else [dataset[index] for index in indices]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class _Unwrapping:
    """Begins a worker, to whose user the data set is the one that the user gave."""

    own: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, _Seeded):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it refuses plain assignment
        if self.own is not None:
            self.own(worker)


def _seed_worker(seed: int) -> None:
    """What PyTorch does in a new worker."""
    from torch.utils.data._utils.worker import _generate_state  # noqa: PLC0415 - private: only here, in a worker

    info = get_worker_info()
    if info is not None:
        random.seed(seed + info.id)
        torch.manual_seed(seed + info.id)
        np.random.seed(_generate_state(seed, info.id))  # type: ignore[no-untyped-call]  # noqa: NPY002
