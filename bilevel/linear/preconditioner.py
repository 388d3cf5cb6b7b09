"""Preconditioners: what makes conjugate gradients short, made from products alone and kept from solve to solve."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel._returned import Lent, both, described, require_like
from bilevel.errors import require_kinds
from bilevel.linear.gaussian import gaussian
from bilevel.linear.norms import norm
from bilevel.linear.nystrom import eigenpairs
from bilevel.linear.operator import LinearOperator, Shapes
from bilevel.linear.system import Memory, nested, part_of, require_memory
from bilevel.tree import version

Applied = Callable[[Tensor], Tensor]
"""r `[n]` to M^-1 r `[n]`, M symmetric positive definite."""


class Preconditioner(ABC):
    """Makes M close to A, from products with A and from what it learned from earlier systems like this one.

    Inside an `Implicit` response one leader step's system is nearly the last one's, so that what was learned there
    serves again: the memory is a part of the response's state, saved and resumed with it. A solver that is called by
    hand without a memory, or within a `torch.func` transform, starts with an empty one each time.

    A memory comes in and a memory goes out. The one that came in is never written to: what did not change is shared.
    Who uses a preconditioner (`prepared`) refuses what breaks this, and a map whose answers are no new `[n]` tensors.
    """

    @abstractmethod
    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """M^-1 for this system, and the memory after it, which is kept for the next one: a tuple of two.

        M^-1 maps r `[n]` to a *new* tensor `[n]` of its dtype, linearly; it writes neither to r nor to what it returned
        before. The operator is that of the solver, damping included. It counts its products, and `operator.shapes` is
        the layout of the unknowns, where that is known.
        """

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """The memory before the first system, for `like: [n]` unknowns laid out as `shapes`; {} if it starts empty.

        What `prepare` returns is kept in any case.
        """
        return {}

    def learn(self, memory: Memory, directions: list[Tensor], products: list[Tensor]) -> Memory:
        """The memory with what directions p and products A p `[n]`, which a solve went through, tell."""
        return memory

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """The memory with what the follower's torch.optim optimiser remembers of each leaf; `[]` where it has none."""
        return memory

    @property
    def takes_parts(self) -> bool:
        """Whether its vectors may be spread over ranks."""
        return False

    @property
    def from_optimizer(self) -> bool:
        """Whether it knows nothing but what it is informed of."""
        return False

    @property
    def needs_factors(self) -> bool:
        """Whether it is made of a network's Kronecker factors, which only some systems have."""
        return False

    @property
    def pairs(self) -> int:
        """How many pairs (p, A p) it wants to `learn` from a solve."""
        return 0


def begun(preconditioner: Preconditioner, like: Tensor, shapes: Shapes | None) -> Memory:
    """What `preconditioner.init` returns, held to its contract."""
    memory = preconditioner.init(like, shapes)
    require_memory(memory, f"{type(preconditioner).__name__}.init: what it returned")
    return memory


