"""The extreme eigenvalues of a symmetric operator from its products, with bounds on what was missed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError, NotSymmetricError
from bilevel.linear.operator import LinearOperator


@dataclass(frozen=True)
class Spectrum:
    """What Lanczos' iteration saw of a symmetric operator's eigenvalues.

    `smallest` and `largest` are Rayleigh quotients, so that the true ones lie at or beyond them: a `smallest` below
    -`rounding` *proves* a negative eigenvalue. `lower` and `upper` enclose all of them: up to rounding when `exact`
    (the whole space was searched), else with probability at least 1 - `failure` over the random start. `rounding` is
    what floating point may have done to either end, for products that are right to a few units in the last place;
    `products` counts.
    """

    smallest: float
    largest: float
    lower: float
    upper: float
    exact: bool
    failure: float
    rounding: float
    products: int


def extreme_eigenvalues(
    operator: LinearOperator, like: Tensor, *, steps: int = 30, failure: float = 1e-3, seed: int = 0
) -> Spectrum:
    r"""The extreme eigenvalues of a symmetric operator on vectors like `like: [n]`, from at most `steps` products.

    Lanczos' iteration with full reorthogonalisation from a random start. With `steps` >= n it is exact. Else, for k
    products, each end is missed by at most eps (largest - smallest) but for a probability of
    1.648 sqrt(n) exp(-sqrt(eps) (2k - 1)), which is solved for eps at `failure` / 2 for each end: at n = 10,000 and
    k = 30 that is 5 % of the spread, so a smallest eigenvalue below that is not told from 0. Costs `steps` products
    and the memory of as many vectors.
    Misleads where the products themselves are inexact, those with a half-converged inner solve for example: `rounding`
    does not know of that.
    Raises `ValueError` for `steps` < 1 or an empty `like`, `NotSymmetricError` for an operator that is not declared
    symmetric, `NonFiniteError` for NaN in products.
    Source: Kuczynski and Wozniakowski 1992 (doi 10.1137/0613066).

    >>> diagonal = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    >>> found = extreme_eigenvalues(LinearOperator(lambda v: diagonal * v, symmetric=True), diagonal)
    >>> round(found.smallest, 6), round(found.largest, 6), found.exact
    (1.0, 5.0, True)
    """
    if not operator.symmetric:
        raise NotSymmetricError("extreme_eigenvalues needs a symmetric operator; this one says symmetric=False.")
    n = like.numel()
    if steps < 1 or n < 1:
        raise ValueError(f"extreme_eigenvalues was given steps={steps} and vectors of {n} entries; it wants 1 or more.")
    count = min(steps, n)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    basis = torch.zeros(count, n, dtype=like.dtype, device=like.device)
    projected = torch.zeros(count, count, dtype=torch.float64)
    rest, needed = torch.zeros_like(basis[0]), 0.0
    for k in range(count):
        size = float(torch.linalg.vector_norm(rest))
        if size <= needed:
            # An invariant subspace is exhausted: go on in what is left of the space, which it may not have seen.
            rest = _orthogonal(torch.randn(n, generator=generator, dtype=like.dtype, device=like.device), basis[:k])
            size = float(torch.linalg.vector_norm(rest))
        basis[k] = rest / size
        product = operator.matvec(basis[k].clone()).detach()
        if not bool(torch.isfinite(product).all()):
            raise NonFiniteError(f"extreme_eigenvalues: product {k + 1} of the operator holds NaN or infinity.")
        row = (basis[: k + 1] @ product).to(projected)
        projected[k, : k + 1] = projected[: k + 1, k] = row
        rest = _orthogonal(product, basis[: k + 1])
        needed = 100.0 * torch.finfo(like.dtype).eps * float(torch.linalg.vector_norm(product))
    values = torch.linalg.eigvalsh(projected)
    smallest, largest = float(values[0]), float(values[-1])
    size = max(abs(smallest), abs(largest))
    rounding = 10.0 * n**0.5 * torch.finfo(like.dtype).eps * size
    exact = count == n
    missed = 0.0 if exact else _missed(n, count, failure / 2.0)
    # The share is of the true spread, which is longer than the one seen by up to that share at both ends.
    slack = rounding + (missed / (1.0 - 2.0 * missed) * (largest - smallest) if missed < 0.5 else math.inf)
    return Spectrum(
        smallest,
        largest,
        smallest - slack,
        largest + slack,
        exact,
        failure=0.0 if exact else failure,
        rounding=rounding,
        products=count,
    )


def _missed(n: int, steps: int, failure: float) -> float:
    """The share of the spread by which an end may be missed."""
    return (math.log(1.648 * math.sqrt(n) / failure) / (2 * steps - 1)) ** 2


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """What of a vector `[n]` is orthogonal to the orthonormal rows of `basis: [k, n]`."""
    for _ in range(2):  # once is not enough in floating point, twice is
        vector = vector - basis.T @ (basis @ vector)
    return vector
