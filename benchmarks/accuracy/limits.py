"""What could be had at best on the followers where it is little: spectra, and preconditioners known exactly.

At the second place of run.py's problems, from the whole Hessian: how many of the separable regression's eigenvalues are
above multiples of the penalty, and how many iterations from 0 the network takes with exact blocks, a block for each
unit or one for all of a layer's. A minute or two.

    python benchmarks/accuracy/limits.py --output docs/performance/limits.json
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from methods import Oracle, Ours
from problem import MOST, Problem, problems
from scipy.linalg import ldl
from torch import Tensor

import bilevel as bl
from benchmarks.head import head

ERRORS = (1e-3, 1e-6)


def hessian(problem: Problem) -> Tensor:
    """Of the follower, `[n, n]`, column by column."""
    x, y = problem.places[1]
    y = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(problem.follow(x, y), y, create_graph=True)
    found = torch.empty(len(y), len(y), dtype=y.dtype)
    for index in range(len(y)):
        unit = torch.zeros_like(slope).index_fill_(0, torch.tensor(index), 1.0)
        found[index] = torch.autograd.grad(slope, y, unit, retain_graph=True)[0]
    return 0.5 * (found + found.mT)


def above(matrix: Tensor, threshold: float) -> int:
    """How many eigenvalues are: Sylvester's law of inertia."""
    shifted = (matrix - threshold * torch.eye(len(matrix), dtype=matrix.dtype)).numpy()
    blocks = torch.from_numpy(ldl(shifted, overwrite_a=True, check_finite=False)[1])
    diagonal, beside = blocks.diagonal(), blocks.diagonal(1)
    # Blocks of two are indefinite: one of each sign, whatever their diagonal says.
    pairs = int((beside != 0.0).sum())
    alone = torch.ones(len(matrix), dtype=torch.bool)
    alone[:-1][beside != 0.0] = False
    alone[1:][beside != 0.0] = False
    return pairs + int((diagonal[alone] > 0.0).sum())


def largest(matrix: Tensor) -> float:
    """The largest eigenvalue, by the power iteration."""
    vector = torch.ones(len(matrix), dtype=matrix.dtype)
    for _ in range(100):
        vector = matrix @ (vector / vector.norm())
    return float(vector.norm())


def exact_blocks(problem: Problem, matrix: Tensor, *, alike: bool) -> Callable[[Tensor], Tensor]:
    """r `[n]` to M^-1 r for the blocks of the first layer's columns, or their mean, and the second layer whole."""
    rows, columns = problem.shapes[0]
    first = rows * columns
    view = matrix[:first, :first].view(rows, columns, rows, columns)
    blocks = torch.stack([view[:, unit, :, unit] for unit in range(columns)])
    if alike:
        blocks = blocks.mean(0, keepdim=True)
    units, rest = torch.linalg.cholesky(blocks), torch.linalg.cholesky(matrix[first:, first:])

    def apply(r: Tensor) -> Tensor:
        mine = torch.cholesky_solve(r[:first].view(rows, columns).mT[:, :, None], units.expand(columns, -1, -1))
        return torch.cat([mine[:, :, 0].mT.reshape(-1), torch.cholesky_solve(r[first:, None], rest)[:, 0]])

    return apply


def iterations(problem: Problem, preconditioner: Callable[[Tensor], Tensor] | None, truth: Tensor) -> list[int]:
    """To each error, from 0."""
    oracle = Oracle(truth, ERRORS)
    solver = bl.ConjugateGradient(rtol=None, max_steps=MOST, preconditioner=preconditioner, stopping=oracle)
    Ours(None, warm=False).run(problem, solver)
    return [oracle.reached[wanted] for wanted in ERRORS]


def main() -> None:
    """Both problems; writes JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path("limits.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _, separable, network = problems()  # all of them: they draw their places in turn
    matrix, penalty = hessian(separable), float(2.0 * separable.places[0][0][0].exp())
    found: dict[str, object] = {
        "largest over the penalty": largest(matrix) / penalty,
        "above": {str(times): above(matrix, times * penalty) for times in (2, 10)},
    }
    print(found, flush=True)
    exact = bl.ConjugateGradient(rtol=1e-13, max_steps=MOST, preconditioner=bl.linear.Diagonal(probes=50))
    truth = Ours(None, warm=False).run(network, exact)[0]
    matrix = hessian(network)
    found["iterations"] = {
        "plain": iterations(network, None, truth),
        "exact blocks, one a unit": iterations(network, exact_blocks(network, matrix, alike=False), truth),
        "exact blocks, one for all": iterations(network, exact_blocks(network, matrix, alike=True), truth),
        "BlockDiagonal": iterations(network, bl.linear.BlockDiagonal(shapes=network.shapes), truth),
    }
    print(found["iterations"], flush=True)
    chosen.output.write_text(json.dumps({**head(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
