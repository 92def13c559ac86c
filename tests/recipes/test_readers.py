"""What the readers find in each layout, and what of it others find there."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers import KINDS, mini_imagenet, read
from gcfunc.recipes.readers.index import Files, Split
from tests.recipes import made

Make = Callable[[Path], None]


def flat(folder: Path, describe: Make) -> None:
    made.imagenet_flat(folder)
    describe(folder)


def kaggle(folder: Path) -> None:
    made.imagenet_flat(folder / "ILSVRC" / "Data" / "CLS-LOC")
    made.image(folder / "ILSVRC" / "Data" / "CLS-LOC" / "test" / "ILSVRC2012_test_00000001.JPEG")
    made.solution(folder)


def packed_devkit(folder: Path) -> None:
    made.devkit(folder / "elsewhere")
    made.tarball(folder / "elsewhere" / "ILSVRC2012_devkit_t12").rename(
        folder / "ILSVRC2012_devkit_t12.tar.gz"
    )


def cars_put_up_again(folder: Path) -> None:
    made.cars(folder, doubled=True)
    (folder / "stanford_cars" / "car_devkit").mkdir()
    kit = folder / "stanford_cars" / "car_devkit" / "devkit"
    (folder / "stanford_cars" / "devkit").rename(kit)
    labels = "cars_test_annos_withlabels.mat"
    (folder / "stanford_cars" / labels).rename(kit / labels)


LAYOUTS: dict[str, tuple[str, Make, tuple[str, ...]]] = {
    "python": ("cifar100", made.cifar_python, made.FINE),
    "binary": ("cifar100", made.cifar_binary, made.FINE),
    "mini folders": ("mini-imagenet", made.by_class, made.WNIDS),
    "imagenet folders": ("imagenet", made.by_class, made.WNIDS),
    "imagenet flat": ("imagenet", partial(flat, describe=made.devkit), made.WNIDS),
    "imagenet packed devkit": ("imagenet", partial(flat, describe=packed_devkit), made.WNIDS),
    "imagenet solution": ("imagenet", partial(flat, describe=made.solution), made.WNIDS),
    "kaggle": ("imagenet", kaggle, made.WNIDS),
    "aircraft": ("aircraft", made.aircraft, made.VARIANTS),
    "cars": ("cars", made.cars, made.CARS),
    "cars doubled": ("cars", partial(made.cars, doubled=True), made.CARS),
    "cars put up again": ("cars", cars_put_up_again, made.CARS),
    "cars in one folder": ("cars", made.cars_in_one_folder, made.CARS),
    "dogs": ("dogs", made.dogs, made.DOGS),
    "dogs beside": ("dogs", partial(made.dogs, lists=""), made.DOGS),
    "cub": ("cub", made.cub, made.BIRDS),
    "cub folders": (
        "cub",
        partial(made.by_class, classes=made.BIRDS, splits=("train", "test")),
        made.BIRDS,
    ),
}


def make(layout: str, folder: Path) -> str:
    kind, write, _ = LAYOUTS[layout]
    write(folder)
    return kind


def names(split: Split) -> list[str]:
    assert isinstance(split.images, Files)
    return [split.images.path(i).name for i in range(len(split))]


def pixels(split: Split) -> Any:
    assert isinstance(split.images, np.ndarray)
    return split.images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, tmp_path: Path) -> None:
    index = read(make(layout, tmp_path), tmp_path, strict=False)
    assert index.classes == LAYOUTS[layout][2]
    assert (len(index.train), len(index.test)) == (9, 6)
    assert Counter(index.train.labels.tolist()) == {0: 3, 1: 3, 2: 3}
    assert Counter(index.test.labels.tolist()) == {0: 2, 1: 2, 2: 2}
    for split in (index.train, index.test):
        if isinstance(split.images, Files):
            assert all(split.images.path(i).is_file() for i in range(len(split)))


@pytest.mark.parametrize("layout", ["cub", "dogs", "mini folders", "imagenet folders"])
def test_labels_are_of_the_folder_that_an_image_is_in(layout: str, tmp_path: Path) -> None:
    index = read(make(layout, tmp_path), tmp_path, strict=False)
    for split in (index.train, index.test):
        assert isinstance(split.images, Files)
        folders = [split.images.path(i).parent.name for i in range(len(split))]
        assert folders == [index.classes[label] for label in split.labels]


@pytest.mark.parametrize("layout", ["imagenet flat", "imagenet solution", "kaggle"])
def test_flat_validation_has_the_devkits_numbers(layout: str, tmp_path: Path) -> None:
    index = read(make(layout, tmp_path), tmp_path, strict=False)
    wnids = dict(zip(made.IDS, made.WNIDS, strict=True))
    assert names(index.test) == [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 7)]
    assert [index.classes[label] for label in index.test.labels] == [wnids[i] for i in made.TRUTH]


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    made.by_class(tmp_path)
    before = read("imagenet", tmp_path, strict=False).digest
    # Of macOS: attributes of a file, and of the way a folder is shown.
    made.text(tmp_path / "train" / made.WNIDS[0] / "._n01440764_train_0.JPEG", ["x"])
    made.text(tmp_path / "val" / ".DS_Store", ["x"])
    made.text(tmp_path / "train" / "readme.txt", ["x"])
    made.text(tmp_path / "train" / made.WNIDS[1] / "Thumbs.db", ["x"])
    (tmp_path / "val" / ".cache").mkdir()
    assert read("imagenet", tmp_path, strict=False).digest == before


def test_cifars_archives_hold_the_same(tmp_path: Path) -> None:
    made.cifar_python(tmp_path / "a")
    made.cifar_binary(tmp_path / "b")
    archive = made.tarball(tmp_path / "a" / "cifar-100-python")
    moved = tmp_path / "c" / archive.name
    moved.parent.mkdir()
    archive.rename(moved)
    places = [
        *(tmp_path / name for name in "abc"),
        tmp_path / "a" / "cifar-100-python",
        tmp_path / "b" / "cifar-100-binary",
        moved,
    ]
    found = [read("cifar100", place, strict=False) for place in places]
    assert len({index.digest for index in found}) == 1
    data, labels = made.cifar_arrays("train", 9)
    for index in found:
        np.testing.assert_array_equal(
            pixels(index.train), data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        )
        assert index.train.labels.tolist() == labels
    assert sorted(path.name for path in moved.parent.iterdir()) == [archive.name]


def test_cifar_as_torchvision_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    class Unsigned(datasets.CIFAR100):  # type: ignore[misc, name-defined]
        """Without the sums of the real files."""

        train_list = (("train", None),)
        test_list = (("test", None),)
        meta = {"filename": "meta", "key": "fine_label_names", "md5": None}  # noqa: RUF012

    made.cifar_python(tmp_path)
    index = read("cifar100", tmp_path, strict=False)
    theirs = [Unsigned(str(tmp_path), train=train) for train in (True, False)]
    for split, other in zip((index.train, index.test), theirs, strict=True):
        np.testing.assert_array_equal(pixels(split), other.data)
        assert split.labels.tolist() == other.targets
        assert [*index.classes] == other.classes


@pytest.mark.parametrize(
    ("layout", "theirs", "train"),
    [("aircraft", "FGVCAircraft", "trainval"), ("cars", "StanfordCars", "train")],
)
def test_as_torchvision_reads_it(layout: str, theirs: str, train: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    index = read(make(layout, tmp_path), tmp_path, strict=False)
    for split, name in ((index.train, train), (index.test, "test")):
        other = getattr(datasets, theirs)(str(tmp_path), split=name)
        assert [*index.classes] == other.classes
        assert names(split) == [
            Path(image).name
            for image in getattr(other, "_image_files", None)
            or [file for file, _ in other._samples]
        ]
        assert split.labels.tolist() == [other[i][1] for i in range(len(other))]


def test_few_shot_parts_become_one_split_of_each_class(tmp_path: Path) -> None:
    made.mini_imagenet(tmp_path / "flat")
    made.mini_imagenet(tmp_path / "nested", nested=True)
    made.mini_parts(tmp_path / "parts")
    found = [
        read("mini-imagenet", tmp_path / name, strict=False) for name in ("flat", "nested", "parts")
    ]
    for index in found:
        assert index.classes == made.WNIDS
        assert Counter(index.train.labels.tolist()) == dict.fromkeys(range(3), 10)
        assert Counter(index.test.labels.tolist()) == dict.fromkeys(range(3), 2)
        assert names(index.test) == names(found[0].test)
    held_out = names(found[0].test)
    listed = [name for wnid in made.WNIDS for name in made.mini_images(wnid)]
    assert {*names(found[0].train), *held_out} == {*listed}
    # Neither the first ones nor those at the same places in each class.
    assert len({name[9:] for name in held_out}) > 2


def test_a_split_that_was_written_is_read(tmp_path: Path) -> None:
    made.mini_imagenet(tmp_path)
    before = read("mini-imagenet", tmp_path, strict=False)
    path = tmp_path / mini_imagenet.SPLIT
    mini_imagenet.write_split(before, path)
    assert read("mini-imagenet", tmp_path, strict=False).digest == before.digest
    first, *rest = path.read_text().splitlines()
    moved = [line.replace(",train", ",test") if "00000003" in line else line for line in rest]
    made.text(path, [first, *moved])
    after = read("mini-imagenet", tmp_path, strict=False)
    assert len(after.test) == len(before.test) + sum(
        a != b for a, b in zip(rest, moved, strict=True)
    )
    assert after.digest != before.digest


@pytest.mark.parametrize("layout", ["python", "cub", "imagenet folders"])
def test_the_digest_is_of_the_data_and_not_of_its_place(layout: str, tmp_path: Path) -> None:
    kind = make(layout, tmp_path / "a")
    before = read(kind, tmp_path / "a", strict=False).digest
    (tmp_path / "a").rename(tmp_path / "b")
    index = read(kind, tmp_path / "b", strict=False)
    assert index.digest == before
    if isinstance(index.train.images, Files):
        with index.train.images.path(0).open("ab") as file:
            file.write(b"x")
        assert read(kind, tmp_path / "b", strict=False).digest != before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_numbers_than_were_published(layout: str, tmp_path: Path) -> None:
    kind = make(layout, tmp_path)
    with pytest.raises(UsageError, match=r"classes and [0-9,]+ images.* has 3 and 15, 9 of them"):
        read(kind, tmp_path)
    (note,) = read(kind, tmp_path, strict=False).notes
    assert "has 3 and 15" in note


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_something_else(kind: str, tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(UsageError, match=r"not .* in a layout that is known: "):
        read(kind, tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        read(kind, tmp_path / "nowhere")
