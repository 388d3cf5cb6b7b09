"""How wrong is a truncated hypergradient of the ten? Beside a whole trial's, on the seeds that settings are chosen on.

    python -m benchmarks.tuning.horizons --output docs/search/horizons.json

A minute of one core. `cosine` is of the two hypergradients in the coordinates that the leader steps in; `signs` how
many of ten have the right sign, which is what an optimiser that scales each entry by itself goes by; `decay` is whether
that of the first weights' log decay has, the one that matters most.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import bilevel as bl
from benchmarks.tuning.__main__ import CHOOSING, STARTS, started
from benchmarks.tuning.problems import Problem, ten
from bilevel.responses.base import State

HORIZONS, TRAINED = (5, 10, 20, 50), (0, 50, 200)


def slope(problem: Problem, coordinates: Tensor, steps: int, state: State | None = None) -> Tensor:
    """The validation loss's hypergradient through `steps` steps, from the start or from a state."""
    response, game = bl.Unrolled(problem.optimizer, steps=steps), problem.game(coordinates)
    hyper = coordinates.clone().requires_grad_()
    weights, _ = response(game, {"hyper": hyper}, response.init(game) if state is None else state)
    (gradient,) = torch.autograd.grad(problem.loss(weights, problem.digits.valid), hyper)
    return gradient


def after(problem: Problem, coordinates: Tensor, steps: int) -> State | None:
    """The state of a training that has taken so many steps; none is that of the start."""
    if steps == 0:
        return None
    response, game = bl.Unrolled(problem.optimizer, steps=steps), problem.game(coordinates)
    with torch.no_grad():
        return response(game, {"hyper": coordinates}, response.init(game))[1]


def compared(problem: Problem, coordinates: Tensor) -> list[dict[str, float]]:
    """Each truncated hypergradient beside the whole one."""
    whole, rows = slope(problem, coordinates, problem.steps), []
    for trained in TRAINED:
        state = after(problem, coordinates, trained)
        for horizon in HORIZONS:
            short = slope(problem, coordinates, horizon, state)
            right = short.sign() == whole.sign()
            cosine = float(cosine_similarity(short, whole, 0))
            signs = {"signs": int(right.sum()), "decay": int(right[0])}
            rows.append({"trained": trained, "horizon": horizon, "cosine": cosine} | signs)
    return rows


def main() -> None:
    """Measure and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("horizons.json"))
    options.add_argument("--quick", action="store_true", help="one start on one seed")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    results = {}
    for seed in CHOOSING[: 1 if chosen.quick else None]:
        problem = ten(seed)
        for start in STARTS["ten"][: 1 if chosen.quick else None]:
            results[f"{start} {seed}"] = compared(problem, started(problem, start))
    machine = {"machine": platform.machine(), "threads": 1, "python": platform.python_version()}
    written = {"machine": machine | {"torch": version("torch")}, "results": results}
    chosen.output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
