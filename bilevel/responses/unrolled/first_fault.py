"""Which of a follower's steps first met a loss or a gradient that is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active


class FirstFault:
    """The first step with such a number; as long as there is none, the last step.

    On the CPU a step's numbers are at hand. A GPU would be waited for in each step, and a transform hides them: there
    the choice is made by tensors, and read in the end.
    """

    def __init__(self, device: torch.device) -> None:
        self.at_hand = device.type == "cpu" and not transforms_active()
        self._seen = 0
        self._numbers: tuple[float, float, float] | None = None
        self._tensors: Tensor | None = None

    def see(self, losses: Sequence[Tensor], sizes: Sequence[Tensor]) -> None:
        """The losses of one more step, and the sizes of its gradient: finite where that is."""
        step, self._seen = self._seen, self._seen + 1
        if self.at_hand:
            if self._numbers is None or all(map(math.isfinite, self._numbers)):
                reached = [float(size) for size in sizes]
                largest = max(reached) if all(map(math.isfinite, reached)) else math.nan
                self._numbers = (float(step), sum(float(loss.detach()) for loss in losses), largest)
            return
        loss, size = torch.stack([loss.detach().to(sizes[0]) for loss in losses]).sum(), torch.stack(list(sizes)).max()
        here, before = torch.stack([torch.full_like(size, step), loss, size]), self._tensors
        self._tensors = here if before is None else torch.where(before.isfinite().all(), here, before)

    def found(self) -> tuple[int, float, float] | None:
        """The step, its loss and its gradient's largest entry; None where all were finite."""
        if self._tensors is not None and not concrete(self._tensors.abs().max()) < math.inf:
            step, loss, size = (concrete(entry) for entry in self._tensors)
            return int(step), loss, size
        if self._numbers is not None and not all(map(math.isfinite, self._numbers)):
            step, loss, size = self._numbers
            return int(step), loss, size
        return None
