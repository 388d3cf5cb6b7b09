"""How often the intervals of `hypergradient_interval` hold what they are of, on games with known answers.

Ridge regression with fresh batches and eight terms of Neumann's series; logistic regression with the same; ridge
regression with a held batch, beside all batches, whose difference is known too. Each draw is an experiment of its own:
6 or 12 replications, a 95 % interval, and whether it holds the mean that is known in closed form. Writes JSON.

    python benchmarks/coverage.py --output coverage.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl
from benchmarks.head import head
from bilevel.responses import AllBatches, FreshBatches

D = torch.float64
X = torch.tensor([-0.5, 0.3, 0.1], dtype=D)
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=D)
DIRECTION = torch.tensor([1.0, -1.0, 2.0], dtype=D)
BATCH, HELD, TERMS, STEP, LEVEL = 4, 8, 8, 0.2, 0.95


@dataclass(frozen=True)
class Experiment:
    """A game, a response, and what the intervals should hold: the mean `[3]`, and the bias where it is known."""

    name: str
    game: bl.Game
    response: bl.Response
    mean: Tensor
    against: bl.Response | None = None
    bias: Tensor | None = None
    replications: int = 6

    def draw(self, seed: int) -> tuple[bool, bool]:
        """Whether one interval holds the derivative along a direction, and one of the bias that of the bias."""
        found = bl.certificates.hypergradient_interval(
            self.game,
            self.response,
            direction=DIRECTION,
            against=self.against,
            replications=self.replications,
            level=LEVEL,
            seed=seed,
        )
        held = bool(found.hypergradient.covers(self.mean @ DIRECTION))
        if self.bias is None or found.bias is None:
            return held, True
        return held, bool(found.bias.covers(self.bias @ DIRECTION))


def rows(seed: int, count: int) -> Tensor:
    """Inputs and an output each, `[count, 4]`."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=D)


def drawn(data: Tensor) -> Callable[[], Iterator[Tensor]]:
    """Batches that are drawn with replacement."""
    return lambda: (data[torch.randint(len(data), (BATCH,))] for _ in range(64))


def lead(y: Tensor, batch: Tensor) -> Tensor:
    """How far y is from a target that batches scatter about."""
    return (y - TARGET - batch[:, :3]).square().sum(1).mean()


def ridge(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    """Squares, and a penalty for each weight."""
    return 0.5 * (batch[:, :3] @ y - batch[:, 3]).square().mean() + 0.5 * (x.exp() * y.square()).sum()


def logistic(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    """Two classes by the output's sign, and a penalty for each weight."""
    return softplus(-batch[:, 3].sign() * (batch[:, :3] @ y)).mean() + 0.5 * (x.exp() * y.square()).sum()


def at(follow: Callable[..., Tensor], y: Tensor, data: Tensor) -> Tensor:
    """The follower's Hessian at y."""
    return torch.func.hessian(follow, 1)(X, y, data)


def optimum(follow: Callable[..., Tensor], data: Tensor) -> Tensor:
    """By Newton's method."""
    y = torch.zeros(3, dtype=D)
    for _ in range(30):
        y = y - torch.linalg.solve(at(follow, y, data), torch.func.grad(follow, 1)(X, y, data))
    return y


def experiments() -> list[Experiment]:
    """All three."""
    valid, train = rows(1, 32), rows(2, 32)

    def players(follow: Callable[..., Tensor], leads: Any, follows: Any) -> bl.Game:
        zero = torch.zeros(3, dtype=D)
        return bl.Game(x=bl.Player(lead, X, data=leads), y=bl.Player(follow, zero, data=follows))

    def settled(y: Tensor, **options: Any) -> bl.Implicit:
        # The answer is given, a function of x in form: its derivative is what the linear solver makes.
        return bl.Implicit(bl.ClosedForm(lambda x: y + 0.0 * x), tolerance=None, **options)

    found = []
    solver = bl.Neumann(max_steps=TERMS, step_size=STEP, power_steps=0, rtol=None)
    for name, follow in (("ridge, fresh batches", ridge), ("logistic, fresh batches", logistic)):
        y = optimum(follow, train)
        slope, matrix = torch.func.grad(lead)(y, valid), at(follow, y, train)
        u = torch.zeros(3, dtype=D)
        for _ in range(TERMS + 1):
            u = u + STEP * (slope - matrix @ u)
        game = players(follow, drawn(valid), drawn(train))
        response = settled(y, linear_solver=solver, batches=FreshBatches())
        found.append(Experiment(name, game, response, -X.exp() * y * u))
    y, solver_of_one = optimum(ridge, train), bl.ConjugateGradient(rtol=1e-12)
    slope, cut = torch.func.grad(lead)(y, valid), list(train.split(HELD))
    adjoints = [torch.linalg.solve(at(ridge, y, batch), slope) for batch in cut]
    mean, exact = torch.stack(adjoints).mean(0), torch.linalg.solve(at(ridge, y, train), slope)
    game = players(ridge, list(valid.split(BATCH)), cut)
    held, whole = (settled(y, linear_solver=solver_of_one, **more) for more in ({}, {"batches": AllBatches()}))
    bias = -X.exp() * y * (exact - mean)
    found.append(Experiment("ridge, a held batch", game, held, -X.exp() * y * mean, whole, bias, 12))
    return found


def covered(experiment: Experiment, draws: int) -> dict[str, Any]:
    """How many of so many intervals hold what they are of."""
    results = [experiment.draw(seed) for seed in range(draws)]
    counted = {"mean": sum(mean for mean, _ in results)}
    if experiment.bias is not None:
        counted["bias"] = sum(bias for _, bias in results)
    return {"experiment": experiment.name, "draws": draws, "replications": experiment.replications, "held": counted}


def main() -> None:
    """All experiments, written as they come."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--draws", type=int, default=1000)
    options.add_argument("--experiment", type=int, action="append", help="0, 1 or 2; all when left out")
    options.add_argument("--output", type=Path, default=Path("coverage.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    settings = {"level": LEVEL, "batch": BATCH, "held_batch": HELD, "terms": TERMS}
    found = []
    wanted = chosen.experiment or [0, 1, 2]
    for experiment in (experiments()[number] for number in wanted):
        found.append(covered(experiment, chosen.draws))
        print(found[-1], flush=True)
        chosen.output.write_text(json.dumps({**head(), **settings, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
