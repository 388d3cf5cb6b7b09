"""What steps and states take in memory, and how many segments fit a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bilevel.errors import BilevelError
from bilevel.sharding.tensor import storage_of


@dataclass(frozen=True)
class Sizes:
    """Bytes of one step's graph, of one state between steps, and of one step's batch where it is a copy of its own."""

    graph: int
    state: int
    batch: int


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages behind some tensors, each counted once."""
    return sum({storage_of(t).data_ptr(): storage_of(t).nbytes() for t in tensors}.values())


@contextmanager
def measured_graph(known: Sequence[Tensor]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """The storages that autograd saves while it is entered, by address, but for those behind `known`."""
    before = {storage_of(t).data_ptr() for t in known}
    # They are kept, so that none is freed and its address given to another while counting goes on.
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage.data_ptr() not in before:
            found[storage.data_ptr()] = storage
        return tensor.detach()  # the tensor itself would hold its own graph in a cycle

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def lengths(steps: int, count: int, ratio: float) -> list[int]:
    """`steps` in `count` segments of at least one, each longer than the next by `ratio`, state over graph.

    When backward is in segment i, i states are still held: this way every segment peaks at the same height.
    """
    last = steps / count - ratio * (count - 1) / 2
    if last < 1.0:  # there are not so many steps: the least slope that leaves one to the last
        ratio = 0.0 if count == 1 else 2.0 * (steps / count - 1.0) / (count - 1)
        last = steps / count - ratio * (count - 1) / 2
    ends, reached = [], 0.0
    for index in range(count):
        reached += last + ratio * (count - 1 - index)
        ends.append(round(reached))
    ends[-1] = steps
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def peak(segments: Sequence[int], sizes: Sizes) -> int:
    """The bytes at the worst moment: the states held, a segment's graphs, and what goes back through them."""
    held = max((i + 4) * sizes.state + (length + 1) * sizes.graph for i, length in enumerate(segments))
    return held + sum(segments) * sizes.batch


def plan(steps: int, sizes: Sizes, count: int | None, memory: int | None) -> list[int]:
    """The segments' lengths: `count` of them, or the fewest that fit `memory`, or those that need the least.

    Raises `BilevelError` when none fit.
    """
    ratio = sizes.state / sizes.graph
    if count is not None:
        return lengths(steps, min(count, steps), ratio)
    # K g / m + s m / 2 is least at m = sqrt(2 K g / s); whole steps round it a little downwards.
    most = max(1, min(steps, round(math.sqrt(2.0 * steps / ratio))))
    some = {max(1, round(most * share)) for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)}
    best = min((lengths(steps, m, ratio) for m in sorted(some)), key=lambda found: peak(found, sizes))
    if memory is None:
        return best
    found = _first(len(best), lambda m: peak(lengths(steps, m, ratio), sizes) <= memory)
    if found is None:
        raise BilevelError(
            f"Segments(memory={memory:,}): {steps} steps need {peak(best, sizes):,} bytes at the least, in {len(best)} "
            f"segments: a step's graph has {sizes.graph:,}, a state {sizes.state:,}, a kept batch {sizes.batch:,}. "
            "Give it that much, differentiate fewer steps by Unrolled(backprop_steps=...), or use ForwardMode(), whose "
            "memory does not grow with the steps, for a few leader's entries."
        )
    return lengths(steps, found, ratio)


def _first(last: int, fits: Callable[[int], bool]) -> int | None:
    """The least number in 1..last that fits, when more always fit better; None when none does."""
    if not fits(last):
        return None
    low, high = 1, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def offloading(here: Sequence[Tensor]) -> saved_tensors_hooks:
    """Keeps what is saved while it is entered in the CPU's memory, but for the storages behind `here`."""
    stays = {storage_of(t).data_ptr() for t in here}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if storage_of(tensor).data_ptr() in stays:
            return tensor.device, tensor.detach()
        return tensor.device, tensor.detach().to("cpu", copy=True)

    return saved_tensors_hooks(pack, lambda packed: packed[1].to(packed[0]))
