"""What `torch.compile` would be worth to a Hessian-vector product: measured, and not taken into the library.

The follower's products come from one graph of its gradient that is kept for the whole solve. A compiled product is a
function of the weights and the vector instead, and evaluates the gradient anew each time; forward over reverse and
reverse over reverse, compiled whole or refused. Medians of CPU seconds, and of the seconds that compiling took.

    python -m benchmarks.compiled --output docs/performance/compiled.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from benchmarks.head import head

sys.path.insert(0, str(Path(__file__).parent / "equal_work"))

from problem import Problem, problems  # a program beside this one

Product = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Each way on each size."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--problem", action="append", help="7,850 weights, 1M weights or 10M weights; default 2")
    options.add_argument("--output", type=Path, default=Path("compiled.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows = [row for p in problems(chosen.problem or ["7,850 weights", "1M weights"]) for row in ways(p, chosen.rounds)]
    chosen.output.write_text(json.dumps({**head(), "rounds": chosen.rounds, "rows": rows}, indent=1) + "\n")


def ways(problem: Problem, rounds: int) -> list[dict[str, object]]:
    """The kept graph, and both compositions with and without compilation, in turns."""
    sizes = [w.numel() for w in problem.weights]

    def loss(y: Tensor) -> Tensor:
        parts = zip(y.split(sizes), problem.weights, strict=True)
        return problem.follow(problem.decays, tuple(part.view_as(w) for part, w in parts))

    def forward_over_reverse(y: Tensor, v: Tensor) -> Tensor:
        return jvp(grad(loss), (y,), (v,))[1]  # type: ignore[no-any-return]

    def reverse_over_reverse(y: Tensor, v: Tensor) -> Tensor:
        return vjp(grad(loss), y)[1](v)[0]  # type: ignore[no-any-return]

    y = torch.cat([w.reshape(-1) for w in problem.weights])
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    at = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(at), at, create_graph=True)

    def kept(y: Tensor, v: Tensor) -> Tensor:
        return torch.autograd.grad(slope, at, v, retain_graph=True)[0]

    tried: dict[str, tuple[Product, float]] = {"one graph, kept": (kept, 0.0)}
    for function in (forward_over_reverse, reverse_over_reverse):
        name = function.__name__.replace("_", " ")
        tried[name] = (function, 0.0)
        began = time.perf_counter()
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        compiled(y, v)
        tried[f"{name}, compiled"] = (compiled, time.perf_counter() - began)
    truth = kept(y, v)
    taken: dict[str, list[float]] = {name: [] for name in tried}
    for _ in range(rounds):
        for name, (product, _) in tried.items():
            began = time.process_time()
            product(y, v)
            taken[name].append(time.process_time() - began)
    told = []
    for name, (product, compiling) in tried.items():
        ratios = [mine / floor for mine, floor in zip(taken[name], taken["one graph, kept"], strict=True)]
        apart = float((product(y, v) - truth).norm() / truth.norm())
        told.append(
            {
                "problem": problem.name,
                "way": name,
                "cpu seconds": statistics.median(taken[name]),
                "ratio": statistics.median(ratios),
                "seconds to compile": compiling,
                "apart": apart,
            }
        )
        print(told[-1], flush=True)
    return told


if __name__ == "__main__":
    main()
