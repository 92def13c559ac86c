"""Stanford Dogs."""

from pathlib import Path

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers.index import Found, Split
from gcfunc.recipes.readers.sources import content, holding, matlab, number, require_inside


def read(folder: Path) -> Found | None:
    """``Images/`` and the lists, which are in ``lists/`` or beside it."""
    # Where they came out of the archive of that name is up to who unpacked it.
    lists = holding("train_list.mat", [folder / "lists", folder])
    if lists is None:
        return None
    numbers: dict[str, int] = {}
    train, test = (_pairs(lists / f"{name}_list.mat", numbers) for name in ("train", "test"))
    classes = sorted(numbers, key=lambda name: numbers[name])
    if [numbers[name] for name in classes] != [*range(len(classes))]:
        raise UsageError(f"{lists}: labels are not 1 to {len(classes)}, one for each folder")
    return Found(folder, classes, Split.of(folder, train), Split.of(folder, test))


def _pairs(path: Path, numbers: dict[str, int]) -> list[tuple[str, int]]:
    names, labels = matlab(content(path), path, ["file_list", "labels"])
    if len(names) != len(labels):
        raise UsageError(f"{path} has {len(names):,} images, but {len(labels):,} labels")
    found = []
    for name, label in zip(map(str, names), labels, strict=True):
        breed = name.partition("/")[0]
        # A list that was sorted without its labels would say the same breed in two ways.
        of = number(label, 1000, path)
        if numbers.setdefault(breed, of) != of:
            raise UsageError(f"{path} has {breed} as {of + 1} and as {numbers[breed] + 1}")
        found.append((f"Images/{require_inside(name, path)}", numbers[breed]))
    return found
