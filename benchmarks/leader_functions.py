"""A leader whose functions see its follower, by our augmented Lagrangian and by Cooper's, at the same follower.

The follower's answer is y = Q^-1 B x, 30 variables, given to both in closed form, so that only what moves the leader
differs. The leader has 20 variables, ten inequalities A y(x) <= b, of which some bind, and two equalities C y(x) = d.
Every way takes plain gradient steps or Adam's, with the same rates and penalties; an evaluation is one loss with all
functions and its gradient. Counted are evaluations until the value is within 1e-4 of the optimum (relatively, SciPy's
SLSQP on the whole programme) with no function broken by more than 1e-4, and stays so to the end. For each seed the best
setting of each way is quoted, and for how many settings it got there at all. Writes JSON.

    pip install cooper-optim
    python -m benchmarks.leader_functions --output docs/constraints/leader_functions.json
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

import bilevel as bl
from benchmarks.head import head

D = torch.float64
STEPS = 2000
CLOSE = 1e-4
OPTIMIZERS = {"SGD": partial(torch.optim.SGD, momentum=0.9), "Adam": torch.optim.Adam}
RATES, PENALTIES = (0.03, 0.1, 0.3), (1.0, 10.0, 100.0)
Trace = list[tuple[float, float]]
"""The value and the largest violation at each evaluation."""


class Problem:
    """The matrices, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=D, generator=generator)

        root = normal(30, 30) / 30**0.5
        self.answers = torch.linalg.solve(root @ root.T + 0.5 * torch.eye(30, dtype=D), normal(30, 20) / 20**0.5)
        self.target = normal(30)
        self.above, self.bound = normal(10, 30) / 30**0.5, 0.3 * normal(10).abs()
        self.equal, self.value = normal(2, 30) / 30**0.5, 0.3 * normal(2)
        self.best = self._optimum()

    def answer(self, x: Tensor) -> Tensor:
        """The follower's."""
        return self.answers @ x

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The leader's."""
        return 0.5 * (y - self.target).square().mean() + 0.01 * x.square().mean()

    def inequality(self, y: Tensor) -> Tensor:
        """At most 0, `[10]`."""
        return self.above @ y - self.bound

    def equality(self, y: Tensor) -> Tensor:
        """0, `[2]`."""
        return self.equal @ y - self.value

    def state(self, x: Tensor) -> tuple[float, float]:
        """The value, and the largest violation."""
        y = self.answer(x)
        broken = torch.cat([self.inequality(y).clamp(min=0.0), self.equality(y).abs()])
        return float(self.loss(x, y)), float(broken.max())

    def _optimum(self) -> float:
        def value(x: Any) -> tuple[float, Any]:
            at = torch.tensor(x, requires_grad=True)
            loss = self.loss(at, self.answer(at))
            return float(loss), torch.autograd.grad(loss, at)[0].numpy()

        above, equal = (self.above @ self.answers).numpy(), (self.equal @ self.answers).numpy()
        bounds = [
            {"type": "ineq", "fun": lambda x: self.bound.numpy() - above @ x, "jac": lambda x: -above},
            {"type": "eq", "fun": lambda x: equal @ x - self.value.numpy(), "jac": lambda x: equal},
        ]
        options = {"ftol": 1e-15, "maxiter": 1000}
        found = scipy.optimize.minimize(
            value, np.zeros(20), jac=True, method="SLSQP", constraints=bounds, options=options
        )
        assert found.success, found.message
        return float(found.fun)


def ours(problem: Problem, optimizer: Callable[..., Any], penalty: float) -> Trace:
    """By `solve`."""
    game = bl.Game(
        x=bl.Player(problem.loss, torch.zeros(20, dtype=D), inequality=problem.inequality, equality=problem.equality),
        y=bl.Player(lambda x, y: 0.5 * (y - problem.answer(x)).square().sum(), torch.zeros(30, dtype=D)),
    )
    found: Trace = []

    def look(step: int, record: Any, variables: Any) -> None:
        found.append(problem.state(variables["x"]))

    leader = bl.constraints.AugmentedLagrangian(optimizer, penalty=penalty)
    response = bl.Implicit(bl.ClosedForm(problem.answer), tolerance=None, linear_solver=bl.ConjugateGradient())
    bl.solve(game, y=response, optimizer=leader, steps=STEPS, callbacks=[look])
    return found


