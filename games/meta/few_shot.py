"""Five-way one-shot tasks from digits that ship in a package: a class is a digit turned by a quarter of a circle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from games.experiments.data import DigitSource

Batch = dict[str, Any]

HELD_OUT = (3, 4, 7)
"""The digits whose classes no training task shows."""
WAYS, SIDE = 5, 14


@final
@dataclass(frozen=True, eq=False)
class FewShot:
    """Batches of tasks to tell five classes apart, which are labelled anew in each task; drawn by torch's numbers.

    Args:
        classes: The images of each class `[n, pixels]`.
        queries: Images of each class that judge; one is shown.
        tasks: In a batch.
        batches: In a pass.
    """

    classes: tuple[Tensor, ...]
    queries: int
    tasks: int
    batches: int = 1000

    def __iter__(self) -> Iterator[Batch]:
        return (self.drawn() for _ in range(self.batches))

    def drawn(self, generator: torch.Generator | None = None) -> Batch:
        """A batch: images `[tasks, examples, pixels]` and labels `[tasks, examples]`."""
        images = torch.stack([self._task(generator) for _ in range(self.tasks)])  # [tasks, ways, 1 + queries, pixels]
        labels = torch.arange(WAYS)[:, None].expand(WAYS, 1 + self.queries)
        return {
            part: (images[:, :, rows].flatten(1, 2), labels[:, rows].flatten().expand(self.tasks, -1))
            for part, rows in (("support", slice(1)), ("query", slice(1, None)))
        }

    def _task(self, generator: torch.Generator | None) -> Tensor:
        # The order of the classes is their labels.
        chosen = torch.randperm(len(self.classes), generator=generator)[:WAYS].tolist()
        found = []
        for index in chosen:
            images = self.classes[index]
            found.append(images[torch.randperm(len(images), generator=generator)[: 1 + self.queries]])
        return torch.stack(found)


def classes(source: DigitSource) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The images of 28 classes to learn from, and of the 12 that are held out, at 14 x 14 pixels."""
    split = source.digits(train=3000, valid=1000, test=1000).train
    rows, columns = 28, 28
    small = avg_pool2d(split.images.reshape(-1, 1, rows, columns), rows // SIDE)[:, 0]
    learned: list[Tensor] = []
    held_out: list[Tensor] = []
    for digit in range(10):
        for quarter in range(4):
            turned = torch.rot90(small[split.labels == digit], quarter, (1, 2)).flatten(1)
            (held_out if digit in HELD_OUT else learned).append(turned)
    return tuple(learned), tuple(held_out)


def network(seed: int) -> nn.Module:
    """196-64-64-5 with ReLUs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(SIDE**2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, WAYS)
        return nn.Sequential(*layers)
