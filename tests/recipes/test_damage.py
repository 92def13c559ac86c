"""Datasets that are not whole, not safe or not what they say: refused before training."""

import gzip
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers import read
from tests.recipes import made
from tests.recipes.test_readers import LAYOUTS, make

Damage = Callable[[Path], object]


def without(name: str) -> Damage:
    """Leave out a file or folder."""

    def damage(folder: Path) -> None:
        path = folder / name
        assert path.exists()
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(name: str, by: int = 5) -> Damage:
    """Leave out the end of a file."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def emptied(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, 0)


def swapped(name: str, old: str, new: str) -> Damage:
    """Have other words in a text, once."""

    def damage(folder: Path) -> None:
        path = folder / name
        before = path.read_text("utf-8")
        assert old in before
        path.write_text(before.replace(old, new, 1), "utf-8")

    return damage


def copied(source: str, target: str) -> Damage:
    return lambda folder: shutil.copy(folder / source, folder / target)


def pickled(name: str, content: object) -> Damage:
    return lambda folder: made.pickled(folder / name, content)


def saved(name: str, **content: object) -> Damage:
    return lambda folder: savemat(folder / name, content)


PY, BIN = "cifar-100-python", "cifar-100-binary"
KIT = "ILSVRC2012_devkit_t12/data"
TRUTH = f"{KIT}/ILSVRC2012_validation_ground_truth.txt"
AIR = "fgvc-aircraft-2013b/data"
CARS = "stanford_cars"
CUB = "CUB_200_2011"
PIXELS = np.zeros((4, 3072), np.uint8)
LABELS = [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("layout", "damage", "said"),
    [
        ("python", without(f"{PY}/test"), "python/test is missing"),
        ("python", without(f"{PY}/meta"), "python/meta is missing"),
        ("python", cut(f"{PY}/train"), "python/train is not a whole pickle"),
        ("python", emptied(f"{PY}/train"), "python/train is not a whole pickle"),
        ("python", copied(f"{PY}/test", f"{PY}/train"), "train calls itself 'testing batch 1"),
        ("python", pickled(f"{PY}/train", [1]), "holds a list and no dict"),
        (
            "python",
            pickled(f"{PY}/train", {"data": PIXELS, "labels": LABELS}),
            "should have a list 'fine_labels'; it has data, labels",
        ),
        (
            "python",
            pickled(f"{PY}/train", {"data": PIXELS[:, 1:], "fine_labels": LABELS}),
            r"data is uint8 \(4, 3071\), not uint8 \(images, 3072\)",
        ),
        (
            "python",
            pickled(f"{PY}/train", {"data": PIXELS, "fine_labels": LABELS[1:]}),
            "4 train images, but 3 labels",
        ),
        (
            "python",
            pickled(f"{PY}/test", {"data": PIXELS, "fine_labels": [0, 1, 3, 0]}),
            "a test label is 3, but 3 classes are 0 to 2",
        ),
        (
            "python",
            pickled(f"{PY}/test", {"data": PIXELS, "fine_labels": [0, 1, "2", 0]}),
            "not all fine_labels are whole numbers",
        ),
        (
            "python",
            pickled(f"{PY}/train", {"data": PIXELS[:0], "fine_labels": []}),
            "no train images",
        ),
        ("binary", without(f"{BIN}/test.bin"), "test.bin is missing"),
        ("binary", cut(f"{BIN}/train.bin"), "train.bin is cut off: 27,661 bytes are not a mult"),
        ("binary", cut(f"{BIN}/fine_label_names.txt"), "label is 2, but 2 classes are 0 to 1"),
        ("mini folders", without("val/n02085620"), "different classes; 1 .* such as n02085620"),
        (
            "mini folders",
            emptied("train/n02085620/n02085620_train_1.JPEG"),
            "train_1.JPEG is empty",
        ),
        (
            "mini folders",
            lambda f: [p.unlink() for p in (f / "train" / "n02085620").iterdir()],
            "train/n02085620 has no images",
        ),
        (
            "imagenet folders",
            lambda f: [p.rename(f"{p}.tar") for p in (f / "train").iterdir()],
            r"different classes",
        ),
        ("imagenet flat", without("ILSVRC2012_devkit_t12"), "neither ILSVRC2012_devkit_t12 nor"),
        ("imagenet flat", without(f"{KIT}/meta.mat"), "meta.mat is missing"),
        ("imagenet flat", cut(f"{KIT}/meta.mat"), "meta.mat is not a whole MATLAB file"),
        ("imagenet flat", saved(f"{KIT}/meta.mat", x=1), "meta.mat has no variable synsets"),
        (
            "imagenet flat",
            saved(f"{KIT}/meta.mat", synsets=made.structs({"WNID": ["a"]})),
            "has no field ILSVRC2012_ID, num_children",
        ),
        ("imagenet flat", cut(TRUTH, 2), "has 5 classes, but val has 6 images"),
        ("imagenet flat", swapped(TRUTH, "2", "7"), "'7' where a number from 1 to 3 should be"),
        ("imagenet flat", without("train/n02085620"), "different classes; 1 .* such as n02085620"),
        (
            "imagenet flat",
            lambda f: (f / "val/ILSVRC2012_val_00000002.JPEG").rename(f / "val/x.JPEG"),
            r"no class for 1 images of .*/val, such as x.JPEG",
        ),
        ("imagenet solution", cut("LOC_val_solution.csv", 90), "no class for 1 images"),
        ("imagenet solution", swapped("LOC_val_solution.csv", "ImageId", "Id"), "column ImageId"),
        (
            "imagenet solution",
            lambda f: (f / "val/ILSVRC2012_val_00000002.JPEG").unlink(),
            "val_00000002.JPEG is missing",
        ),
        ("kaggle", without("ILSVRC/Data/CLS-LOC/train/n02085620"), "1 classes that are not in"),
        ("aircraft", without(f"{AIR}/images_variant_test.txt"), "variant_test.txt is missing"),
        ("aircraft", without(f"{AIR}/images/1000014.jpg"), "images/1000014.jpg is missing"),
        ("aircraft", swapped(f"{AIR}/variants.txt", "F/A-18", "F-16"), "has no 'F/A-18'"),
        ("aircraft", swapped(f"{AIR}/variants.txt", "F/", "707-320\nF/"), "two classes 707-320"),
        ("aircraft", swapped(f"{AIR}/images_variant_test.txt", " F/A-18", ""), "line 1: .* words"),
        (
            "aircraft",
            copied(f"{AIR}/images_variant_trainval.txt", f"{AIR}/images_variant_test.txt"),
            "1000007.jpg is listed both to train and to test on",
        ),
        (
            "aircraft",
            swapped(f"{AIR}/images_variant_test.txt", "1000070", "../../../1000070"),
            "names ../../../1000070, which is outside of its folder",
        ),
        (
            "aircraft",
            lambda f: (f / AIR / "variants.txt").write_bytes(b"\xff\xfe7"),
            "variants.txt is not text in UTF-8",
        ),
        (
            "cars",
            without(f"{CARS}/cars_test_annos_withlabels.mat"),
            "does not say what the test images are",
        ),
        (
            "cars",
            copied(f"{CARS}/devkit/cars_test_annos.mat", f"{CARS}/cars_test_annos_withlabels.mat"),
            "has no field class",
        ),
        ("cars", without(f"{CARS}/devkit"), "has no devkit/cars_meta.mat"),
        ("cars", without(f"{CARS}/cars_test/00002.jpg"), "cars_test/00002.jpg is missing"),
        ("cars", without(f"{CARS}/cars_test"), "cars_test/00001.jpg is missing"),
        ("cars", cut(f"{CARS}/devkit/cars_train_annos.mat", 100), "is not a whole MATLAB file"),
        (
            "cars",
            saved(f"{CARS}/devkit/cars_meta.mat", class_names=made.cells(made.CARS[:2])),
            "has '3' where a number from 1 to 2 should be",
        ),
        ("cars in one folder", without("car_ims/000003.jpg"), "car_ims/000003.jpg is missing"),
        ("dogs", without("lists/test_list.mat"), "test_list.mat is missing"),
        ("dogs", without("Images/n02085620-Chihuahua"), "Images/n02085620-Chihuahua/.* is missing"),
        (
            "dogs",
            saved("lists/test_list.mat", file_list=made.cells(["a/b.jpg"] * 2), labels=[1]),
            "has 2 images, but 1 labels",
        ),
        (
            "dogs",
            saved(
                "lists/test_list.mat", file_list=made.cells(["a/b.jpg", "a/c.jpg"]), labels=[4, 1]
            ),
            "has a as 1 and as 4",
        ),
        (
            "dogs",
            saved("lists/test_list.mat", file_list=made.cells(["a/b.jpg"]), labels=[9]),
            "labels are not 1 to 4, one for each folder",
        ),
        ("cub", without(f"{CUB}/images.txt"), "images.txt is missing"),
        ("cub", without(f"{CUB}/images/{made.BIRDS[1]}"), r"002\.Laysan.* is missing"),
        ("cub", cut(f"{CUB}/image_class_labels.txt"), "list different images; 1 .* number 15"),
        ("cub", swapped(f"{CUB}/train_test_split.txt", "1 1", "1 2"), "has '2', not 1 or 0"),
        (
            "cub",
            swapped(f"{CUB}/image_class_labels.txt", "1 1", "1 2"),
            "its class is given as 002",
        ),
        (
            "cub",
            swapped(f"{CUB}/image_class_labels.txt", "1 1", "1 0"),
            "'0' where a number from 1",
        ),
    ],
)
def test_damaged_data(layout: str, damage: Damage, said: str, tmp_path: Path) -> None:
    kind = make(layout, tmp_path)
    read(kind, tmp_path, strict=False)
    damage(tmp_path)
    with pytest.raises(UsageError, match=said) as raised:
        read(kind, tmp_path, strict=False)
    assert "\n" not in str(raised.value)


def test_every_layout_is_damaged_somewhere() -> None:
    (mark,) = [m for m in test_damaged_data.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    kinds = {LAYOUTS[layout][0] for layout, *_ in mark.args[1]}
    assert kinds == {kind for kind, *_ in LAYOUTS.values()}


def test_classes_that_wait_in_tars(tmp_path: Path) -> None:
    made.by_class(tmp_path)
    shutil.rmtree(tmp_path / "train")
    made.text(tmp_path / "train" / "n02085620.tar", ["x"])
    with pytest.raises(UsageError, match=r"no folder for any class; its \.tar files have to be un"):
        read("imagenet", tmp_path)


def test_few_shot_lists(tmp_path: Path) -> None:
    made.mini_imagenet(tmp_path)
    (tmp_path / "val.csv").rename(tmp_path / "other.csv")
    with pytest.raises(UsageError, match=r"val\.csv is missing"):
        read("mini-imagenet", tmp_path)
    made.rows(tmp_path / "val.csv", ("filename", "label"), [("one.jpg", "n02")])
    with pytest.raises(UsageError, match="class n02 has no two images"):
        read("mini-imagenet", tmp_path)
    shutil.copy(tmp_path / "train.csv", tmp_path / "val.csv")
    with pytest.raises(UsageError, match="is listed"):
        read("mini-imagenet", tmp_path)
    made.rows(tmp_path / "val.csv", ("filename", "label"), [("one.jpg", "../x")])
    with pytest.raises(UsageError, match=r"names \.\./x, which is outside"):
        read("mini-imagenet", tmp_path)
    made.rows(tmp_path / "split.csv", ("filename", "label", "split"), [("a.jpg", "n01", "val")])
    with pytest.raises(UsageError, match="a split is train or test, not 'val'"):
        read("mini-imagenet", tmp_path)


class Harm:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_call_something(protocol: int, tmp_path: Path) -> None:
    made.cifar_python(tmp_path)
    harm = {"fine_label_names": Harm(tmp_path / "harm")}
    (tmp_path / PY / "meta").write_bytes(pickle.dumps(harm, protocol))
    with pytest.raises(UsageError, match=r"meta is refused: it calls (posix|nt)\.mkdir"):
        read("cifar100", tmp_path)
    assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(harm, protocol))
    assert (tmp_path / "harm").exists(), "the pickle does nothing to begin with"


def packed(folder: Path) -> Path:
    """CIFAR-100 as an archive alone."""
    made.cifar_python(folder)
    archive = made.tarball(folder / PY)
    shutil.rmtree(folder / PY)
    return archive


def add(archive: Path, name: str, **attributes: object) -> None:
    """Put one more member in front of the others."""
    raw = gzip.decompress(archive.read_bytes())
    member = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(member, key, value)
    head = io.BytesIO()
    with tarfile.open(fileobj=head, mode="w") as tar:
        tar.addfile(member)
    archive.write_bytes(gzip.compress(head.getvalue()[:512] + raw))


@pytest.mark.parametrize(
    ("name", "attributes", "said"),
    [
        ("../outside", {}, r"names \.\./outside, which is outside"),
        ("cifar-100-python/../../outside", {}, "which is outside of its folder"),
        ("/tmp/outside", {}, "names /tmp/outside, which is outside"),
        (f"{PY}/train", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link or a dev"),
        (f"{PY}/train", {"type": tarfile.LNKTYPE, "linkname": "meta"}, "is a link or a device"),
        (f"{PY}/train", {"type": tarfile.FIFOTYPE}, "is a link or a device"),
    ],
)
def test_archives_that_reach_out(
    name: str, attributes: dict[str, object], said: str, tmp_path: Path
) -> None:
    archive = packed(tmp_path)
    read("cifar100", tmp_path, strict=False)
    add(archive, name, **attributes)
    with pytest.raises(UsageError, match=said):
        read("cifar100", tmp_path, strict=False)
    assert [*tmp_path.iterdir()] == [archive]


def test_archives_that_are_not_whole(tmp_path: Path) -> None:
    archive = packed(tmp_path)
    whole = archive.read_bytes()
    # Cut in what is packed, in the checksum at the end; another checksum; none of it.
    for raw in (whole[:-20_000], whole[:-6], whole[:-8] + bytes(8), whole[:5], b"", b"GIF89a"):
        archive.write_bytes(raw)
        with pytest.raises(UsageError, match=r"is not a whole \.tar\.gz"):
            read("cifar100", tmp_path, strict=False)
    archive.write_bytes(whole)
    other = archive.rename(tmp_path / f"{BIN}.tar.gz")
    with pytest.raises(UsageError, match=r"has no cifar-100-binary/fine_label_names\.txt"):
        read("cifar100", other)
