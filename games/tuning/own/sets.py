"""Training, validation and test data of one's own, as batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from games.errors import DataError
from games.experiments.console import UsageError
from games.experiments.data import stratified_order
from games.tuning.own import named
from games.tuning.own.arrays import Examples, read

_ENDLESS = 10_000  # batches of a loader without a length
_SHARE = 5  # one example in so many is for validation, where the data do not say which


@dataclass(frozen=True, eq=False)
class Sets:
    """Batches of (inputs, labels), or what a user's loaders give; `fingerprint` differs between data.

    `judged` is the validation data once more, all of it, for what is told of the trained model.
    """

    name: str
    train: Iterable[Any]
    valid: Iterable[Any]
    test: Iterable[Any] | None
    fingerprint: str
    judged: Iterable[Any]


def sets(
    data: str | None, *, train: int | None, valid: int | None, batch: int, seed: int, image_size: int | None
) -> Sets:
    """What --data names; raises `DataError` and `UsageError` in one line."""
    if data is not None and named.is_named(data):
        if train is not None or valid is not None:
            raise UsageError(f"--train and --valid cut data from files; {data} returns loaders, which it cuts itself.")
        return _of_function(data)
    name, parts = read(data, image_size)
    parts = _cut(name, parts, train, valid, seed)
    digest = hashlib.sha256()
    for examples in parts.values():
        digest.update(examples.inputs.numpy().tobytes() + examples.labels.numpy().tobytes())
    test = parts.get("test")
    return Sets(
        name,
        _loader(parts["train"], batch, shuffle=True),
        _loader(parts["valid"], 4 * batch, shuffle=True),
        None if test is None else _loader(test, 4 * batch, shuffle=False),
        digest.hexdigest()[:16],
        _loader(parts["valid"], 4 * batch, shuffle=False),
    )


def _of_function(data: str) -> Sets:
    found = named.called(named.function(data, "--data"), data, "--data")
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        came = f"{len(found)} things" if isinstance(found, tuple | list) else f"a {type(found).__name__}"
        raise UsageError(f"--data {data} returned {came}; expected loaders (train, valid) or (train, valid, test).")
    for name, loader in zip(("train", "valid", "test"), found, strict=False):
        if not isinstance(loader, Iterable) or isinstance(loader, Tensor) or iter(loader) is loader:
            raise UsageError(
                f"--data {data} returned a {type(loader).__name__} for {name}; expected a DataLoader, a list of "
                "batches, or what else can be iterated again and again."
            )
    for name, loader in zip(("valid", "test"), found[1:], strict=False):
        _require_end(f"--data {data}: the {name} loader", loader)
    sizes = [_size(loader) for loader in found]
    digest = f"{data}, batches and examples {sizes}"
    train, valid, *test = found
    return Sets(data, train, valid, test[0] if test else None, digest, valid)


def _require_end(told: str, loader: Iterable[Any]) -> None:
    """Raise `UsageError`, before any training, where all of a loader's batches are wanted and there is no end."""
    with suppress(TypeError):
        len(loader)  # type: ignore[arg-type]
        return
    if sum(1 for _ in islice(loader, _ENDLESS + 1)) > _ENDLESS:
        raise UsageError(
            f"{told} has no length and gave {_ENDLESS:,} batches without an end, and all of it is evaluated. Give one "
            "that ends, or say its length, len(loader)."
        )


def _size(loader: Any) -> list[int]:
    """How many batches a loader has, and how many examples, as far as it says."""
    found: list[int] = []
    parts: list[Any] = [loader, getattr(loader, "dataset", None)]
    for part in parts:
        with suppress(TypeError):
            found.append(len(part))
    return found


def _cut(name: str, parts: dict[str, Examples], train: int | None, valid: int | None, seed: int) -> dict[str, Examples]:
    """As many as asked for; validation examples from the training data where there are none."""
    for option, count in (("train", train), ("valid", valid)):
        if count is not None and count < 1:
            raise UsageError(f"--{option} {count}: expected at least 1.")
    found = dict(parts)
    whole = _shuffled(parts["train"], seed)
    if "valid" in parts:
        found["valid"] = _first(f"{name}, validation,", _shuffled(parts["valid"], seed), 0, valid)
        taken = 0
    else:
        taken = max(1, len(whole) // _SHARE) if valid is None else valid
        found["valid"] = _first(name, whole, 0, taken)
    found["train"] = _first(name, whole, taken, train)
    return found


def _shuffled(examples: Examples, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    labels = examples.labels
    rows = (
        torch.randperm(len(labels), generator=generator)
        if labels.is_floating_point() or labels.ndim > 1
        else stratified_order(labels, generator)
    )
    return Examples(examples.inputs[rows], labels[rows])


def _first(name: str, examples: Examples, start: int, count: int | None) -> Examples:
    asked = start + (1 if count is None else count)
    if asked > len(examples):
        raise DataError(f"{asked:,} examples were asked for; {name} has {len(examples):,}.")
    rows = slice(start, None if count is None else asked)
    return Examples(examples.inputs[rows], examples.labels[rows])


def _loader(examples: Examples, batch: int, *, shuffle: bool) -> DataLoader[Any]:
    """Batches cut from the tensors at once. A last one that is smaller is left out of training passes."""
    data = TensorDataset(examples.inputs, examples.labels)
    size = min(batch, len(examples))
    order: Any = RandomSampler(data) if shuffle else SequentialSampler(data)
    sampler: Any = BatchSampler(order, size, drop_last=shuffle)
    return DataLoader(data, sampler=sampler, batch_size=None)
