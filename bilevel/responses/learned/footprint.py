"""What a learned response will take of the memory, said in bytes before it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from bilevel.errors import require_kinds
from bilevel.inner.torch_optim import OptimizerFactory, build
from bilevel.randomness import random_kept

_SIDE = 16
"""Each side of a parameter is cut to this many entries when an optimiser is asked what it remembers."""


@final
@dataclass(frozen=True)
class Memory:
    """How a learned response uses memory; the numbers are the same with any, and a run may go on with another.

    In place, a call fits in the tensors of the state that it is passed, and returns that very state. Earlier answers
    keep their values; to differentiate one after the next call raises torch's `RuntimeError`. A call that raises leaves
    in the state what was fitted until then, around the present leader, with counts, batches and generator as before the
    call; a loss of NaN is refused before it is written. `solve` then saves no checkpoint of an interrupted step: the
    file keeps the last one written. Where states are asked more than once a step (several followers, extragradient)
    `solve` raises `ValueError`.

    Args:
        in_place: saves the copies of w0, network and optimiser's memory that each call makes. By default a state never
            changes after it was returned.
        limit: bytes that fitting may take; above it `Hypernetwork.init` raises `MemoryError`, before it takes any. By
            default what is available then.

    Examples:
        >>> Memory(in_place=True).limit is None
        True
    """

    in_place: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        require_kinds(self)


@final
@dataclass(frozen=True)
class Footprint:
    """Bytes: of parameters, of their gradients, of the optimiser's memory, and of the copies that one call makes.

    Activations, the follower's own graph and what else the program holds are not in it.
    """

    parameters: int
    gradients: int
    optimizer: int
    copies: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.copies

    def __str__(self) -> str:
        """In words, with units."""
        parts = [
            f"{told(self.parameters)} of parameters",
            f"{told(self.gradients)} of gradients",
            f"{told(self.optimizer)} of the optimiser's memory",
            f"{told(self.copies)} of copies in a call",
        ]
        return f"{told(self.total)} ({', '.join(parts)})"


def footprint(factory: OptimizerFactory, parameters: Sequence[Tensor], *, in_place: bool) -> Footprint:
    """What fitting these parameters takes; their numbers are not touched, they may be on the meta device.

    The optimiser is asked by one step on small parameters in the same number of dimensions.
    """
    device = next((p.device for p in parameters if p.device.type != "meta"), torch.device("cpu"))
    small = [torch.zeros([min(side, _SIDE) for side in p.shape], dtype=p.dtype, device=device) for p in parameters]
    optimizer = build(factory, small)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("Hypernetwork steps its optimiser on draws of a loss; LBFGS searches along one. Use Adam.")
    for p in small:
        p.grad = torch.zeros_like(p)
    with random_kept():
        optimizer.step()
    size = remembered = 0
    for whole, p in zip(parameters, small, strict=True):
        slots = [slot for slot in optimizer.state.get(p, {}).values() if isinstance(slot, Tensor) and slot.ndim > 0]
        size += whole.numel() * whole.element_size()
        share = sum(slot.numel() * slot.element_size() for slot in slots) / max(p.numel(), 1)
        remembered += round(whole.numel() * share)
    return Footprint(size, size, remembered, 0 if in_place else size + remembered)


def require_room(
    factory: OptimizerFactory, shapes: Sequence[torch.Size], w0: Sequence[Tensor], memory: Memory, about: str
) -> None:
    """Raise `MemoryError` when fitting w0 and a network's parameters would take more than there is, before it does.

    `about` says which network, from what to what.
    """
    parameters = [torch.empty(shape, dtype=w0[0].dtype, device="meta") for shape in shapes]
    needed = footprint(factory, [*w0, *parameters], in_place=memory.in_place)
    limit = available(w0[0].device) if memory.limit is None else memory.limit
    if limit is not None and needed.total > limit:
        allowed = "available are" if memory.limit is None else "memory's limit is"
        raise MemoryError(
            f"Hypernetwork: {about} has {sum(p.numel() for p in parameters):,} parameters; with w0 its fit takes "
            f"{needed}; {allowed} {told(limit)}. Use a network that knows the layers: RowScaled(), RowColumnScaled() "
            "or LowRankLayers(rank), or one with fewer numbers, LowRank(rank); memory=Memory(in_place=True) saves the "
            "copies, and Memory(limit=...), in bytes, allows more."
        )


def available(device: torch.device) -> int | None:
    """Bytes that can still be had there; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_kilobytes(line) for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")  # a container's own limit, when it has one
    limit, used = _lines(group / "memory.max"), _lines(group / "memory.current")
    if limit and used and limit[0].isdigit():
        files = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith("inactive_file ")]
        free.append(int(limit[0]) - int(used[0]) + sum(files))  # cached files give way
    return min(free) if free else None


def told(size: int) -> str:
    """Bytes for a person: 1.6 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not this system's
        return []


def _kilobytes(line: str) -> int:
    return int(line.split()[1]) * 1024