def prepared(preconditioner: Preconditioner, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
    """What `preconditioner.prepare` returns, held to its contract."""
    name, lent = f"{type(preconditioner).__name__}.prepare", Lent()
    found = preconditioner.prepare(operator, lent.out("the memory that it was given", memory))
    inverse, after = both(found, name, "the map from r to M^-1 r, and the memory after it")
    if not callable(inverse):
        raise TypeError(f"{name} returned {described(inverse)} as the map from r to M^-1 r; expected a function.")
    lent.require_untouched(name)
    require_memory(after, f"{name}: the memory that it returned")
    return guarded(inverse, type(preconditioner).__name__), after


def guarded(inverse: Applied, name: str) -> Applied:
    """The map from r to M^-1 r, checked at each call: it gives a tensor like r, and leaves r and its last answer alone.

    Solvers keep r and the last answer, and write over vectors of their own.
    """
    last: weakref.ref[Tensor] | None = None
    told = f"The map from r to M^-1 r of {name}"

    def apply(r: Tensor) -> Tensor:
        nonlocal last
        before = None if last is None else last()
        writes, writes_before = version(r), 0 if before is None else version(before)
        z = inverse(r)
        require_like(z, r, f"{told}: what it returned")
        if version(r) != writes or (before is not None and version(before) != writes_before):
            what = "r itself" if version(r) != writes else "what it had returned before"
            raise ValueError(f"{told} wrote into {what}; expected a new tensor each time, r / m and not r.div_(m).")
        last = weakref.ref(z)
        return z

    return apply


@final
@dataclass(frozen=True, kw_only=True)
class Diagonal(Preconditioner):
    r"""Jacobi's: M = diag(A), estimated without bias from products with random signs.

    $$
    \operatorname{diag}(A) = \mathbb E[v \circ A v], \qquad v_i = \pm 1
    $$

    Entry i's standard error is that of the off-diagonal part of row i over the square root of the number of probes; an
    estimate below its standard error is raised to it, which also keeps M positive. For unknowns of different scale: a
    penalty for each weight, layers of different size, per-weight learning rates. Where the diagonal is flat it does
    nothing, and costs little. Memory 3 n.
    Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".

    Args:
        probes: Products spent before the first system.
        refresh: Products spent before each later one.
        forgetting: So much of what a product weighs is left a system later.
        seed: Of the signs.

    Examples:
        >>> curvature = torch.tensor([1.0, 1e3, 1e6])
        >>> operator = LinearOperator(lambda v: curvature * v, symmetric=True)
        >>> jacobi = Diagonal()
        >>> apply, memory = jacobi.prepare(operator, jacobi.init(curvature))
        >>> apply(curvature)
        tensor([1., 1., 1.])
    """

    probes: int = 10
    refresh: int = 2
    forgetting: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if self.probes < 2 or self.refresh < 0 or not 0.0 <= self.forgetting <= 1.0:
            raise ValueError(
                f"{self}: expected probes of at least 2, refresh of at least 0, and forgetting between 0 and 1."
            )

    @property
    def takes_parts(self) -> bool:
        """Yes: each entry has a number of its own."""
        return True

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """Weighted sums of v * A v and of its square, how much they weigh, and how many systems there were."""
        zero = torch.zeros((), dtype=torch.float64, device=like.device)
        return {
            "sum": torch.zeros_like(like),
            "squares": torch.zeros_like(like),
            "weight": zero.clone(),
            "weight_squares": zero.clone(),
            "systems": torch.zeros((), dtype=torch.int64),
        }

    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """1 / diag(A), estimated."""
        like, systems = memory["sum"], int(memory["systems"])
        count = self.refresh if systems else self.probes
        memory = memory | {"systems": memory["systems"] + 1}
        if count:
            memory |= self._fresh(operator, memory, [self.seed + 7919 * systems + number for number in range(count)])
        weight = memory["weight"].to(like.dtype)
        mean = memory["sum"] / weight
        variance = (memory["squares"] / weight - mean.square()).clamp(min=0.0)
        # The mean's standard error, by the effective number of probes.
        error = (variance * (memory["weight_squares"] / memory["weight"].square()).to(like.dtype)).sqrt()
        size = norm(mean)
        floor = torch.finfo(like.dtype).eps * torch.where(size > 0.0, size, 1.0)
        diagonal = torch.maximum(torch.maximum(mean, error), floor)
        return lambda r: r / diagonal, memory

    def _fresh(self, operator: LinearOperator, memory: Memory, seeds: list[int]) -> Memory:
        """The sums with a probe for each seed."""
        total, squares = self.forgetting * memory["sum"], self.forgetting * memory["squares"]
        weight, weight_squares = self.forgetting * memory["weight"], self.forgetting**2 * memory["weight_squares"]
        for seed in seeds:
            signs = torch.sign(gaussian(tuple(total.shape), total, seed))
            seen = signs * operator.matvec(signs)
            total, squares = total + seen, squares + seen.square()
        weights = {"weight": weight + len(seeds), "weight_squares": weight_squares + len(seeds)}
        return {"sum": total, "squares": squares} | weights


@final
@dataclass(frozen=True, kw_only=True)
class NystromPreconditioner(Preconditioner):
    r"""Randomised Nystroem: M = A on the space of its largest eigenvalues, and the least of those elsewhere.

    $$
    M^{-1} = l\, U L^{-1} U^\top + I - U U^\top, \qquad l = \min L
    $$

    For a few large eigenvalues over a flat rest: correlated data under a small penalty. In between two approximations
    the old one serves, as the Hessian moves little in a leader's step. Memory n rank, n rank work each step of the
    solver. Source: Frangella, Tropp & Udell, arXiv 2110.02820.

    Args:
        rank: Products that an approximation takes.
        every: It is made anew at every so many systems.
        seed: Of the sketch.

    Examples:
        >>> curvature = torch.tensor([1e4, 1e3, 1.0, 1.0], dtype=torch.float64)
        >>> operator = LinearOperator(lambda v: curvature * v, symmetric=True)
        >>> nystrom = NystromPreconditioner(rank=4)
        >>> apply, memory = nystrom.prepare(operator, nystrom.init(curvature))
        >>> apply(curvature).round(decimals=4)
        tensor([1., 1., 1., 1.], dtype=torch.float64)
    """

    rank: int = 20
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if self.rank < 1 or self.every < 1:
            raise ValueError(f"{self}: expected rank and every of at least 1.")

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """Eigenvectors `[n, rank]`, eigenvalues `[rank]`, how many systems there were."""
        rank = min(self.rank, like.numel())
        return {
            "vectors": like.new_zeros(like.numel(), rank),
            "values": like.new_zeros(rank),
            "systems": torch.zeros((), dtype=torch.int64),
        }

    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """l U L^-1 U' + I - U U', l the least of L."""
        vectors, values, systems = memory["vectors"], memory["values"], memory["systems"]
        if int(systems) % self.every == 0:
            vectors, values = eigenpairs(operator, vectors[:, 0], self.rank, self.seed)
        # Of a matrix whose rank is smaller than asked for, the rest is rounding.
        least = values[-1].clamp(min=torch.finfo(values.dtype).eps * values[0])
        inside = least / values.clamp(min=least) - 1.0
        after = {"vectors": vectors, "values": values, "systems": systems + 1}
        return lambda r: r + vectors @ (inside * (vectors.mT @ r)), after


@final
@dataclass(frozen=True, kw_only=True)
class Recycled(Preconditioner):
    """The L-BFGS inverse of the directions that earlier solves went through: curvature that was already paid for.

    Each solve leaves pairs (p, A p), evenly spaced along it, beside those before it, the oldest of which are forgotten.
    No products of its own; the first system has none, and costs what it costs. Memory 2 n size; 4 n size work each step
    of the solver.
    Source: Morales & Nocedal 2000, "Automatic preconditioning by limited memory quasi-Newton updating".

    Args:
        size: How many pairs are kept.
        base: What the recursion starts from, instead of a multiple of I: `Recycled(base=Diagonal())` has both.
    """

    size: int = 20
    base: Preconditioner | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        require_kinds(self)
        if self.size < 1:
            raise ValueError(f"{self}: expected a size of at least 1.")
        if not (self.base is None or isinstance(self.base, Preconditioner)):
            raise TypeError(f"Recycled was given base={self.base!r}; it wants one such as Diagonal(), or None.")

    @property
    def from_optimizer(self) -> bool:
        """Whether its base is."""
        return self.base is not None and self.base.from_optimizer

    @property
    def needs_factors(self) -> bool:
        """Whether its base does."""
        return self.base is not None and self.base.needs_factors

    @property
    def pairs(self) -> int:
        """As many as it keeps."""
        return self.size

    def init(self, like: Tensor, shapes: Shapes | None = None) -> Memory:
        """Directions and products `[size, n]`, oldest first, how many are filled, and the base's."""
        base = {} if self.base is None else begun(self.base, like, shapes)
        return no_pairs(like, self.size) | nested("base", base)

    def prepare(self, operator: LinearOperator, memory: Memory) -> tuple[Applied, Memory]:
        """The two-loop recursion."""
        base = None
        if self.base is not None:
            base, theirs = prepared(self.base, operator, part_of(memory, "base"))
            memory = memory | nested("base", theirs)
        return two_loops(memory, base) or base or (lambda r: r), memory

    def learn(self, memory: Memory, directions: list[Tensor], products: list[Tensor]) -> Memory:
        """With those that have curvature, at the end of what is kept."""
        if self.base is not None:
            memory = memory | nested("base", self.base.learn(part_of(memory, "base"), directions, products))
        return with_pairs(memory, directions, products, self.size)

    def inform(self, memory: Memory, optimizer: Sequence[Mapping[str, Any]]) -> Memory:
        """As the base takes it."""
        if self.base is None:
            return memory
        return memory | nested("base", self.base.inform(part_of(memory, "base"), optimizer))


def no_pairs(like: Tensor, size: int) -> Memory:
    """Room for `size` pairs, none of which is filled."""
    blank = like.new_zeros(size, like.numel())
    return {"directions": blank, "products": blank, "filled": torch.zeros((), dtype=torch.int64)}


def with_pairs(memory: Memory, directions: list[Tensor], products: list[Tensor], size: int) -> Memory:
    """The memory with the pairs that have curvature at the end of its `size`, and without as many of the oldest."""
    kept = []
    for p, product in zip(directions, products, strict=True):
        length = norm(p)
        # Curvature that is all rounding would make a huge step of it.
        if float(torch.dot(p, product)) > 1e-10 * float(length * norm(product)) > 0.0:
            kept.append((p / length, product / length))
    kept = kept[-size:]
    if not kept:
        return memory
    filled = (memory["filled"] + len(kept)).clamp(max=size)
    fresh = {
        name: torch.cat([memory[name][len(kept) :], torch.stack([pair[row] for pair in kept])])
        for row, name in enumerate(("directions", "products"))
    }
    return memory | fresh | {"filled": filled}


def two_loops(memory: Memory, base: Applied | None) -> Applied | None:
    """The L-BFGS inverse of the memory's pairs over `base`, or over a multiple of I; None while there are none."""
    filled = int(memory["filled"])
    if not filled:
        return None
    directions, products = memory["directions"][-filled:], memory["products"][-filled:]
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
