"""The IDX format of MNIST and its relatives: a folder of four files. Each defect is one line that names the file."""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from games.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_MOST_PACKED = 1032  # how many bytes of DEFLATE's one byte can stand for
_HEADER = 4 + 4 * 3  # of the files with the most axes, images
_IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


def check_folder(path: Path) -> None:
    """Raise `DataError` unless `path` is a folder that can be listed."""
    try:
        os.scandir(path).close()
    except FileNotFoundError as error:
        raise DataError(f"There is no folder {quoted(path)}.") from error
    except NotADirectoryError as error:
        raise DataError(f"{quoted(path)} is not a folder; expected one with four IDX files.") from error
    except OSError as error:
        raise DataError(f"{quoted(path)} cannot be read: {error.strerror or error}.") from error


def read_images_and_labels(folder: Path, part: str, classes: int) -> tuple[Tensor, Tensor]:
    """`images: [n, rows, columns]`, uint8, and `labels: [n]`, long, of the part "train" or "t10k"."""
    images_path = _find(folder, f"{part}-images", 3)
    labels_path = _find(folder, f"{part}-labels", 1)
    images = _read_idx(images_path, ("count", "rows", "columns"))
    labels = _read_idx(labels_path, ("count",)).long()
    if len(images) != len(labels):
        raise DataError(
            f"{quoted(images_path)} has {len(images):,} images, {quoted(labels_path)} has {len(labels):,} labels; "
            "they must be as many."
        )
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{quoted(images_path)}: images are {dimensions(images.shape[1:])}; expected square ones.")
    if int(labels.max()) >= classes:
        raise DataError(
            f"{quoted(labels_path)}: a label is {int(labels.max())}; expected 0 to {classes - 1} for {classes} classes."
        )
    return images, labels


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{dot}idx{dimensions}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    raise DataError(f"{quoted(folder)} has none of {', '.join(names)}.")


def _read_idx(path: Path, axes: tuple[str, ...]) -> Tensor:
    """The array of an IDX file of unsigned bytes, with one dimension for each of `axes`.

    The format: two zero bytes, one for the type, one for the number of dimensions; each dimension as a big-endian
    uint32; then the values in row-major order, and nothing after them.
    """
    content, more = _read_bytes(path)
    if len(content) < 4:
        raise DataError(f"{quoted(path)} is truncated: it has {len(content)} bytes, no IDX header.")
    if content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise DataError(
            f"{quoted(path)} is not an IDX file: its magic number is 0x{content[:4].hex()}, "
            f"expected 0x{_UNSIGNED_BYTE:06x}{len(axes):02x}."
        )
    if content[2] != _UNSIGNED_BYTE:
        raise DataError(f"{quoted(path)} holds {_IDX_TYPES[content[2]]} values; expected unsigned bytes (uint8).")
    if content[3] != len(axes):
        raise DataError(f"{quoted(path)} is {content[3]}-dimensional; expected the axes {', '.join(axes)} alone.")
    start = 4 + 4 * len(axes)
    if len(content) < start:
        raise DataError(f"{quoted(path)} is truncated: its header ends after {len(content)} of {start} bytes.")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    expected = start + math.prod(shape)
    if len(content) != expected or more:
        defect = "is truncated" if len(content) < expected and not more else "is too long"
        came = f"{len(content):,} bytes{' or more' if more else ''}"
        raise DataError(f"{quoted(path)} {defect}: it has {came}, its header ({dimensions(shape)}) says {expected:,}.")
    if math.prod(shape) == 0:
        raise DataError(f"{quoted(path)} is empty: its header says {dimensions(shape)}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def _read_bytes(path: Path) -> tuple[bytes, bool]:
    """What is in a file, unpacked, and whether more was packed than its header says: that is not unpacked."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{quoted(path)} cannot be read: {error.strerror or error}.") from error
    # By content, not by name: some browsers unpack a download and keep its name, others the reverse.
    if content[:2] != _GZIP_MAGIC:
        return content, False
    try:
        with gzip.open(io.BytesIO(content)) as file:
            # A megabyte of zeros packs into a kilobyte: the header says how much to ask for; one byte tells of more.
            header = file.read(_HEADER)
            axes = min(header[3], (_HEADER - 4) // 4) if len(header) == _HEADER else 0
            start = 4 + 4 * axes
            size = start + math.prod(int.from_bytes(header[at : at + 4], "big") for at in range(4, start, 4))
            if size > _MOST_PACKED * len(content):
                raise DataError(
                    f"{quoted(path)} is truncated: its header says {size:,} bytes, more than its {len(content):,} "
                    "packed ones can hold."
                )
            unpacked = header + file.read(max(0, size - len(header)) if axes else _HEADER)
            return unpacked, bool(file.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{quoted(path)} is a corrupt gzip file: {error}.") from error


def dimensions(shape: tuple[int, ...]) -> str:
    """Such as "28 x 28"."""
    return " x ".join(str(size) for size in shape)


def quoted(path: Path) -> str:
    """A path in quotes, on one line even when it has a line break."""
    return repr(str(path))
