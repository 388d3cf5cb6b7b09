"""Jobs whose loop `bl.tune` takes the place of, with its defaults: what is trained, on what, and what is tuned."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from benchmarks.jobs.parts import (
    CHECK,
    RETRAINED,
    TRIALS,
    Job,
    Parts,
    Row,
    advice,
    best_of,
    convolutions,
    digits,
    loss,
    scored,
)
from bilevel.hyper import Tuning
from games.mixture.texts import sources


@dataclass(frozen=True)
class Training:
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


class Attentive(nn.Module):
    """A small transformer on characters, read off by the mean of its places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(96, 32), nn.Parameter(0.1 * torch.randn(24, 32))
        layers = [nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True) for _ in range(2)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.layers(self.embedding(tokens) + self.places).mean(1))  # type: ignore[no-any-return]


def perceptron() -> nn.Module:
    """For the table."""
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2))


STRENGTHS = [bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing()]
AUGMENTATION = [bl.hyper.Shift(), bl.hyper.Rotation(), bl.hyper.Zoom(), bl.hyper.Noise()]
# Attention's own dropout is inside PyTorch's fused kernel: the layers that the encoder runs are named.
BLOCKS = [f"layers.{block}.{name}" for block in range(2) for name in ("dropout", "dropout1", "dropout2")]
TRAININGS = {
    "BatchNorm, 2,000 digits": Training(
        partial(convolutions, nn.BatchNorm2d), partial(digits, 2000), STRENGTHS, batch=50, steps=800
    ),
    "augmentation, 300 digits": Training(
        partial(convolutions, partial(nn.GroupNorm, 4)), partial(digits, 300), AUGMENTATION, batch=30, steps=600
    ),
    "GRU, 300 lines of text": Training(Reader, lines, STRENGTHS, batch=30, steps=600, rate=3e-3),
    "transformer, 300 lines of text": Training(
        Attentive,
        lines,
        [bl.hyper.WeightDecay(), bl.hyper.Dropout(of=BLOCKS), bl.hyper.LabelSmoothing()],
        batch=30,
        steps=600,
    ),
    "table, 60 rows": Training(perceptron, table, STRENGTHS, batch=20, steps=600),
}


def random_values(declared: Any, generator: torch.Generator) -> dict[str, Any]:
    """Drawn evenly in the free fraction of each range."""

    def drawn(leaf: Any) -> Tensor:
        return leaf.natural(torch.logit(torch.rand((), generator=generator)))  # type: ignore[no-any-return]

    return {name: bl.tree.map_leaves(drawn, leaf) for name, leaf in declared.items()}


def trained(job: Training, training: Callable[[nn.Module, Any], Tensor], data: TensorDataset, seed: int) -> nn.Module:
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


def default(job: Training, seed: int) -> Row:
    """Nothing tuned: the loss as it is, dropout as the model has it."""
    data, began = job.data(seed), time.process_time()
    return {"default": scored([trained(job, loss, data[0], 100 * seed + i) for i in range(RETRAINED)], data, began)}


def declared(job: Training, data: Parts) -> Tuning:
    """What is tuned."""
    batch = [tuple(part[: job.batch] for part in data[0].tensors)]
    return Tuning(job.make(), loss, loss, batch, batch, hyper=job.hyper)


def start(job: Training, seed: int) -> Row:
    """Fresh trainings at the values that `tune` starts with."""
    data, began = job.data(seed), time.process_time()
    tuning = declared(job, data)
    at = tuning.loss_at(tuning.game().initial(tuning.leader))
    return {"start": scored([trained(job, at, data[0], 100 * seed + i) for i in range(RETRAINED)], data, began)}


def run(job: Training, seed: int, check: float) -> tuple[bl.tuning.Tuned, list[str]]:
    """One run of `tune`, and the library's warnings."""
    train, valid, _ = job.data(seed)
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
            check=check,
        )
    return tuned, [str(w.message) for w in caught if issubclass(w.category, bl.BilevelWarning)]


def found(job: Training, seed: int) -> Row:
    """One run of `tune`: its own model, and fresh trainings at the values that it found."""
    data, began = job.data(seed), time.process_time()
    tuned, _ = run(job, seed, check=0.0)
    told: Row = {"the run itself": scored([tuned.model], data, began), "hyper": tuned.numbers}
    began, at = time.process_time(), tuned.tuning.loss_at(tuned.hyper)
    fresh = [trained(job, at, data[0], 100 * seed + i) for i in range(RETRAINED)]
    return told | {"found": scored(fresh, data, began)}


def checked(job: Training, seed: int) -> Row:
    """The same run once more, with tune's own check: which values it advises, and what it warns of."""
    began = time.process_time()
    tuned, told = run(job, seed, check=CHECK)
    return {"check": advice(tuned, began), "warnings": told}


def random(job: Training, seed: int) -> Row:
    """The best of ten."""
    data, generator = job.data(seed), torch.Generator().manual_seed(seed)
    tuning = declared(job, data)

    def trial(at: Callable[[nn.Module, Any], Tensor], seed: int) -> nn.Module:
        return trained(job, at, data[0], seed)

    losses = [tuning.loss_at(random_values(tuning.init, generator)) for _ in range(TRIALS)]
    return {"random": best_of([partial(trial, at) for at in losses], data, seed)}


PARTS = {"default": default, "start": start, "found": found, "check": checked, "random": random}
JOBS = [Job(name, {part: partial(measure, job) for part, measure in PARTS.items()}) for name, job in TRAININGS.items()]
