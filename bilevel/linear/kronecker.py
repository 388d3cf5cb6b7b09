"""A network's curvature, layer by layer, as Kronecker products of two small matrices: a preconditioner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bilevel.errors import require_kinds
from bilevel.linear.operator import KroneckerFactors, LinearOperator
from bilevel.linear.preconditioner import Applied, Preconditioner
from bilevel.linear.system import Memory


class FactoredProducts(ABC):
    """Products with a network's matrix that also know its Kronecker factors, as those of `GaussNewton` do."""

    @abstractmethod
    def __call__(self, vector: Tensor, /, part: slice = ...) -> tuple[Tensor, ...]:
        """As a `Pullback`."""

    @abstractmethod
    def factors(self) -> tuple[Sequence[KroneckerFactors], int]:
        """One block for each leaf, and what it took, in products."""


@final
@dataclass(frozen=True, kw_only=True)
class KroneckerPreconditioner(Preconditioner):
    r"""K-FAC: each layer's block of a Gauss-Newton matrix is nearly the Kronecker product of two small matrices.

    $$
    M_W = B \otimes A + \lambda I, \qquad
    A = \tfrac1m \sum_i a_i a_i^\top, \qquad B = \sum_i J_i^\top\, \ell_{zz}\, J_i, \qquad M_b = B + \lambda I
    $$

    for a weight W and a bias b of a layer with the inputs a_i, where J_i is the derivative of the network's outputs in
    that layer's, and $\lambda$ the mean curvature of what else is in the loss, such as a penalty, and of the solver's
    damping. It is exact for one layer whose loss is a square, and each leaf's block for one example; else it misses
    what inputs and slopes have in common, and what leaves have. By itself it is of the wrong length (an error of .73 to
    1.19 was measured, where one step of conjugate gradients along it left .13 to .19): let `ConjugateGradient` step.

        linear_solver=ConjugateGradient(max_steps=1, rtol=None, preconditioner=KroneckerPreconditioner())

    It serves `Implicit(curvature=GaussNewton(...))` of a follower that is a module, on one held batch. `nn.Linear` and
    `nn.Conv2d` without groups have factors; other leaves a mean curvature. A layer that is used twice, or a weight that
    two layers share, has one block from both uses.

    Costs, at every so many systems, a backward pass for each column of the outputs, counted as products, and the
    eigenvectors of A and B; memory for those and for one number an entry.
    Source: Martens & Grosse 2015 (arXiv 1503.05671); Grosse & Martens 2016 (arXiv 1602.01407).

    Args:
        every: The factors are made anew at every so many systems.
        floor: Of M's eigenvalues, relative to the largest of their block: without a penalty they reach 0.

    Raises:
        ValueError: For a system without factors.

    Examples:
        >>> KroneckerPreconditioner(every=5).every
        5
    """

    every: int = 10
    floor: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if self.every < 1 or not self.floor > 0.0:
            raise ValueError(f"{self}: expected every of at least 1, and a floor above 0.")

    @property
    def needs_factors(self) -> bool:
        """Yes: it takes no products of its own."""
        return True

    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """(B (x) A + l I)^-1 for each leaf."""
        systems = memory.get("systems", torch.zeros((), dtype=torch.int64))
        if int(systems) % self.every == 0:
            if operator.factors is None:
                raise ValueError(
                    "KroneckerPreconditioner needs the factors of a network's matrix, and this system has none. They "
                    "come with Implicit(curvature=GaussNewton(...)) on one held batch; elsewhere use Diagonal()."
                )
            memory = {}
            for index, block in enumerate(operator.factors()[0]):
                memory |= {f"{index}.{name}": tensor for name, tensor in self._turned(block).items()}
        memory = memory | {"systems": systems + 1}
        count = sum(name.endswith(".values") for name in memory)
        blocks = [(memory[f"{j}.values"], memory.get(f"{j}.slopes"), memory.get(f"{j}.inputs")) for j in range(count)]
        sizes = [values.numel() for values, _, _ in blocks]

        def apply(r: Tensor) -> Tensor:
            found = []
            for part, (values, slopes, inputs) in zip(torch.split(r, sizes), blocks, strict=True):
                turned = part.reshape(values.shape)
                turned = turned if slopes is None else slopes.mT @ turned
                turned = (turned if inputs is None else turned @ inputs) / values
                turned = turned if slopes is None else slopes @ turned
                found.append((turned if inputs is None else turned @ inputs.mT).reshape(-1))
            return torch.cat(found)

        return apply, memory

    def _turned(self, block: KroneckerFactors) -> Memory:
        """A block's eigenvectors, and its eigenvalues in the order of the leaf's entries."""
        found: Memory = {}
        products = torch.zeros(block.slots, dtype=block.rest.dtype, device=block.rest.device)
        if block.slopes is not None:
            lengths, found["slopes"] = torch.linalg.eigh(block.slopes)
            products = lengths.clamp(min=0.0)[:, None]
            if block.inputs is not None:
                lengths, found["inputs"] = torch.linalg.eigh(block.inputs)
                products = products * lengths.clamp(min=0.0)
        values = products + block.rest
        limits = torch.finfo(values.dtype)
        values = values.clamp(min=limits.tiny)
        largest = values.amax() if values.numel() else values.new_ones(())
        # A leaf that nothing curves, of a layer that is not used: any number serves, and 1 is as good as another.
        found["values"] = torch.where(largest > limits.tiny, torch.maximum(values, self.floor * largest), 1.0)
        return found
