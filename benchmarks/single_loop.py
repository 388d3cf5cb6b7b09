"""Stochastic bilevel problems of the field's benchmark, restated: |grad h|^2 over passes and over seconds.

Quadratics: 1,024 + 1,024 samples, 100 x 100 unknowns, Hessians with a spectrum from .1 to 1 on average, each sample's
of rank one; |grad h|^2 in closed form. Logistic regression with a penalty exp(x_j) z_j^2 / 2 for each of 22 weights, in
the shape of ijcnn1, on simulated data: |grad h|^2 after Newton's method. Batches of 64, made once, in another order in
each pass.

A pass is as many evaluations (a gradient of either player, or a Hessian-vector product) as see each of a player's
samples once. Seconds are those of `solve`, without what measures. Writes JSON.

    python benchmarks/single_loop.py --output single_loop.json
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl
from benchmarks.head import head
from bilevel.dynamics import VarianceReduced
from bilevel.variance import SAGA, SARAH, VarianceReduction

SGD = torch.optim.SGD
D = torch.float64
BATCH = 64


@dataclass(frozen=True)
class Problem:
    """A game by its data, and the exact gradient of the leader's value."""

    name: str
    lead: Callable[..., Tensor]
    follow: Callable[..., Tensor]
    leader_rows: Tensor
    follower_rows: Tensor
    sizes: tuple[int, int]
    exact: Callable[[Tensor], Tensor]

    def game(self, batch: int | None) -> bl.Game:
        """With batches of so many samples, or with all of them at once."""
        x, y = (torch.zeros(size, dtype=D) for size in self.sizes)
        return bl.Game(
            x=bl.Player(self.lead, x, data=shuffled(self.leader_rows, batch)),
            y=bl.Player(self.follow, y, data=shuffled(self.follower_rows, batch)),
        )

    def samples(self) -> int:
        """Of the follower, in a pass."""
        return len(self.follower_rows)


def shuffled(rows: Tensor, batch: int | None) -> Any:
    """The same batches in each pass, in another order each time."""
    if batch is None:
        return [rows]
    made = list(rows.split(batch))

    def one_pass() -> Iterator[Tensor]:
        return (made[index] for index in torch.randperm(len(made)).tolist())

    return one_pass


