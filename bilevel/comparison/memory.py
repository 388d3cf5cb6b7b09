"""The peak memory of a computation, counted and not sampled: the same number every time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors made by `work` held at one time; what lived before it does not count.

    On the CPU every storage is counted from the operation that makes it to its last reference, autograd's saved tensors
    among them; what an operation uses inside itself and what NumPy or SciPy allocate is not seen. On CUDA it is the
    allocator's own peak. Costs some ten microseconds an operation, so time `work` in another pass.

    >>> peak_bytes(lambda: torch.zeros(10, dtype=torch.float64) + 1, torch.device("cpu"))
    160
    """
    gc.collect()  # cycles of what came before would die in the middle, and make the count depend on them
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Live() as live:
        work()
    return int(live.peak)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs)):
            self._see(tensor, counted=False)  # it was there before, or is counted already
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            self._see(tensor, counted=True)
        return result

    def _see(self, tensor: object, *, counted: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counted else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.ref(storage, partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: object) -> None:
        self.now -= size
        self._seen.pop(key, None)
