"""What a reader finds: which images there are, and of which class each is."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gcfunc.recipes.errors import UsageError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Pairs = Iterable[tuple[str, int]]


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files, of which only the names are in memory.

    Attributes:
        root: The folder that the names are relative to.
        names: One array of bytes: a list of a million strings would be five times as large, and
            would be copied into each process that loads images.
    """

    root: Path
    names: npt.NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        """Where the image is."""
        return self.root / os.fsdecode(self.names[i])


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes.

    Attributes:
        images: Their files, or their pixels ``(N, height, width, 3)``.
        labels: Their classes' numbers, from 0 on.
    """

    images: Files | Pixels
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, root: Path, pairs: Pairs) -> "Split":
        """Of the names of files in ``root``, and their labels."""
        names, labels = [], []
        for name, label in pairs:
            names.append(os.fsencode(name))
            labels.append(label)
        return cls(Files(root, np.array(names, np.bytes_)), np.array(labels, np.int64))


@dataclass(frozen=True, eq=False)
class Found:
    """What a folder holds, as a layout's reader understood it and before it is checked."""

    where: Path
    classes: Sequence[str]
    train: Split
    test: Split


@dataclass(frozen=True)
class Official:
    """A dataset as it was published.

    Attributes:
        name: What it is called.
        classes: How many classes it has.
        images: How many images.
        train: How many of them are to train on, if its makers said so.
    """

    name: str
    classes: int
    images: int
    train: int | None = None


@dataclass(frozen=True, eq=False)
class Index:
    """A dataset that can be trained on: every file is there, and every label names a class.

    Two are the same where their digests are.

    Attributes:
        name: For people to read.
        classes: What the labels stand for.
        train: What is learned from.
        test: What is held out.
        digest: A fingerprint of names, sizes and labels (of arrays, pixels and labels), by which a
            resumed run knows its data. It does not depend on where the folder is.
        notes: What a person should know of it.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    digest: str
    notes: tuple[str, ...] = ()


def checked(found: Found, official: Official, *, strict: bool) -> Index:
    """The index of what was found.

    Args:
        found: By a layout's reader.
        official: What it should be.
        strict: Whether other numbers of classes and images are an error, or else a note.

    Raises:
        UsageError: what was found cannot be trained on.
    """
    where, classes, train, test = found.where, tuple(found.classes), found.train, found.test
    if len({*classes}) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UsageError(f"{where}: there are two classes {twice}")
    for split, what in ((train, "train"), (test, "test")):
        if len(split.images) != len(split):
            raise UsageError(
                f"{where}: {len(split.images):,} {what} images, but {len(split):,} labels"
            )
        if not len(split):
            raise UsageError(f"{where}: there are no {what} images")
        wrong = split.labels[(split.labels < 0) | (split.labels >= len(classes))]
        if len(wrong):
            raise UsageError(
                f"{where}: a {what} label is {wrong[0]}, but {len(classes)} classes are "
                f"0 to {len(classes) - 1}"
            )
    _require_different(where, train, test)
    digest = hashlib.sha256(repr(classes).encode("utf-8", "surrogateescape"))
    for split in (train, test):
        for array in _fingerprinted(split):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    notes = _unexpected(found, official)
    if strict and notes:
        raise UsageError(notes[0])
    return Index(official.name, classes, train, test, digest.hexdigest(), notes)


def _require_different(where: Path, train: Split, test: Split) -> None:
    names = [split.images.names for split in (train, test) if isinstance(split.images, Files)]
    if not names:
        return
    different, counts = np.unique(np.concatenate(names), return_counts=True)
    if len(different) < len(train) + len(test):
        twice = os.fsdecode(different[counts.argmax()])
        both = all(os.fsencode(twice) in split for split in names)
        raise UsageError(
            f"{where}: {twice} is listed {'both to train and to test on' if both else 'twice'}"
        )


def _fingerprinted(split: Split) -> list[npt.NDArray[np.generic]]:
    if isinstance(split.images, Files):
        return [split.images.names, _sizes(split.images), split.labels]
    return [split.images, split.labels]


def _sizes(files: Files) -> Labels:
    # In threads, as folders of a million files are often at the other end of a network.
    numbers = iter(range(len(files)))
    chunks = iter(lambda: [*islice(numbers, 1000)], [])

    def of(chunk: list[int]) -> list[int]:
        return [_size(files.path(i)) for i in chunk]

    with ThreadPoolExecutor(16) as pool:
        return np.array([*chain.from_iterable(pool.map(of, chunks))], np.int64)


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    if not size:
        raise UsageError(f"{path} is empty")
    return size


def _unexpected(found: Found, official: Official) -> tuple[str, ...]:
    classes, train, test = len(found.classes), len(found.train), len(found.test)
    if (classes, train + test) == (official.classes, official.images) and official.train in (
        None,
        train,
    ):
        return ()
    of_them = "" if official.train is None else f", {official.train:,} of them to train on"
    note = (
        f"{official.name} has {official.classes} classes and {official.images:,} images{of_them}; "
        f"{found.where} has {classes} and {train + test:,}, {train:,} of them to train on"
    )
    return (note,)
