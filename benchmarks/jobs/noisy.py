"""Four labels in ten are wrong: weights of the examples, from 300 clean ones, by `games.reweighting`."""

from __future__ import annotations

import time
import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from benchmarks.jobs.parts import RETRAINED, TRIALS, Job, Parts, Row, best_of, digits, scored
from games.reweighting.noise import symmetric
from games.reweighting.reweight import reweight

STEPS, BATCH = 200, 128
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def data(seed: int) -> Parts:
    """600 digits with wrong labels; 300 of the validation digits are known to be right."""
    train, valid, test = digits(600, seed)
    noisy, _ = symmetric(train.tensors[1], 0.4, classes=10)
    return TensorDataset(train.tensors[0], noisy), TensorDataset(*(part[:300] for part in valid.tensors)), test


def network() -> nn.Module:
    """784-32-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def trained(
    seed: int, *, split: int, weights: Tensor | None = None, decay: float = 1e-4, smooth: float = 0.0
) -> nn.Module:
    """A fresh network on the noisy labels, at weights `[600]`."""
    torch.manual_seed(seed)
    model, train = network(), data(split)[0]
    weights = torch.ones(len(train)) if weights is None else weights
    rows = TensorDataset(*train.tensors, weights / weights.mean())
    optimizer, done = SGD(model.parameters(), weight_decay=decay), 0
    while done < STEPS:
        for x, y, w in DataLoader(rows, batch_size=BATCH, shuffle=True):
            optimizer.zero_grad()
            (w * cross_entropy(model(x), y, reduction="none", label_smoothing=smooth)).mean().backward()
            optimizer.step()
            done += 1
            if done == STEPS:
                break
    return model


def default(seed: int) -> Row:
    """As if all labels were right."""
    began = time.process_time()
    models = [trained(100 * seed + i, split=seed) for i in range(RETRAINED)]
    return {"default": scored(models, data(seed), began)}


def found(seed: int) -> Row:
    """The weights, and fresh trainings at them."""
    (train, valid, _), began = (parts := data(seed)), time.process_time()
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bl.BilevelWarning)
        # --- what somebody adds
        weighed = reweight(
            network(),
            train,
            valid,
            steps=20,
            response=bl.Unrolled(SGD, steps=20),
            batch_size=BATCH,
            weight_decay=1e-4,
            seed=seed,
        )
        weights = weighed.capped()
        # ---
    told: Row = {"warnings": [str(w.message) for w in caught if issubclass(w.category, bl.BilevelWarning)]}
    told |= {"the run itself": scored([weighed.model], parts, began), "hyper": {"mean weight": float(weights.mean())}}
    began = time.process_time()
    fresh = [trained(100 * seed + i, split=seed, weights=weights) for i in range(RETRAINED)]
    return told | {"found": scored(fresh, parts, began)}


def random(seed: int) -> Row:
    """A decay evenly in its logarithm from 1e-5 to 1e-1, and a smoothing from 0 to 0.5."""
    generator, trials = torch.Generator().manual_seed(seed), []
    for _ in range(TRIALS):
        share, smooth = torch.rand(2, generator=generator).tolist()
        trials.append(partial(trained, split=seed, decay=10.0 ** (4.0 * share - 5.0), smooth=0.5 * smooth))
    return {"random": best_of(trials, data(seed), seed)}


JOB = Job("noisy labels, 600 digits", {"default": default, "found": found, "random": random})
