"""Datasets in the formats that people have, made small: three classes, a few images of noise.

Each function writes one into a folder and gives nothing back, so that a test can damage it.
"""

import csv
import pickle
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = ("n01440764", "n02085620", "n02119789")
VARIANTS = ("707-320", "Boeing 737-700", "F/A-18")
BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog")
CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van 2012")
CORNERS = ("x1", "y1", "x2", "y2")
PER_CLASS = {"train": 3, "test": 2}


def image(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """A file of noise, which its name determines; what format it has says its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*path.name.encode()])
    width, height = size
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(pixels).convert(mode).save(path, kind)


def text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def rows(path: Path, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *lines])


class Python2(pickle._Pickler):  # C's pickler cannot be told how to write text
    """Writes as Python 2 did: its text, and bytes, are short strings without an encoding."""

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch}

    def save_string(self, obj: str | bytes) -> None:
        raw = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)  # type: ignore[attr-defined]
        self.memoize(obj)  # type: ignore[attr-defined]

    dispatch[str] = dispatch[bytes] = save_string


def pickled(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2(file, protocol=2).dump(content)
    # The module's name in the NumPy of that time.
    old = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    path.write_bytes(old)


def cifar_arrays(split: str, count: int) -> tuple[Any, list[int]]:
    rng = np.random.default_rng(len(split))
    labels = [i % 3 for i in range(count)]
    return rng.integers(0, 256, (count, 3072)).astype(np.uint8), labels


COUNTS = {"train": 9, "test": 6}
FINE = ("apple", "aquarium_fish", "baby")


def cifar_python(folder: Path) -> None:
    root = folder / "cifar-100-python"
    for split, count in COUNTS.items():
        data, labels = cifar_arrays(split, count)
        content = {
            "filenames": [f"{i}.png" for i in range(count)],
            "batch_label": f"{split}ing batch 1 of 1",
            "fine_labels": labels,
            "coarse_labels": [0] * count,
            "data": data,
        }
        pickled(root / split, content)
    pickled(root / "meta", {"fine_label_names": [*FINE], "coarse_label_names": ["things"]})


def cifar_binary(folder: Path) -> None:
    root = folder / "cifar-100-binary"
    root.mkdir(parents=True)
    for split, count in COUNTS.items():
        data, labels = cifar_arrays(split, count)
        head = np.array([[0, label] for label in labels], np.uint8)
        (root / f"{split}.bin").write_bytes(np.hstack([head, data]).tobytes())
    text(root / "fine_label_names.txt", FINE)
    text(root / "coarse_label_names.txt", ["things"])


def tarball(root: Path, members: Mapping[str, Path] | None = None) -> Path:
    """The archive of a folder, beside it; and other members under names of their own."""
    archive = root.with_name(f"{root.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, root.name)
        for name, path in (members or {}).items():
            tar.add(path, name)
    return archive


def by_class(
    folder: Path, classes: Sequence[str] = WNIDS, splits: Sequence[str] = ("train", "val")
) -> None:
    for split, count in zip(splits, PER_CLASS.values(), strict=True):
        for name in classes:
            for i in range(count):
                image(folder / split / name / f"{name}_{split}_{i}.JPEG")


FEW_SHOT = {"train": WNIDS[:1], "val": WNIDS[1:2], "test": WNIDS[2:]}


def mini_images(name: str) -> list[str]:
    return [f"{name}{i:08}.jpg" for i in range(12)]


def mini_imagenet(folder: Path, *, nested: bool = False) -> None:
    for part, classes in FEW_SHOT.items():
        listed = [(file, name) for name in classes for file in mini_images(name)]
        rows(folder / f"{part}.csv", ("filename", "label"), listed)
        for file, name in listed:
            image(folder / "images" / (name if nested else "") / file)


def mini_parts(folder: Path) -> None:
    for part, classes in FEW_SHOT.items():
        for name in classes:
            for file in mini_images(name):
                image(folder / part / name / file)


IDS = (3, 1, 2)
"""The devkit's numbers of the three classes: by an order of its own."""
TRUTH = (2, 3, 1, 1, 2, 3)


def imagenet_flat(root: Path) -> None:
    for name in WNIDS:
        for i in range(PER_CLASS["train"]):
            image(root / "train" / name / f"{name}_{i}.JPEG")
    for i in range(1, len(TRUTH) + 1):
        image(root / "val" / f"ILSVRC2012_val_{i:08}.JPEG")


def devkit(folder: Path) -> None:
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    columns: dict[str, list[object]] = {
        "ILSVRC2012_ID": [*IDS, 4],
        "WNID": [*WNIDS, "n00001740"],
        "words": ["tench, Tinca tinca", "Chihuahua", "kit fox", "entity"],
        "gloss": ["", "", "", ""],
        "num_children": [0, 0, 0, 3],
    }
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": structs(columns)})
    text(data / "ILSVRC2012_validation_ground_truth.txt", map(str, TRUTH))


def solution(folder: Path) -> None:
    wnids = {of: name for name, of in zip(WNIDS, IDS, strict=True)}
    lines = [
        (f"ILSVRC2012_val_{i:08}", f"{wnids[of]} 1 2 30 40 {wnids[of]} 5 6 7 8 ")
        for i, of in enumerate(TRUTH, 1)
    ]
    # As Kaggle has it, in no order.
    rows(folder / "LOC_val_solution.csv", ("ImageId", "PredictionString"), reversed(lines))


def structs(columns: Mapping[str, Sequence[object]]) -> Any:
    """What savemat writes as an array of structs of 1 row."""
    count = len(next(iter(columns.values())))
    made = np.empty((1, count), [(name, object) for name in columns])
    for name, values in columns.items():
        made[name][0] = [*values]
    return made


def cells(values: Iterable[str], *, column: bool = False) -> Any:
    """What savemat writes as a cell array of text."""
    found = np.array([*values], object)
    return found.reshape((-1, 1) if column else (1, -1))


def labelled(classes: Sequence[str], split: str) -> list[tuple[int, str]]:
    """Numbers of classes from 1 on, and names; in no order."""
    both = [(label + 1, name) for label, name in enumerate(classes)] * PER_CLASS[split]
    return both[::-1] if split == "test" else both


def aircraft(folder: Path) -> None:
    data = folder / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", VARIANTS)
    number = 1_000_000
    for split, name in (("train", "trainval"), ("test", "test")):
        lines = []
        for _, variant in labelled(VARIANTS, split):
            number += 7
            image(data / "images" / f"{number:07}.jpg")
            lines.append(f"{number:07} {variant}")
        text(data / f"images_variant_{name}.txt", lines)


def cars(folder: Path, *, doubled: bool = False) -> None:
    root = folder / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells(CARS)})
    for split in PER_CLASS:
        numbers = [label for label, _ in labelled(CARS, split)]
        names = [f"{i:05}.jpg" for i in range(1, len(numbers) + 1)]
        boxes: dict[str, list[object]] = {f"bbox_{corner}": [1] * len(names) for corner in CORNERS}
        full = structs({**boxes, "class": [*map(np.uint8, numbers)], "fname": names})
        if split == "train":
            savemat(root / "devkit" / "cars_train_annos.mat", {"annotations": full})
        else:
            plain = {"annotations": structs({**boxes, "fname": names})}
            savemat(root / "devkit" / "cars_test_annos.mat", plain)
            savemat(root / "cars_test_annos_withlabels.mat", {"annotations": full})
        place = root / f"cars_{split}" / (f"cars_{split}" if doubled else "")
        for name in names:
            image(place / name)


