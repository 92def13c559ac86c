"""A folder for each class, in one folder to train on and one to test on."""

import os
from pathlib import Path

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers.index import Found, Pairs, Split

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read(folder: Path) -> Found | None:
    """``train/CLASS/`` and ``val/CLASS/``, or if there is no ``val`` then ``test/CLASS/``."""
    held_out = next((name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        return None
    classes = class_names(folder / "train")
    others = class_names(folder / held_out)
    if classes != others:
        only = sorted({*classes} ^ {*others})
        raise UsageError(
            f"{folder}: train and {held_out} have different classes; {len(only)} are in one of "
            f"them only, such as {only[0]}"
        )
    splits = [
        Split.of(folder, images_by_class(folder, name, classes)) for name in ("train", held_out)
    ]
    return Found(folder, classes, *splits)


def class_names(folder: Path) -> list[str]:
    """The folders in it, which number the classes by their order.

    Raises:
        UsageError: there are none.
    """
    names = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
    if not names:
        tars = any(entry.name.endswith(".tar") for entry in _visible(folder))
        unpack = "; its .tar files have to be unpacked, each into a folder" if tars else ""
        raise UsageError(f"{folder} has no folder for any class{unpack}")
    return names


def images(folder: Path) -> list[str]:
    """The names of the images in it."""
    return sorted(e.name for e in _visible(folder) if e.name.lower().endswith(SUFFIXES))


def images_by_class(root: Path, split: str, classes: list[str]) -> Pairs:
    """Each image in ``root/split`` with the number of its class.

    Raises:
        UsageError: a class has none.
    """
    for label, name in enumerate(classes):
        found = images(root / split / name)
        if not found:
            raise UsageError(f"{root / split / name} has no images")
        for image in found:
            yield f"{split}/{name}/{image}", label


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    # macOS leaves a hidden ._x.jpg beside x.jpg where it unpacks onto other file systems.
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror}") from error
