"""Preconditioners: what makes conjugate gradients short, made from products alone and kept from solve to solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.linear.base import LinearOperator, norm
from bilevel.linear.gaussian import gaussian
from bilevel.linear.nystrom import eigenpairs

Memory = dict[str, Tensor]
"""What a preconditioner keeps between solves: tensors by name, written in place, part of a response's state."""

Applied = Callable[[Tensor], Tensor]
"""r `[n]` to M^-1 r `[n]`, M symmetric positive definite."""


class Preconditioner(ABC):
    """Makes M close to A, from products with A and from what it kept of earlier systems like this one.

    Inside an `Implicit` response one leader step's system is nearly the last one's, so that what was learned there
    serves again: the memory is a part of the response's state, saved and resumed with it. A solver that is called by
    hand, or within a `torch.func` transform, starts with an empty memory each time.
    """

    @abstractmethod
    def init(self, like: Tensor) -> Memory:
        """The memory before the first system; `like: [n]` gives n, dtype and device."""

    @abstractmethod
    def prepare(self, operator: LinearOperator, memory: Memory) -> Applied:
        """M^-1 for this system; updates the memory in place."""

    def learn(self, memory: Memory, directions: list[Tensor], products: list[Tensor]) -> None:  # noqa: B027
        """Take note of directions p and products A p `[n]` that a solve went through; updates the memory in place."""

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027
        """Take note of what the follower's torch.optim optimiser remembers of each leaf; `[]` where it has none."""

    @property
    def from_optimizer(self) -> bool:
        """Whether it knows nothing but what it is informed of."""
        return False

    @property
    def pairs(self) -> int:
        """How many pairs (p, A p) it wants to `learn` from a solve."""
        return 0


@final
@dataclass(frozen=True, kw_only=True)
class Diagonal(Preconditioner):
    r"""Jacobi's: M = diag(A), estimated without bias from products with random signs.

        diag(A) = E[v * A v],   v_i = +-1

    Entry i's standard error is that of the off-diagonal part of row i over the square root of the number of probes; an
    estimate below its standard error is raised to it, which also keeps M positive. `probes` products are spent before
    the first system, `refresh` before each later one; old ones count `forgetting` times as much per system. For
    unknowns of different scale: a penalty for each weight, layers of different size, per-weight learning rates. Where
    the diagonal is flat it does nothing, and costs little.

    Memory 3 n. Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".

    >>> curvature = torch.tensor([1.0, 1e3, 1e6])
    >>> operator = LinearOperator(lambda v: curvature * v, symmetric=True)
    >>> jacobi = Diagonal()
    >>> jacobi.prepare(operator, jacobi.init(curvature))(curvature)
    tensor([1., 1., 1.])
    """

    probes: int = 10
    refresh: int = 2
    forgetting: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.probes < 2 or self.refresh < 0 or not 0.0 <= self.forgetting <= 1.0:
            raise ValueError(
                f"{self}: expected probes of at least 2, refresh of at least 0, and forgetting between 0 and 1."
            )

    def init(self, like: Tensor) -> Memory:
        """Weighted sums of v * A v and of its square, how much they weigh, and how many systems there were."""
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        return {
            "sum": torch.zeros_like(like),
            "squares": torch.zeros_like(like),
            "weight": zero.clone(),
            "weight_squares": zero.clone(),
            "systems": torch.zeros((), dtype=torch.int64),
        }

    def prepare(self, operator: LinearOperator, memory: Memory) -> Applied:
        """1 / diag(A), estimated."""
        like, systems = memory["sum"], int(memory["systems"])
        count = self.refresh if systems else self.probes
        memory["systems"] += 1
        if count:
            memory["sum"] *= self.forgetting
            memory["squares"] *= self.forgetting
            memory["weight"] *= self.forgetting
            memory["weight_squares"] *= self.forgetting**2
        for number in range(count):
            signs = torch.sign(gaussian(tuple(like.shape), like, self.seed + 7919 * systems + number))
            seen = signs * operator.matvec(signs)
            memory["sum"] += seen
            memory["squares"] += seen.square()
            memory["weight"] += 1.0
            memory["weight_squares"] += 1.0
        weight = memory["weight"].to(like.dtype)
        mean = memory["sum"] / weight
        variance = (memory["squares"] / weight - mean.square()).clamp(min=0.0)
        # The mean's standard error, by the effective number of probes.
        error = (variance * (memory["weight_squares"] / memory["weight"].square()).to(like.dtype)).sqrt()
        size = norm(mean)
        floor = torch.finfo(like.dtype).eps * torch.where(size > 0.0, size, 1.0)
        diagonal = torch.maximum(torch.maximum(mean, error), floor)
        return lambda r: r / diagonal


