"""Caltech-UCSD Birds-200-2011."""

from pathlib import Path

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers.index import Found, Split
from gcfunc.recipes.readers.sources import holding, number, pairs, require_inside


def read(folder: Path) -> Found | None:
    """``CUB_200_2011/images/`` and the four texts beside it."""
    root = holding("train_test_split.txt", [folder, folder / "CUB_200_2011"])
    if root is None:
        return None
    classes = [name for _, name in pairs(root / "classes.txt")]
    images = root / "images.txt"
    paths, labels, flags = (
        dict(pairs(root / f"{name}.txt"))
        for name in ("images", "image_class_labels", "train_test_split")
    )
    for other, name in ((labels, "image_class_labels"), (flags, "train_test_split")):
        if unlike := sorted(paths.keys() ^ other.keys()):
            raise UsageError(
                f"{images} and {name}.txt list different images; {len(unlike):,} are in one of "
                f"them only, such as number {unlike[0]}"
            )
    splits: dict[str, list[tuple[str, int]]] = {"1": [], "0": []}
    for of, path in paths.items():
        label = number(labels[of], len(classes), root / "image_class_labels.txt")
        if path.partition("/")[0] != classes[label]:
            raise UsageError(f"{images} has {path}, but its class is given as {classes[label]}")
        if flags[of] not in splits:
            raise UsageError(f"{root / 'train_test_split.txt'} has {flags[of]!r}, not 1 or 0")
        splits[flags[of]].append((f"images/{require_inside(path, images)}", label))
    return Found(root, classes, Split.of(root, splits["1"]), Split.of(root, splits["0"]))