def cars_in_one_folder(folder: Path) -> None:
    names: list[str] = []
    numbers: list[int] = []
    held_out: list[int] = []
    for split in PER_CLASS:
        for label, _ in labelled(CARS, split):
            names.append(f"car_ims/{len(names) + 1:06}.jpg")
            numbers.append(label)
            held_out.append(int(split == "test"))
            image(folder / names[-1])
    columns: dict[str, list[Any]] = {"relative_im_path": names, "class": numbers, "test": held_out}
    annotations = {"annotations": structs(columns), "class_names": cells(CARS)}
    savemat(folder / "cars_annos.mat", annotations)


def dogs(folder: Path, lists: str = "lists") -> None:
    (folder / lists).mkdir(parents=True, exist_ok=True)
    for split in PER_CLASS:
        found = labelled(DOGS, split)
        names = [f"{name}/{name[:9]}_{split}{i}.jpg" for i, (_, name) in enumerate(found)]
        for name in names:
            image(folder / "Images" / name)
        content = {
            "file_list": cells(names, column=True),
            "annotation_list": cells((name[:-4] for name in names), column=True),
            "labels": np.array([[float(label)] for label, _ in found]),
        }
        savemat(folder / lists / f"{split}_list.mat", content)


def cub(folder: Path) -> None:
    root = folder / "CUB_200_2011"
    found = [
        (label, f"{bird}/{bird[4:]}_{split}_{i}.jpg", int(split == "train"))
        for split in PER_CLASS
        for i, (label, bird) in enumerate(labelled(BIRDS, split))
    ]
    for _, name, _ in found:
        image(root / "images" / name)
    text(root / "classes.txt", (f"{i} {bird}" for i, bird in enumerate(BIRDS, 1)))
    text(root / "images.txt", (f"{i} {name}" for i, (_, name, _) in enumerate(found, 1)))
    labels = (f"{i} {label}" for i, (label, _, _) in enumerate(found, 1))
    text(root / "image_class_labels.txt", labels)
    flags = (f"{i} {train}" for i, (_, _, train) in enumerate(found, 1))
    text(root / "train_test_split.txt", flags)
