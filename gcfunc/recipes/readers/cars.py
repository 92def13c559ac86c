"""Stanford Cars, as it was handed out first and later, and as others have put it up since."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers.index import Found, Split
from gcfunc.recipes.readers.sources import (
    content,
    fields,
    holding,
    matlab,
    number,
    require_inside,
)

_META = "cars_meta.mat"
_WITH_LABELS = "cars_test_annos_withlabels.mat"


def two_folders(folder: Path) -> Found | None:
    """``cars_train/``, ``cars_test/`` and ``devkit/``."""
    root = holding("cars_train", [folder, folder / "stanford_cars"])
    if root is None:
        return None
    kit = holding(_META, [root / "devkit", root / "car_devkit" / "devkit"])
    if kit is None:
        raise UsageError(f"{root} has no devkit/{_META}")
    # The labels of the test images came later, in a file of their own; it lies here or there.
    labelled = holding(_WITH_LABELS, [root, kit])
    if labelled is None:
        raise UsageError(
            f"{root} has no {_WITH_LABELS}, and the devkit does not say what the test images are"
        )
    (names,) = matlab(content(kit / _META), kit / _META, ["class_names"])
    classes = [str(name) for name in names]
    train = _rows(kit / "cars_train_annos.mat", ("fname", "class"))
    test = _rows(labelled / _WITH_LABELS, ("fname", "class"))
    return Found(
        root,
        classes,
        _split(root, "cars_train", train, classes, kit / "cars_train_annos.mat"),
        _split(root, "cars_test", test, classes, labelled / _WITH_LABELS),
    )


def one_folder(folder: Path) -> Found | None:
    """``car_ims/`` and ``cars_annos.mat``, which says what is to test on."""
    root = holding("cars_annos.mat", [folder, folder / "stanford_cars"])
    if root is None:
        return None
    path = root / "cars_annos.mat"
    annotations, names = matlab(content(path), path, ["annotations", "class_names"])
    classes = [str(name) for name in names]
    rows = fields(annotations, ("relative_im_path", "class", "test"), path)
    splits = [
        Split.of(
            root,
            (
                (require_inside(str(name), path), number(label, len(classes), path))
                for name, label, test in rows
                if bool(test) is held_out
            ),
        )
        for held_out in (False, True)
    ]
    return Found(root, classes, *splits)


def _rows(path: Path, names: Sequence[str]) -> list[tuple[Any, ...]]:
    (annotations,) = matlab(content(path), path, ["annotations"])
    return fields(annotations, names, path)


def _split(
    root: Path, images: str, rows: list[tuple[Any, ...]], classes: list[str], path: Path
) -> Split:
    # One copy has each folder in a folder of its name.
    if (root / images / images).is_dir():
        images = f"{images}/{images}"
    return Split.of(
        root,
        (
            (f"{images}/{require_inside(str(name), path)}", number(label, len(classes), path))
            for name, label in rows
        ),
    )