def coopers(problem: Problem, optimizer: Callable[..., Any], penalty: float, dual: float) -> Trace:
    """By Cooper's alternating optimiser, whose multipliers are learned by gradient ascent."""
    import cooper  # type: ignore[import-not-found]

    def constraint(kind: Any, count: int) -> Any:
        return cooper.Constraint(
            constraint_type=kind,
            formulation_type=cooper.formulations.AugmentedLagrangian,
            multiplier=cooper.multipliers.DenseMultiplier(num_constraints=count, dtype=D),
            penalty_coefficient=cooper.penalty_coefficients.DensePenaltyCoefficient(
                torch.full((count,), penalty, dtype=D)
            ),
        )

    class Programme(cooper.ConstrainedMinimizationProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.above = constraint(cooper.ConstraintType.INEQUALITY, 10)
            self.equal = constraint(cooper.ConstraintType.EQUALITY, 2)

        def compute_cmp_state(self, x: Tensor) -> Any:
            y = problem.answer(x)
            seen = {self.above: problem.inequality(y), self.equal: problem.equality(y)}
            states = {each: cooper.ConstraintState(violation=broken) for each, broken in seen.items()}
            return cooper.CMPState(loss=problem.loss(x, y), observed_constraints=states)

    x, programme = torch.nn.Parameter(torch.zeros(20, dtype=D)), Programme()
    played = cooper.optim.AlternatingDualPrimalOptimizer(
        cmp=programme,
        primal_optimizers=optimizer([x]),
        dual_optimizers=torch.optim.SGD(programme.dual_parameters(), lr=dual, maximize=True),
    )
    found: Trace = []
    for _ in range(STEPS):
        played.roll(compute_cmp_state_kwargs={"x": x})
        found.append(problem.state(x.detach()))
    return found


def settled(trace: Trace, best: float) -> int | None:
    """The first evaluation from which on the end is kept; None where it is not reached."""
    good = [abs(v - best) <= CLOSE * max(abs(best), 1e-12) and broken <= CLOSE for v, broken in trace]
    if not good or not good[-1]:
        return None
    return len(good) - next(i for i, each in enumerate(reversed([*([False]), *good])) if not each) + 1


def measured(seed: int) -> list[dict[str, Any]]:
    """All settings of all ways at one problem."""
    problem, rows = Problem(seed), []
    for (name, made), rate, penalty in itertools.product(OPTIMIZERS.items(), RATES, PENALTIES):
        optimizer = partial(made, lr=rate)
        ways: dict[str, Callable[[], Trace]] = {"bilevel": partial(ours, problem, optimizer, penalty)}
        if importlib.util.find_spec("cooper"):
            # Of an augmented Lagrangian the penalty is the multipliers' rate where each inner problem is solved; where
            # they move after every step it is too much, and a tenth or a hundredth may do better.
            for share in (1.0, 0.1, 0.01):
                ways[f"Cooper, dual rate {share:g} of the penalty"] = partial(
                    coopers, problem, optimizer, penalty, share * penalty
                )
        for way, run in ways.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    steps = settled(run(), problem.best)
                except bl.BilevelError:
                    steps = None
            rows.append({"seed": seed, "way": way, "optimizer": name, "rate": rate, "penalty": penalty, "steps": steps})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """All seeds, and the best setting of each way."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--output", type=Path, default=Path("leader_functions.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in range(chosen.seeds) for row in measured(seed)]
    summary = {}
    for way in dict.fromkeys(row["way"].split(",")[0] for row in rows):
        of_it = [row for row in rows if row["way"].split(",")[0] == way]
        best = []
        for seed in range(chosen.seeds):
            reached = [row["steps"] for row in of_it if row["seed"] == seed and row["steps"] is not None]
            best.append(min(reached, default=None))
        got = sum(row["steps"] is not None for row in of_it)
        whole = [each for each in best if each is not None]
        summary[way] = {
            "best by seed": best,
            "median": statistics.median(whole) if len(whole) == len(best) else None,
            "settings that got there": f"{got} of {len(of_it)}",
        }
        print(way, summary[way])
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    content = {**head("cooper-optim"), "steps": STEPS, "summary": summary, "rows": rows}
    chosen.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
