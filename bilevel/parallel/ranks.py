"""The processes that play one game, and what they say to each other."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from bilevel.errors import ParallelError
from bilevel.game.shards import gathered

Kind = TypeVar("Kind")

_KEY = "bilevel.failed"


class Ranks:
    """The ranks of a process group of the game's own; `size` is 1 where there is one process.

    `bytes` and `reductions` count what the derivatives have sent so far: the payload of each all-reduce, in which every
    rank sends and receives about twice as much whatever their number. `read` is a fingerprint of the batches that this
    rank has read whole.
    """

    def __init__(self, device: torch.device, timeout: float) -> None:
        self.rank, self.size, self.timeout, self._device = 0, 1, timeout, device
        self.bytes = self.reductions = 0
        self.read = 0
        self._group: Any = None
        self._ended = False
        within = timedelta(seconds=timeout)
        started = distributed.is_available() and distributed.is_initialized()
        if not started and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun started it
            self._guarded(lambda: _meet(within))
            started = True
        if started and distributed.get_world_size() > 1:
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            # Of its own: its time limit holds, and what else the program reduces does not get in between.
            self._group = self._guarded(lambda: distributed.new_group(timeout=within))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    # Numbers ---------------------------------------------------------------------------------------------------------

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor with the same bits on each; half precision is summed in float32."""
        if torch._C._functorch.is_legacy_batchedtensor(tensor):
            raise RuntimeError("Tensors that is_grads_batched=True batches cannot be reduced over ranks.")
        if self.size == 1:
            return tensor.clone()
        half = tensor.is_floating_point() and tensor.element_size() < 4
        # Detached: PyTorch's collectives refuse what requires grad.
        found = tensor.detach().to(torch.float32 if half else tensor.dtype, copy=True).contiguous()
        self._guarded(lambda: distributed.all_reduce(found, group=self._group))
        self.bytes += found.nbytes
        self.reductions += 1
        return found.to(tensor.dtype)

    def greatest(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks of each number of a tensor."""
        found = tensor.detach().clone().contiguous()
        if self.size > 1:
            self._guarded(lambda: distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._group))
        return found

    def parts(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every rank's vector, of these lengths."""
        if self.size == 1:
            return [tensor]

        def gather(found: list[Tensor], own: Tensor) -> None:
            self._guarded(lambda: distributed.all_gather(found, own, group=self._group))
            self.bytes += own.nbytes * self.size
            self.reductions += 1

        return gathered(tensor, sizes, gather)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(list(numbers), device=self._device)
        self._guarded(lambda: distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._group))
        return [int(number) for number in found.tolist()]

    def rows(self, numbers: Sequence[int]) -> list[list[int]]:
        """Each rank's row of as many whole numbers below 2**63."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(list(numbers), dtype=torch.int64, device=self._device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._guarded(lambda: distributed.all_gather(found, own, group=self._group))
        return [row.tolist() for row in found]

    # Words -----------------------------------------------------------------------------------------------------------

    def everybodys(self, content: Kind) -> list[Kind]:
        """Each rank's plain content, in the order of the ranks."""
        if self.size == 1:
            return [content]
        data = pickle.dumps(content)
        sizes = [row[0] for row in self.rows([len(data)])]
        own = torch.zeros(max(sizes), dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        own = own.to(self._device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self._guarded(lambda: distributed.all_gather(parts, own, group=self._group))
        return [pickle.loads(part[:size].cpu().numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def together(self, function: Callable[[], Kind]) -> Kind:
        """What a function gives here, if it raises on no rank.

        Raises what it raised here, and `ParallelError` with what it raised elsewhere.
        """
        failed: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as error:
            failed = error
        told = self.everybodys(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None:
            raise failed
        for rank, text in enumerate(told):
            if text is not None:
                raise ParallelError(f"Rank {rank} of {self.size} refused what the others accept. {text}")
        return result  # type: ignore[no-any-return]

    def from_first(self, function: Callable[[], bytes | None]) -> bytes | None:
        """What a function gives on the first rank, everywhere."""
        found = self.together(function if self.first else lambda: None)
        if self.size == 1:
            return found
        (length,) = self.rows([-1 if found is None else len(found)])[0]
        if length < 0:
            return None
        data = torch.empty(length, dtype=torch.uint8)
        if found is not None:
            data = torch.frombuffer(bytearray(found), dtype=torch.uint8)
        data = data.to(self._device)
        self._guarded(lambda: distributed.broadcast(data, 0, group=self._group))
        return data.cpu().numpy().tobytes()

    # The end ---------------------------------------------------------------------------------------------------------

    def leave(self, error: BaseException | None = None) -> None:
        """Take no part any more; with an error the others, who wait, are told of it at once."""
        if self._group is None or self._ended:
            return
        self._ended = True
        if error is not None and not isinstance(error, ParallelError):
            told = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self._stored(lambda store: store.set(f"{_KEY}.{self.rank}", told))
        group, self._group = self._group, None  # its connections close, and the others hear of it, when nobody has it
        try:
            distributed.destroy_process_group(group)
        except (RuntimeError, ValueError, AssertionError):
            return  # the program has ended the whole of it already

    def _guarded(self, function: Callable[[], Kind]) -> Kind:
        if self._ended:
            raise ParallelError("DataParallel: the run has ended, and its ranks reduce nothing any more. Make it anew.")
        try:
            return function()
        except RuntimeError as error:
            self._ended = True
            raise ParallelError(self._told(error)) from error

    def _told(self, error: RuntimeError) -> str:
        others = [rank for rank in range(self.size) if rank != self.rank]
        failed = [f"Rank {rank} raised {text}" for rank in others if (text := self._said(rank))]
        torch_says = " ".join(str(error).split())[:200]
        return (
            f"DataParallel: rank {self.rank} of {self.size} waited for the others, and they did not all come within "
            f"{self.timeout:g} s: one has ended, hangs, or does something else. {'. '.join(failed) or ''}"
            f"{'. ' if failed else ''}Resume from the checkpoint, as torchrun --max-restarts does; a step that takes "
            f"longer needs a larger timeout=. (PyTorch says: {torch_says})"
        )

    def _said(self, rank: int) -> str:
        """What a rank said when it left, if it did."""
        found = self._stored(lambda store: store.get(f"{_KEY}.{rank}") if store.check([f"{_KEY}.{rank}"]) else b"")
        return found.decode() if found else ""

    @staticmethod
    def _stored(function: Callable[[Any], Any]) -> Any:
        """Ask the store in which the ranks met; None where it is gone with the rank that held it."""
        try:
            # Private, and the one place that outlives a broken group; without it the message is shorter.
            return function(distributed.distributed_c10d._get_default_store())
        except Exception:
            return None


def _meet(within: timedelta) -> None:
    """The process group that torchrun's environment describes."""
    # Here, for a PyTorch without torch.distributed has none of them.
    from torch.distributed.distributed_c10d import PrefixStore  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # nodes count their restarts each for itself
        distributed.init_process_group(timeout=within)
        return
    # In the store that torchrun keeps through restarts, gloo finds the addresses of processes that have ended.
    store, rank, size = next(rendezvous("env://", timeout=within))
    apart = PrefixStore(f"bilevel.{restarts}", store)
    distributed.init_process_group(store=apart, rank=rank, world_size=size, timeout=within)
