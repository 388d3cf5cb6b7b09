"""PyTorch's global random numbers, taken, put back and kept apart, on the CPU and on the device in use.

Users' objectives (dropout, augmentation) draw from them. `torch.random.fork_rng` would touch every GPU of the machine
and `torch.manual_seed` every kind of device; these touch the two that matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def global_generators(device: torch.device = _CPU) -> list[torch.Generator]:
    """The global generators of the CPU and of `device`."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def random_state(device: torch.device = _CPU) -> dict[str, Tensor]:
    """The states of the global generators of the CPU and of `device`."""
    state = {"cpu": torch.random.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device = _CPU) -> None:
    """Put back what `random_state` took."""
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def random_kept(device: torch.device = _CPU, *, start: Mapping[str, Tensor] | int | None = None) -> Iterator[None]:
    """Leave the global generators afterwards as they were; begin at a state or a seed, if given."""
    before = random_state(device)
    try:
        if isinstance(start, int):
            for generator in global_generators(device):
                generator.manual_seed(start)
        elif start is not None:
            set_random_state(start, device)
        yield
    finally:
        set_random_state(before, device)
