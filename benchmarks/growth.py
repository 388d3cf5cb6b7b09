"""How the cost of one hypergradient grows with the follower's weights, the leader's entries, and the inner steps.

Tanh networks on 128 random examples; one log decay for each group of weights. CPU seconds are the least of some rounds,
peak memory is counted (see equal_work/run.py). Slopes are those of log cost on log size over the upper half of each
range: 1 is proportional. Float32, one thread.

    python benchmarks/growth.py --output docs/performance/growth.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.head import head
from bilevel.comparison.memory import peak_bytes

LR = 0.05


def game_of(weights: int, leaders: int) -> tuple[bl.Game, dict[str, Tensor]]:
    """A network of about so many weights (64 inputs, two hidden layers alike, 10 outputs), so many log decays."""
    torch.manual_seed(0)
    width = max(4, round((-74 + math.sqrt(74**2 + 4 * weights)) / 2))
    widths = (64, width, width, 10)
    start = [a**-0.5 * torch.randn(b, a) for a, b in itertools.pairwise(widths)]
    images, labels = torch.randn(256, 64), torch.randint(10, (256,))
    count = sum(w.numel() for w in start)
    leaders = min(leaders, count)
    groups = torch.arange(count) * leaders // count

    def fit(weights: tuple[Tensor, ...], rows: slice) -> Tensor:
        hidden = images[rows]
        for weight in weights[:-1]:
            hidden = torch.tanh(hidden @ weight.T)
        return cross_entropy(hidden @ weights[-1].T, labels[rows])

    def follow(decay: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        every = torch.cat([w.reshape(-1) for w in weights])
        strengths = decay.exp() if leaders == 1 else decay.exp()[groups]
        return fit(weights, slice(0, 128)) + (strengths * every.square()).sum()

    game = bl.Game(
        decay=bl.Player(lambda weights: fit(weights, slice(128, 256)), torch.zeros(leaders)),
        weights=bl.Player(follow, tuple(start)),
    )
    return game, {"weights": count, "leaders": leaders}


def responses(game: bl.Game, steps: int) -> dict[str, bl.Response]:
    """Each kind with so many steps, iterations or terms."""
    still = bl.ClosedForm(lambda: game.initial("weights"))
    return {
        "unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=LR, momentum=0.9), steps=steps),
        "conjugate gradients": bl.Implicit(
            still, tolerance=None, linear_solver=bl.ConjugateGradient(rtol=None, max_steps=steps)
        ),
        "Neumann": bl.Implicit(
            still,
            tolerance=None,
            linear_solver=bl.Neumann(rtol=None, max_steps=steps, step_size=0.05, power_steps=0),
        ),
        "learned, low rank": bl.Hypernetwork(
            partial(torch.optim.Adam, lr=1e-3), network=bl.networks.LowRank(10), tolerance=None
        ),
    }


def cost(game: bl.Game, response: bl.Response, rounds: int) -> dict[str, float]:
    """CPU seconds and peak bytes of one hypergradient."""
    state = response.init(game)

    def run() -> None:
        decay = game.initial("decay").requires_grad_()
        weights, _ = response(game, {"decay": decay}, state)
        torch.autograd.grad(game.loss("decay", {"decay": decay, "weights": weights}), decay)

    run()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return {"seconds": min(taken), "bytes": peak_bytes(run, torch.device("cpu"))}


def slope(rows: list[dict], key: str, axis: str) -> float:
    """Of log cost on log size, over the upper half."""
    upper = rows[len(rows) // 2 :]
    xs, ys = ([math.log(row[name]) for row in upper] for name in (axis, key))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def main() -> None:
    """Three sweeps."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--quick", action="store_true", help="up to a hundred thousand weights")
    options.add_argument("--output", type=Path, default=Path("growth.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    most = 5 if chosen.quick else 7
    sweeps = {
        "weights": [(10**k, 10, 5) for k in range(3, most + 1)],
        "leaders": [(10 ** (most - 1), 10**k, 5) for k in range(most)],
        "steps": [(10 ** (most - 2), 10, steps) for steps in (5, 10, 20, 50, 100, 200)],
    }
    found = []
    for axis, points in sweeps.items():
        rows: dict[str, list[dict]] = {}
        for weights, leaders, steps in points:
            game, sizes = game_of(weights, leaders)
            for name, response in responses(game, steps).items():
                if axis == "steps" and name not in ("unrolled", "Neumann"):
                    continue  # the one takes none, the other stops when it is done
                told = {"axis": axis, "response": name, **sizes, "steps": steps, **cost(game, response, chosen.rounds)}
                rows.setdefault(name, []).append(told)
                print(told, flush=True)
        for name, some in rows.items():
            slopes = {f"{key} slope": slope(some, key, axis) for key in ("seconds", "bytes")}
            found.append({"axis": axis, "response": name, **slopes, "rows": some})
    chosen.output.write_text(json.dumps({**head(), "sweeps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
