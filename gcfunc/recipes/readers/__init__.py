"""Readers of the datasets as people have them on disk. Nothing is downloaded or written."""

from collections.abc import Callable
from pathlib import Path

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers import (
    aircraft,
    cars,
    cifar,
    cub,
    dogs,
    folders,
    imagenet,
    mini_imagenet,
)
from gcfunc.recipes.readers.index import Found, Index, Official, checked

_Layout = Callable[[Path], Found | None]

# The first layout that a folder has is read.
_KINDS: dict[str, tuple[Official, tuple[_Layout, ...]]] = {
    "cifar100": (Official("CIFAR-100", 100, 60_000, 50_000), (cifar.python, cifar.binary)),
    "mini-imagenet": (
        Official("Mini-ImageNet", 100, 60_000),
        (mini_imagenet.chosen, mini_imagenet.listed, mini_imagenet.parts, folders.read),
    ),
    "imagenet": (
        Official("ImageNet", 1000, 1_331_167, 1_281_167),
        (imagenet.flat, imagenet.by_class),
    ),
    "aircraft": (
        Official("FGVC-Aircraft", 100, 10_000, 6_667),
        (aircraft.read, folders.read),
    ),
    "cars": (
        Official("Stanford Cars", 196, 16_185, 8_144),
        (cars.two_folders, cars.one_folder, folders.read),
    ),
    "dogs": (Official("Stanford Dogs", 120, 20_580, 12_000), (dogs.read, folders.read)),
    "cub": (Official("CUB-200-2011", 200, 11_788, 5_994), (cub.read, folders.read)),
}

KINDS = tuple(_KINDS)
"""What :func:`read` takes."""


def read(kind: str, folder: Path, *, strict: bool = True) -> Index:
    """The dataset in a folder, in whichever layout it is there.

    Args:
        kind: Which dataset it is, one of :data:`KINDS`.
        folder: Where it is; of CIFAR-100 also its archive itself.
        strict: Whether other numbers of classes and images than the dataset was published with are
            an error, as after an archive was unpacked in part. Otherwise they become a note, for
            those who train on a part of it. Whatever else is wrong is an error in any case.

    Raises:
        UsageError: the folder has none of the layouts, or something in it is missing or wrong.
    """
    official, layouts = _KINDS[kind]
    if not folder.exists():
        raise UsageError(f"{folder} is not a folder")
    for layout in layouts:
        found = layout(folder)
        if found is not None:
            return checked(found, official, strict=strict)
    known = "; or ".join(_words(layout) for layout in layouts)
    raise UsageError(f"{folder} is not {official.name} in a layout that is known: {known}")


def _words(layout: _Layout) -> str:
    # What a layout is, says its reader's docstring; its first sentence may go on for the curious.
    return (layout.__doc__ or layout.__name__).partition(", as :")[0].rstrip(".").replace("``", "")
