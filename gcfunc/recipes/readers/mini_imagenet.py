"""Mini-ImageNet for classification, from how few-shot learning hands it around.

There the three parts have different classes. Classification needs every class on both sides, so
the parts are put together and each class is split: five sixths to train on, a sixth to test on.
"""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers import folders
from gcfunc.recipes.readers.index import Files, Found, Index, Split
from gcfunc.recipes.readers.sources import require_inside, table

SPLIT = "split.csv"
_COLUMNS = ("filename", "label", "split")
_PARTS = ("train", "val", "test")
_SEED = 0


def chosen(folder: Path) -> Found | None:
    """``split.csv`` with ``filename,label,split``, as :func:`write_split` writes it."""
    path = folder / SPLIT
    if not path.is_file():
        return None
    rows = table(path, _COLUMNS)
    classes = sorted({label for _, label, _ in rows})
    numbers = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for name, label, split in rows:
        if split not in splits:
            raise UsageError(f"{path}: a split is train or test, not {split!r}")
        splits[split].append((require_inside(name, path), numbers[label]))
    return Found(
        folder, classes, Split.of(folder, splits["train"]), Split.of(folder, splits["test"])
    )


def listed(folder: Path) -> Found | None:
    """``images/`` and ``train.csv``, ``val.csv``, ``test.csv`` with ``filename,label``."""
    if not any((folder / f"{part}.csv").is_file() for part in _PARTS):
        return None
    by_class: dict[str, list[str]] = defaultdict(list)
    for part in _PARTS:
        path = folder / f"{part}.csv"
        for name, label in table(path, ("filename", "label")):
            by_class[require_inside(label, path)].append(require_inside(name, path))
    images = {
        label: f"images/{label}" if (folder / "images" / label).is_dir() else "images"
        for label in by_class
    }
    return _split(
        folder,
        {label: [f"{images[label]}/{name}" for name in names] for label, names in by_class.items()},
    )


def parts(folder: Path) -> Found | None:
    """``train/CLASS/``, ``val/CLASS/`` and ``test/CLASS/``, which have no class in common."""
    if not all((folder / part).is_dir() for part in _PARTS):
        return None
    names = {part: folders.class_names(folder / part) for part in _PARTS}
    owners = {name: part for part in _PARTS for name in names[part]}
    if len(owners) < sum(map(len, names.values())):
        return None
    return _split(
        folder,
        {
            name: [f"{part}/{name}/{image}" for image in folders.images(folder / part / name)]
            for name, part in owners.items()
        },
    )


def write_split(index: Index, path: Path) -> None:
    """Write down which images are to train and which to test on.

    As ``split.csv`` beside the images it is what is used from then on.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for split, name in ((index.train, "train"), (index.test, "test")):
            assert isinstance(split.images, Files)
            for i, label in enumerate(split.labels):
                written = split.images.path(i).relative_to(split.images.root).as_posix()
                writer.writerow([written, index.classes[label], name])


def _split(folder: Path, by_class: dict[str, list[str]]) -> Found:
    classes = sorted(by_class)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        if len(by_class[name]) < 2:
            raise UsageError(f"{folder}: class {name} has no two images, one of them to test on")
        order = _shuffled(by_class[name])
        held_out = max(1, len(order) // 6)
        test += [(image, label) for image in sorted(order[:held_out])]
        train += [(image, label) for image in sorted(order[held_out:])]
    return Found(folder, classes, Split.of(folder, train), Split.of(folder, test))


def _shuffled(names: Iterable[str]) -> list[str]:
    # By a hash of the image's own name: the same whatever the layout, the order of the rows, and
    # the version of any generator of random numbers.
    def key(name: str) -> bytes:
        return hashlib.sha256(f"{_SEED}/{name.rpartition('/')[2]}".encode()).digest()

    return sorted(names, key=key)
