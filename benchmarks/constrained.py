"""The hypergradient of a quadratic follower within inequalities, beside qpth and cvxpylayers.

min_y 1/2 y'Qy - (Bx)'y subject to Gy <= h + Cx, with 100 variables, 50 inequalities and 20 leaders' variables, for a
batch of 128 leaders; the leader's loss is w'y + |y|^2 / 2. All in float64 on one thread. Who is not installed is left
out. Each way is held against the KKT conditions written by hand at the set that binds; rounds are interleaved, and
ratios are medians over rounds. Writes JSON.

    pip install qpth cvxpylayers      # in an environment of its own: qpth asks for an old NumPy
    python -m benchmarks.constrained --output constrained.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.head import head

D = torch.float64
Way = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the leaders `[count, 20]` to the answers `[count, 100]` and the hypergradients `[count, 20]`."""


class Problem:
    """The matrices, drawn from a seed."""

    def __init__(self, variables: int, inequalities: int, leaders: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=D)

        root = normal(variables, variables)
        self.Q = root @ root.T / variables + 0.1 * torch.eye(variables, dtype=D)
        self.B, self.G, self.C = (
            normal(variables, leaders),
            normal(inequalities, variables),
            normal(inequalities, leaders),
        )
        self.h, self.w = torch.rand(inequalities, generator=generator, dtype=D) * 3.0, normal(variables)
        self.x = normal(count, leaders)

    def lead(self, y: Tensor) -> Tensor:
        """The leader's loss of each answer `[..., 100]`."""
        return y @ self.w + 0.5 * (y * y).sum(-1)

    def game(self) -> bl.Game:
        """Its game, for one leader."""
        return bl.Game(
            x=bl.Player(lambda x, y: self.lead(y) + 0.0 * x.sum(), self.x[0]),
            y=bl.Player(
                lambda x, y: 0.5 * y @ self.Q @ y - (self.B @ x) @ y,
                torch.zeros_like(self.w),
                inequality=lambda x, y: self.G @ y - self.h - self.C @ x,
            ),
        )

    def by_hand(self, y: Tensor) -> Tensor:
        """The hypergradients at the answers `y: [count, 100]`, from the KKT matrix of what binds."""
        rows = []
        for x, one in zip(self.x, y, strict=True):
            binds = (self.G @ one - self.h - self.C @ x).abs() < 1e-7
            A, n = self.G[binds], len(one)
            K = torch.zeros(n + len(A), n + len(A), dtype=D)
            K[:n, :n], K[:n, n:], K[n:, :n] = self.Q, A.T, A
            adjoint = torch.linalg.solve(K, torch.cat([self.w + one, torch.zeros(len(A), dtype=D)]))
            rows.append(self.B.T @ adjoint[:n] + self.C[binds].T @ adjoint[n:])
        return torch.stack(rows)


def games_at_once(problem: Problem, inner: Any) -> Way:
    """All leaders as `Games`."""
    games = bl.Games(problem.game(), len(problem.x), init={"x": problem.x})
    response = bl.Implicit(inner, warm_start=False)
    state = response.init(games)

    def way(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y, _ = response(games, {"x": x}, state)
        (slope,) = torch.autograd.grad(games.loss("x", {"x": x, "y": y}).sum(), x)
        return y.detach(), slope

    return way


def one_by_one(problem: Problem, inner: Any) -> Way:
    """A loop over the leaders."""
    game, response = problem.game(), bl.Implicit(inner, warm_start=False)
    state = response.init(game)

    def way(x: Tensor) -> tuple[Tensor, Tensor]:
        answers, slopes = [], []
        for row in x:
            row = row.clone().requires_grad_()
            y, _ = response(game, {"x": row}, state)
            slopes.append(torch.autograd.grad(game.loss("x", {"x": row, "y": y}), row)[0])
            answers.append(y.detach())
        return torch.stack(answers), torch.stack(slopes)

    return way


def qpth(problem: Problem) -> Way:
    """OptNet's batched interior point method."""
    from qpth.qp import QPFunction

    none = torch.empty(0, dtype=D)

    def way(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        solve = QPFunction(verbose=-1, eps=1e-12, maxIter=50)
        y = solve(problem.Q, -x @ problem.B.T, problem.G, problem.h + x @ problem.C.T, none, none)
        (slope,) = torch.autograd.grad(problem.lead(y).sum(), x)
        return y.detach(), slope

    return way


def cvxpylayers(problem: Problem) -> Way:
    """The canonical cone programme, differentiated by diffcp."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    n, m = len(problem.w), len(problem.h)
    y, p, h = cp.Variable(n), cp.Parameter(n), cp.Parameter(m)
    root = torch.linalg.cholesky(problem.Q).T.numpy()
    objective = cp.Minimize(0.5 * cp.sum_squares(root @ y) + p @ y)
    layer = CvxpyLayer(cp.Problem(objective, [problem.G.numpy() @ y <= h]), parameters=[p, h], variables=[y])

    def way(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        tight = {"eps": 1e-10, "max_iters": 100_000}  # its default leaves errors of 1e-1
        (found,) = layer(-x @ problem.B.T, problem.h + x @ problem.C.T, solver_args=tight)
        (slope,) = torch.autograd.grad(problem.lead(found).sum(), x)
        return found.detach(), slope

    return way


def main() -> None:
    """Run the rounds and write what they took."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--variables", type=int, default=100)
    options.add_argument("--inequalities", type=int, default=50)
    options.add_argument("--leaders", type=int, default=20)
    options.add_argument("--count", type=int, default=128)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path("constrained.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    problem = Problem(chosen.variables, chosen.inequalities, chosen.leaders, chosen.count, chosen.seed)
    ways: dict[str, Way] = {}
    if importlib.util.find_spec("proxsuite"):
        ways["Implicit(ProxQP()), Games"] = games_at_once(problem, bl.inner.ProxQP())
        ways["Implicit(ProxQP()), one by one"] = one_by_one(problem, bl.inner.ProxQP())
    ways['Implicit(Scipy("SLSQP")), one by one'] = one_by_one(problem, bl.Scipy("SLSQP"))
    if importlib.util.find_spec("qpth"):
        ways["qpth"] = qpth(problem)
    if importlib.util.find_spec("cvxpylayers"):
        ways["cvxpylayers"] = cvxpylayers(problem)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(chosen.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way(problem.x)
            taken[name].append(time.perf_counter() - began)
    first = next(iter(answers.values()))[0]
    wanted = problem.by_hand(first)
    binding = ((first @ problem.G.T - problem.h - problem.x @ problem.C.T).abs() < 1e-7).sum(1).double()
    rows = [
        {
            "way": name,
            "seconds": statistics.median(seconds),
            "answer off by": float((answers[name][0] - first).abs().max()),
            "hypergradient off by": float((answers[name][1] - wanted).norm() / wanted.norm()),
        }
        for name, seconds in taken.items()
    ]
    if "qpth" in taken:
        for row in rows:
            pairs = zip(taken["qpth"], taken[str(row["way"])], strict=True)
            row["times as fast as qpth"] = statistics.median(theirs / ours for theirs, ours in pairs)
    settings = {key: value for key, value in vars(chosen).items() if key != "output"}
    told = {**head(seed=chosen.seed), "settings": settings, "binding": float(binding.mean()), "results": rows}
    chosen.output.write_text(json.dumps(told, indent=2))
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
