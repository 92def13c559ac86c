"""FGVC-Aircraft: the 100 variants."""

from pathlib import Path

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers.index import Found, Split
from gcfunc.recipes.readers.sources import holding, lines, pairs, require_inside

_VARIANTS = "data/variants.txt"


def read(folder: Path) -> Found | None:
    """``fgvc-aircraft-2013b/data``, with what is called trainval to train on."""
    root = holding(_VARIANTS, [folder, folder / "fgvc-aircraft-2013b"])
    if root is None:
        return None
    classes = [line.strip() for line in lines(root / _VARIANTS)]
    numbers = {name: label for label, name in enumerate(classes)}

    def split(name: str) -> Split:
        path = root / "data" / f"images_variant_{name}.txt"
        found = []
        # The rest of the line is the variant: names have spaces and slashes.
        for image, variant in pairs(path):
            if variant not in numbers:
                raise UsageError(f"{path}: {root / _VARIANTS} has no {variant!r}")
            found.append((f"data/images/{require_inside(image, path)}.jpg", numbers[variant]))
        return Split.of(root, found)

    return Found(root, classes, split("trainval"), split("test"))