def quadratics(seed: int, n: int = 1024, d: int = 100, mu: float = 0.1, cross: float = 0.1) -> Problem:
    """Each sample: (a'y)^2 / 2 + (b'x)^2 / 2 + (c'x)(e'y) + l'y + m'x; drawn until the value is strongly convex."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=D)

    def rows() -> Tensor:
        def features(spectrum: Tensor) -> Tensor:
            axes, _ = torch.linalg.qr(normal(d, d))
            return normal(n, d) @ (axes * spectrum.sqrt()) @ axes.T

        a = features(torch.logspace(math.log10(mu), 0.0, d, dtype=D))
        b = features(torch.cat([torch.zeros(1, dtype=D), torch.logspace(math.log10(mu), 0.0, d - 1, dtype=D)]))
        left, right = (torch.linalg.qr(normal(d, d))[0] for _ in range(2))
        inner = normal(n, d)
        c = inner @ torch.diag(torch.logspace(math.log10(mu), math.log10(cross), d, dtype=D)) @ left.T
        return torch.stack([a, b, c, inner @ right.T, normal(n, d), normal(n, d)], dim=1)

    def loss(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        a, b, c, e, linear_y, linear_x = batch.unbind(1)
        squares = 0.5 * ((a @ y).square() + (b @ x).square())
        return (squares + (c @ x) * (e @ y) + linear_y @ y + linear_x @ x).mean()

    def means(data: Tensor) -> tuple[Tensor, ...]:
        a, b, c, e, linear_y, linear_x = data.unbind(1)
        return a.T @ a / n, b.T @ b / n, c.T @ e / n, linear_y.mean(0), linear_x.mean(0)

    while True:
        leader, follower = rows(), rows()
        (f_yy, f_xx, f_xy, f_y, f_x), (g_yy, _, g_xy, g_y, _) = means(leader), means(follower)
        moves = -torch.linalg.solve(g_yy, g_xy.T)
        value = f_xx + moves.T @ f_yy @ moves + f_xy @ moves + (f_xy @ moves).T
        if float(torch.linalg.eigvalsh(value).min()) > 1e-12:
            break

    def exact(x: Tensor) -> Tensor:
        y = -torch.linalg.solve(g_yy, g_y + g_xy.T @ x)
        return f_xx @ x + f_xy @ y + f_x + moves.T @ (f_yy @ y + f_xy.T @ x + f_y)

    return Problem("quadratics", loss, loss, leader, follower, (d, d), exact)


def logistic(seed: int, n: int = 4096, held: int = 1024, d: int = 22) -> Problem:
    """A regression of two classes, whose leader sets a penalty for each weight on samples that are held out."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=D)
    truth, scales = normal(d) * (torch.arange(d) < d // 2), 0.3 + torch.rand(d, generator=generator, dtype=D)

    def rows(count: int) -> Tensor:
        inputs = normal(count, d) * scales
        label = torch.sign(inputs @ truth + normal(count))
        return inputs * label[:, None]

    train, valid = rows(n), rows(held)

    def follow(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return softplus(-batch @ y).mean() + 0.5 * (x.exp() * y.square()).sum()

    def lead(y: Tensor, batch: Tensor) -> Tensor:
        return softplus(-batch @ y).mean()

    def exact(x: Tensor) -> Tensor:
        y = torch.zeros(d, dtype=D)
        for _ in range(50):
            slope = torch.func.grad(follow, 1)(x, y, train)
            if float(slope.norm()) < 1e-14:
                break
            y = y - torch.linalg.solve(torch.func.hessian(follow, 1)(x, y, train), slope)
        adjoint = torch.linalg.solve(torch.func.hessian(follow, 1)(x, y, train), torch.func.grad(lead)(y, valid))
        return -x.exp() * y * adjoint

    return Problem("logistic", lead, follow, valid, train, (d, d), exact)


@dataclass(frozen=True)
class Method:
    """How a game is played: batches of the players, the leader's rate, and the rest of `solve`'s arguments."""

    name: str
    batch: int | None
    rate: float
    steps: int
    response: bl.Response
    reduction: VarianceReduction | None = None
    decaying: bool = False


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates that fall like t^-1/2."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, _root)


def _root(step: int) -> float:
    return (1.0 + step) ** -0.5


def loops(rho: float, rate: float, falling: tuple[float, float], period: int, steps: int, sarah: float) -> list[Method]:
    """The single loops, with their step sizes."""

    def loop(rho: float, variance: VarianceReduction | None) -> bl.SingleLoop:
        return bl.SingleLoop(partial(SGD, lr=rho), variance=variance)

    slow = bl.SingleLoop(bl.inner.TorchOptimizer(partial(SGD, lr=falling[0]), scheduler=decay))
    return [
        Method("SOBA", BATCH, falling[1], steps, slow, decaying=True),
        Method("SABA", BATCH, rate, steps, loop(rho, SAGA()), SAGA()),
        Method("SRBA", BATCH, sarah * rate / rho, steps, loop(sarah, SARAH(period)), SARAH(period)),
    ]


def optima(rho: float, rate: float, steps: int, inner: int, batch_rate: float) -> list[Method]:
    """Those that go for the follower's optimum in each step."""
    sgd, solver = partial(SGD, lr=rho), bl.ConjugateGradient(rtol=1e-3)
    whole = bl.Implicit(sgd, steps=inner, tolerance=1e-6, linear_solver=solver)
    few = bl.Implicit(sgd, steps=1, tolerance=None, linear_solver=bl.ConjugateGradient(max_steps=1, rtol=None))
    return [
        Method("Implicit, full batch", None, rate, steps, whole),
        Method("Implicit, minibatch, one step", BATCH, batch_rate, 10 * steps, few),
        Method("Nudged, full batch", None, rate, steps, bl.Nudged(sgd, steps=inner, tolerance=1e-6)),
    ]


def run(problem: Problem, method: Method, seed: int) -> dict[str, Any]:
    """One run, measured some 50 times on its way."""
    every, curve = max(1, method.steps // 50), []
    seen = problem.samples() if method.batch is None else method.batch

    def measure(step: int, record: dict[str, float], variables: dict[str, Tensor]) -> None:
        if step % every == 0 or step == method.steps:
            value = float(problem.exact(variables["x"]).square().sum())
            passes = record["work"] * seen / problem.samples()
            curve.append({"step": step, "passes": passes, "seconds": record["seconds"], "value": value})

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            bl.solve(
                problem.game(method.batch),
                y=method.response,
                optimizer=partial(SGD, lr=method.rate),
                scheduler=decay if method.decaying else None,
                dynamics=None if method.reduction is None else VarianceReduced(method.reduction),
                steps=method.steps,
                callbacks=[measure],
                seed=seed,
            )
            failed = None
        except bl.BilevelError as error:
            failed = str(error)
    return {"problem": problem.name, "method": method.name, "seed": seed, "failed": failed, "curve": curve}


def main() -> None:
    """Run all methods on both problems and write the curves."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=2240, help="of the single loops; 140 passes of the quadratics")
    options.add_argument("--output", type=Path, default=Path("single_loop.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    few = max(2, chosen.steps // 20)
    rows = []
    for seed in range(chosen.seeds):
        plans = [
            (
                quadratics(seed),
                loops(0.2, 0.2, (0.2, 0.2), period=16, steps=chosen.steps, sarah=0.2) + optima(0.9, 0.5, few, 20, 0.1),
            ),
            (
                logistic(seed),
                loops(0.125, 0.125, (0.03125, 3.125), period=40, steps=chosen.steps, sarah=0.25)
                + optima(0.5, 5.0, few, 20, 1.0),
            ),
        ]
        for problem, methods in plans:
            for method in methods:
                row = run(problem, method, seed)
                rows.append(row)
                last = row["curve"][-1] if row["curve"] else {"value": math.nan, "passes": 0.0, "seconds": 0.0}
                told = f"{last['value']:.2e} after {last['passes']:.0f} passes, {last['seconds']:.1f} s"
                chosen.output.write_text(json.dumps({**head(), "batch": BATCH, "rows": rows}, indent=1))
                print(f"{problem.name:>10}  seed {seed}  {method.name:<30} {row['failed'] or told}", flush=True)


if __name__ == "__main__":
    main()
