"""ImageNet's classification task (ILSVRC 2012), as its makers and as Kaggle hand it out.

Images to train on have a folder for each class in both. Those to validate with lie in one folder,
and their classes are in a file beside them.
"""

from collections.abc import Sequence
from pathlib import Path

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers import folders
from gcfunc.recipes.readers.index import Found, Split
from gcfunc.recipes.readers.sources import fields, holding, matlab, members, number, table

_DEVKIT = "ILSVRC2012_devkit_t12"
_SOLUTION = "LOC_val_solution.csv"
_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


def flat(folder: Path) -> Found | None:
    """``train/WNID/`` and a flat ``val/``, with the devkit or Kaggle's solution beside them."""
    root = holding("val", _places(folder))
    if root is None or not (names := folders.images(root / "val")):
        return None
    classes = folders.class_names(root / "train")
    where, labelled = _solution(folder) or _devkit(folder, names, classes)
    if unlabelled := sorted({*names} - labelled.keys()):
        raise UsageError(
            f"{where} has no class for {len(unlabelled):,} images of {root / 'val'}, such as "
            f"{unlabelled[0]}"
        )
    numbers = {wnid: label for label, wnid in enumerate(classes)}
    if unknown := sorted({*labelled.values()} - numbers.keys()):
        raise UsageError(
            f"{where} has {len(unknown)} classes that are not in {root / 'train'}, such as "
            f"{unknown[0]}"
        )
    return Found(
        root,
        classes,
        Split.of(root, folders.images_by_class(root, "train", classes)),
        Split.of(root, ((f"val/{name}", numbers[wnid]) for name, wnid in labelled.items())),
    )


def by_class(folder: Path) -> Found | None:
    """``train/WNID/`` and ``val/WNID/``."""
    root = holding("val", _places(folder))
    return None if root is None else folders.read(root)


def _places(folder: Path) -> list[Path]:
    return [folder / "ILSVRC" / "Data" / "CLS-LOC", folder / "Data" / "CLS-LOC", folder]


def _solution(folder: Path) -> tuple[Path, dict[str, str]] | None:
    place = holding(_SOLUTION, [folder, folder / "ILSVRC"])
    if place is None:
        return None
    path = place / _SOLUTION
    # A prediction is a wnid and a box, and so on for each object; all are of one class.
    rows = table(path, ("ImageId", "PredictionString"))
    return path, {f"{name}.JPEG": objects.split()[0] for name, objects in sorted(rows)}


def _devkit(
    folder: Path, names: Sequence[str], classes: Sequence[str]
) -> tuple[Path, dict[str, str]]:
    found = members(folder, _DEVKIT, (_META, _TRUTH)) or members(folder, "devkit", (_META, _TRUTH))
    if found is None:
        raise UsageError(
            f"{folder}: the images in val are not sorted by class, and there is neither {_DEVKIT} "
            f"nor {_DEVKIT}.tar.gz nor {_SOLUTION} that says their classes"
        )
    where, (meta, truth) = found
    (synsets,) = matlab(meta, where / _META, ["synsets"])
    # Only those without children are classes; the others are groups of them.
    wnids = {
        int(of): str(wnid)
        for of, wnid, children in fields(
            synsets, ("ILSVRC2012_ID", "WNID", "num_children"), where / _META
        )
        if children == 0
    }
    if unlike := sorted({*wnids.values()} ^ {*classes}):
        raise UsageError(
            f"{where / _META} and the folders in train have different classes; {len(unlike)} are "
            f"in one of them only, such as {unlike[0]}"
        )
    ids = truth.decode("ascii", "replace").split()
    if len(ids) != len(names):
        raise UsageError(
            f"{where / _TRUTH} has {len(ids):,} classes, but val has {len(names):,} images"
        )
    labelled = {}
    for i, text in enumerate(ids, 1):
        of = number(text, max(wnids), where / _TRUTH) + 1
        if of not in wnids:
            raise UsageError(f"{where / _TRUTH}, line {i}: {of} is a group of classes")
        labelled[f"ILSVRC2012_val_{i:08}.JPEG"] = wnids[of]
    return where, labelled