@final
@dataclass(frozen=True, kw_only=True)
class NystromPreconditioner(Preconditioner):
    """Randomised Nystroem: M = A on the space of its `rank` largest eigenvalues, and the least of those elsewhere.

    For a few large eigenvalues over a flat rest: correlated data under a small penalty. `rank` products, spent anew at
    every `every`th system; in between the old one serves, as the Hessian moves little in a leader's step. Memory
    n rank, n rank work each step of the solver. Source: Frangella, Tropp & Udell, arXiv 2110.02820.

    >>> curvature = torch.tensor([1e4, 1e3, 1.0, 1.0], dtype=torch.float64)
    >>> operator = LinearOperator(lambda v: curvature * v, symmetric=True)
    >>> nystrom = NystromPreconditioner(rank=4)
    >>> nystrom.prepare(operator, nystrom.init(curvature))(curvature).round(decimals=4)
    tensor([1., 1., 1., 1.], dtype=torch.float64)
    """

    rank: int = 20
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.rank < 1 or self.every < 1:
            raise ValueError(f"{self}: expected rank and every of at least 1.")

    def init(self, like: Tensor) -> Memory:
        """Eigenvectors `[n, rank]`, eigenvalues `[rank]`, how many systems there were."""
        rank = min(self.rank, like.numel())
        return {
            "vectors": like.new_zeros(like.numel(), rank),
            "values": like.new_zeros(rank),
            "systems": torch.zeros((), dtype=torch.int64),
        }

    def prepare(self, operator: LinearOperator, memory: Memory) -> Applied:
        """l U L^-1 U' + I - U U', l the least of L."""
        if int(memory["systems"]) % self.every == 0:
            like = memory["vectors"][:, 0]
            memory["vectors"], memory["values"] = eigenpairs(operator, like, self.rank, self.seed)
        memory["systems"] += 1
        vectors, values = memory["vectors"], memory["values"]
        # Of a matrix whose rank is smaller than asked for, the rest is rounding.
        least = values[-1].clamp(min=torch.finfo(values.dtype).eps * values[0])
        inside = least / values.clamp(min=least) - 1.0
        return lambda r: r + vectors @ (inside * (vectors.mT @ r))


@final
@dataclass(frozen=True, kw_only=True)
class Recycled(Preconditioner):
    """The L-BFGS inverse of the directions that earlier solves went through: curvature that was already paid for.

    Each solve leaves up to `size` pairs (p, A p), evenly spaced along it, beside those before it, the oldest of which
    are forgotten. No products of its own; the first system has none, and costs what it costs. `base` is what the
    recursion starts from, instead of a multiple of I: `Recycled(base=Diagonal())` has both. Memory 2 n size; 4 n size
    work each step of the solver. Source: Morales & Nocedal 2000, "Automatic preconditioning by limited memory
    quasi-Newton updating".
    """

    size: int = 20
    base: Preconditioner | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.size < 1:
            raise ValueError(f"{self}: expected a size of at least 1.")
        if not (self.base is None or isinstance(self.base, Preconditioner)):
            raise TypeError(f"Recycled was given base={self.base!r}; it wants one such as Diagonal(), or None.")

    @property
    def from_optimizer(self) -> bool:
        """Whether its base is."""
        return self.base is not None and self.base.from_optimizer

    @property
    def pairs(self) -> int:
        """As many as it keeps."""
        return self.size

    def init(self, like: Tensor) -> Memory:
        """Directions and products `[size, n]`, oldest first, how many are filled, and the base's."""
        blank = like.new_zeros(self.size, like.numel())
        own = {"directions": blank, "products": blank.clone(), "filled": torch.zeros((), dtype=torch.int64)}
        base = {} if self.base is None else self.base.init(like)
        return own | {f"base.{name}": value for name, value in base.items()}

    def prepare(self, operator: LinearOperator, memory: Memory) -> Applied:
        """The two-loop recursion."""
        base = None
        if self.base is not None:
            theirs = self._theirs(memory)
            base = self.base.prepare(operator, theirs)
            memory |= {f"base.{name}": value for name, value in theirs.items()}
        return two_loops(memory, base) or base or (lambda r: r)

    def learn(self, memory: Memory, directions: list[Tensor], products: list[Tensor]) -> None:
        """Keep those with curvature, at the end of what is kept."""
        if self.base is not None:
            theirs = self._theirs(memory)
            self.base.learn(theirs, directions, products)
            memory |= {f"base.{name}": value for name, value in theirs.items()}
        keep_pairs(memory, directions, products, self.size)

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> None:
        """Tell the base."""
        if self.base is not None:
            theirs = self._theirs(memory)
            self.base.inform(theirs, optimizer)
            memory |= {f"base.{name}": value for name, value in theirs.items()}

    @staticmethod
    def _theirs(memory: Memory) -> Memory:
        return {name.removeprefix("base."): value for name, value in memory.items() if name.startswith("base.")}


def keep_pairs(memory: Memory, directions: list[Tensor], products: list[Tensor], size: int) -> None:
    """Put the pairs with curvature at the end of the memory's `size`, and forget as many of the oldest."""
    kept = []
    for p, product in zip(directions, products, strict=True):
        length = norm(p)
        # Curvature that is all rounding would make a huge step of it.
        if float(torch.dot(p, product)) > 1e-10 * float(length * norm(product)) > 0.0:
            kept.append((p / length, product / length))
    kept = kept[-size:]
    if kept:
        for name, row in (("directions", 0), ("products", 1)):
            new = torch.stack([pair[row] for pair in kept])
            memory[name] = torch.cat([memory[name][len(kept) :], new])
        memory["filled"] = (memory["filled"] + len(kept)).clamp(max=size)


def two_loops(memory: Memory, base: Applied | None) -> Applied | None:
    """The L-BFGS inverse of the memory's pairs over `base`, or over a multiple of I; None while there are none."""
    filled = int(memory["filled"])
    if not filled:
        return None
    directions, products = memory["directions"][-filled:].clone(), memory["products"][-filled:].clone()
    curvatures = (directions * products).sum(1)
    scale = curvatures[-1] / products[-1].square().sum()
    rows = list(zip(directions, products, curvatures, strict=True))

    def apply(r: Tensor) -> Tensor:
        shares = []
        for p, product, curvature in reversed(rows):
            share = torch.dot(p, r) / curvature
            r = r - share * product
            shares.append(share)
        r = scale * r if base is None else base(r)
        for (p, product, curvature), share in zip(rows, reversed(shares), strict=True):
            r = r + (share - torch.dot(product, r) / curvature) * p
        return r

    return apply
