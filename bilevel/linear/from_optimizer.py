"""Preconditioners that the follower's own optimiser has already paid for: what it remembers of the curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.errors import require_kinds
from bilevel.linear.operator import LinearOperator, Shapes
from bilevel.linear.preconditioner import Applied, Preconditioner, no_pairs, two_loops, with_pairs
from bilevel.linear.system import Memory

_MOMENTS = ("exp_avg_sq", "square_avg", "sum")  # Adam and its kin, RMSprop and Adadelta, Adagrad


@final
@dataclass(frozen=True, kw_only=True)
class AdamPreconditioner(Preconditioner):
    r"""The second moments v of the follower's Adam, AdamW, NAdam, RAdam, RMSprop, Adadelta or Adagrad.

    $$
    M = v^\text{power} + \text{floor} \cdot \operatorname{mean}(v^\text{power})
    $$

    With minibatches v is the gradients' noise, whose size is the curvature's for a well-specified model (the Fisher
    information). With the whole data v is what is left of gradients long past, and may do harm: compare the products.
    Costs no product; memory n. Serves inside an `Implicit` response whose inner optimiser is one of those; by itself it
    knows nothing and does nothing.

    Args:
        power: 1 takes v for the curvature; 1/2 is the optimiser's own step.
        floor: Relative to the mean.

    Raises:
        TypeError: For an optimiser without second moments.

    Examples:
        >>> kind = AdamPreconditioner(floor=0.0)
        >>> memory = kind.inform(kind.init(torch.zeros(2)), [{"exp_avg_sq": torch.tensor([4.0, 16.0])}])
        >>> apply, memory = kind.prepare(LinearOperator(lambda v: v), memory)
        >>> apply(torch.ones(2))
        tensor([0.5000, 0.2500])
    """

    power: float = 0.5
    floor: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if not self.power > 0.0 or not self.floor >= 0.0:
            raise ValueError(f"{self}: expected a power above 0 and a floor of at least 0.")

    @property
    def from_optimizer(self) -> bool:
        """It is."""
        return True

    @property
    def takes_parts(self) -> bool:
        """Yes: each entry has a number of its own."""
        return True

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """Second moments `[n]`, 0 while there are none."""
        return {"moments": torch.zeros_like(like)}

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """Take the second moments of all leaves."""
        if optimizer and not any(optimizer):
            return memory  # it has not stepped yet
        found = [next((s[key] for key in _MOMENTS if isinstance(s.get(key), Tensor)), None) for s in optimizer]
        if not found or any(moment is None for moment in found):
            known = sorted({key for state in optimizer for key in state})
            raise TypeError(
                f"AdamPreconditioner: the inner optimiser remembers {known or 'nothing'} of its parameters and no "
                "second moments. Use Adam or another of its kin, Diagonal(), or LBFGSPreconditioner() for LBFGS."
            )
        return memory | {"moments": torch.cat([moment.detach().reshape(-1) for moment in found if moment is not None])}

    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """1 / M."""
        moments = memory["moments"].pow(self.power)
        mean = moments.mean()
        # Tensors throughout: under vmap there is no number to branch on.
        floored = (moments + self.floor * mean).clamp(min=torch.finfo(moments.dtype).tiny)
        diagonal = torch.where(mean > 0.0, floored, 1.0)
        return lambda r: r / diagonal, memory


@final
@dataclass(frozen=True, kw_only=True)
class LBFGSPreconditioner(Preconditioner):
    """The pairs (step, change of the gradient) that the follower's `torch.optim.LBFGS` keeps, as its inverse Hessian.

    They come from the way to the optimum, so they know the directions that the follower went, and those that a warm
    start leaves to go are few: `Recycled()` learns from the solves themselves. Costs no product; memory 2 n size. By
    itself, outside an `Implicit` response, it does nothing. Source: Ramzi et al. 2021, "SHINE" (arXiv 2106.00553).

    Args:
        size: How many of the latest pairs.

    Raises:
        TypeError: For another optimiser.
    """

    size: int = 20

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if self.size < 1:
            raise ValueError(f"{self}: expected a size of at least 1.")

    @property
    def from_optimizer(self) -> bool:
        """It is."""
        return True

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """Directions and products `[size, n]`, oldest first, and how many are filled."""
        return no_pairs(like, self.size)

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """Take the optimiser's pairs, which it keeps with its first parameter."""
        if optimizer and not any(optimizer):
            return memory  # it has not stepped yet
        if not optimizer or "n_iter" not in optimizer[0]:
            known = sorted({key for state in optimizer for key in state})
            raise TypeError(
                f"LBFGSPreconditioner: the inner optimiser remembers {known or 'nothing'}; expected torch.optim.LBFGS. "
                "Use Recycled(), or AdamPreconditioner() for Adam."
            )
        # torch's names: what it calls old_dirs are the changes of the gradient.
        steps, changes = optimizer[0].get("old_stps") or [], optimizer[0].get("old_dirs") or []
        return with_pairs(self.init(memory["directions"][0]), list(steps), list(changes), self.size)

    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """The two-loop recursion."""
        return two_loops(memory, None) or (lambda r: r), memory
