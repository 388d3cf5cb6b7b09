"""Reverse mode that keeps a few of the steps' states and takes the steps between them again in backward."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import transforms_active
from bilevel.errors import BilevelError, require_kinds
from bilevel.responses.unrolled.differentiation import Differentiation, Followed, Point, ReverseMode, Steps
from bilevel.responses.unrolled.memory_plan import offloading, plan
from bilevel.responses.unrolled.segment import PointForm, Record, Segment, tried


@final
@dataclass(frozen=True)
class Segments(Differentiation):
    r"""Reverse mode with checkpoints: only the states between segments are kept, and a segment's graph is made anew
    when backward comes to it.

        memory = m states + one segment's graphs,    about sqrt(2 K graph state) at its least, in place of K graphs

    `count` is m, the number of segments (fewer when there are fewer steps); `memory` is a budget in bytes, which the
    fewest segments that fit it are chosen for, from the sizes of the first step's graph and of a state, measured in
    each call; with neither, as many as need the least memory. Earlier segments are longer, since fewer states are
    held when backward reaches them; the last one is not taken again. `offload=True` keeps the states of a game on a
    GPU in the CPU's memory; for a game on the CPU it changes nothing.

    The hypergradient is `ReverseMode`'s up to the order of its sums: steps are taken again on the same batches (which
    are kept: a list of batches costs nothing, a loader that makes new ones costs its steps' batches), from the same
    random numbers, buffers and optimiser memory, without warning a second time; that they end where they ended is
    checked. Costs up to one more gradient a step, counted in the state when the call is made, about a third more time.
    A derivative of the hypergradient (`create_graph=True`) is right too, but holds every graph, as `ReverseMode` does.
    Inside a `torch.func` transform every step is stored, and `memory` is refused.

    Raises `BilevelError` when the best segmentation does not fit `memory`, with the numbers, and in backward when the
    steps taken again end elsewhere: something outside the game changed in between, a module's train()/eval() for
    example. Raises `CapturedTensorError` for a tensor that requires grad and enters after the first step (those of the
    first step get their gradient). On a GPU, kernels that are not deterministic differ by rounding, which long segments
    may magnify until the check refuses them: take more of them.
    Source: Chen et al. 2016 (arXiv 1604.06174); Shaban et al. 2019 (arXiv 1810.10667).

    >>> Segments(memory=500_000_000).count is None
    True
    """

    count: int | None = None
    memory: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.count is not None and self.count < 1:
            raise ValueError(f"Segments: count={self.count}; expected at least 1, or None.")
        if self.memory is not None and not isinstance(self.memory, int | float):
            raise TypeError(f"Segments: memory={self.memory!r}; expected a number of bytes, as 500e6, or None.")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"Segments: memory={self.memory}; expected a number of bytes, or None.")
        if self.count is not None and self.memory is not None:
            raise ValueError(
                f"Segments: count={self.count} and memory={self.memory}; expected one of them: the count is chosen to "
                "fit the memory."
            )

    def follow(self, steps: Steps, start: Point, count: int) -> Followed:
        """Where the steps lead; all segments but the last are attached by a node that takes them again."""
        if transforms_active() and self.memory is not None:
            raise BilevelError(
                f"Segments(memory={self.memory}): inside a torch.func transform every step is stored. Use plain "
                "autograd, or ReverseMode() if there is memory enough."
            )
        if transforms_active() or self.count == 1:
            return ReverseMode().follow(steps, start, count)
        captured, sizes = tried(steps, start)
        lengths = plan(count, sizes, self.count, self.memory)
        point = start
        for length in lengths[:-1]:
            point = _attached(steps, point, length, captured, self.offload)
        end = steps.stored(point, lengths[-1])
        if not any(leaf.requires_grad for leaf in end.y):
            return Followed(end, steps.batches, 0)
        return Followed(end, steps.batches * (1 + count - lengths[-1]), steps.batches * count)


def _attached(steps: Steps, start: Point, length: int, captured: list[Tensor], offload: bool) -> Point:
    """Where `length` steps lead, attached by a node that takes them again."""
    follower = steps.follower
    segment, tensors = Segment.starting(steps, start, captured)
    reached = steps.alone(start, length, lambda: segment.records.append(Record.now(follower)))
    end, ends = PointForm.of(reached)
    xs = follower.xs
    away = offload and follower.game.device.type != "cpu"
    with offloading([*xs, *captured]) if away else nullcontext():
        moving = _Recompute.apply(segment, len(ends), *ends, *tensors, *xs, *captured)  # type: ignore[no-untyped-call]
    return end.point(moving)[0]


class _Recompute(torch.autograd.Function):
    """Hands the end of a segment on, and takes its steps again in backward."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.segment, ctx.count = segment, count
        ctx.set_materialize_grads(False)
        ends = tuple(tensor.clone() for tensor in tensors[:count])
        # The end as well: steps taken again are held against it. It is the next segment's start, and costs nothing.
        ctx.save_for_backward(*tensors[count:], *ends)
        return ends

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        count, segment = ctx.count, ctx.segment
        inputs, ends = ctx.saved_tensors[:-count], ctx.saved_tensors[-count:]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2 + count :]) if needed]
        slopes = segment.pulled(inputs, ends, wanted, cotangents)
        result: list[Tensor | None] = [None] * len(inputs)
        for index, slope in zip(wanted, slopes, strict=True):
            result[index] = slope
        return (None, None, *([None] * count), *result)
