"""IDX files: read, trained on, damaged."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcfunc.recipes import data
from gcfunc.recipes.cli import main
from tests.recipes.command import AfterStep, interrupt, refused, train, untimed

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: "np.ndarray[Any, np.dtype[np.uint8]]") -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Random images of 5x6 pixels and three classes."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in zip(FILES, (40, 40, 20, 20), strict=True):
        shape, top = ((count, 5, 6), 256) if "images" in name else ((count,), 3)
        (folder / name).write_bytes(idx(rng.integers(0, top, shape).astype(np.uint8)))
    return folder


def test_idx_round_trip(idx_folder: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 5, 6)).astype(np.float64)
    labels = rng.integers(0, 3, (40,))
    read = data.load("mnist", idx_folder)
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(read.train.images.squeeze(1), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(read.train.labels, labels)
    assert (read.name, len(read.test), read.classes) == ("idx", 20, 3)


def test_idx_files_train_raw_and_gzipped(tmp_path: Path, idx_folder: Path) -> None:
    options = ("--data", str(idx_folder), "--epochs", "1", "--eager")
    raw = train(tmp_path / "raw", *options)
    for name in FILES:
        path = idx_folder / name
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = train(tmp_path / "zipped", *options)
    assert raw["data"]["train"] == 40
    assert untimed(raw) == untimed(zipped)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def cut_gzip(path: Path) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:-10])
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (0, Path.unlink, "neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"),
        (3, Path.unlink, "neither t10k-labels-idx1-ubyte nor"),
        (0, cut, r"images-idx3-ubyte is cut off: 1,215 bytes, 1,216 expected"),
        (1, lengthen, r"labels-idx1-ubyte is too long: 49 bytes, 48 expected"),
        (2, cut_gzip, r"t10k-images-idx3-ubyte\.gz is not a whole gzip file"),
        (2, lambda p: p.rename(f"{p}.gz"), r"t10k-images-idx3-ubyte\.gz is not a whole gzip file"),
        (0, lambda p: p.write_bytes(b""), "starts with nothing, not 00 00 08 03"),
        (0, lambda p: p.write_bytes(b"\0\0\x08\3\0\0"), "cut off in its header"),
        (1, lambda p: p.write_bytes(b"GIF89a"), "starts with 47 49 46 38, not 00 00 08 01"),
        (0, lambda p: p.write_bytes(idx(np.zeros((40,), np.uint8))), "not an IDX file of 3-dim"),
        (1, lambda p: p.write_bytes(idx(np.zeros((39,), np.uint8))), "40 train images, but 39"),
        (
            2,
            lambda p: p.write_bytes(idx(np.zeros((20, 6, 6), np.uint8))),
            "are 5x6, test images 6x6",
        ),
    ],
)
def test_damaged_idx_files(
    idx_folder: Path,
    capsys: pytest.CaptureFixture[str],
    file: int,
    damage: Callable[[Path], object],
    said: str,
) -> None:
    damage(idx_folder / FILES[file])
    refused(["train", "--data", str(idx_folder)], said, capsys)


def test_no_images_and_tiny_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shape, said in (((0, 5, 5), "there are no train images"), ((4, 3, 9), "3x9 are too small")):
        for name in FILES:
            array = np.zeros(shape if "images" in name else shape[:1], np.uint8)
            (tmp_path / name).write_bytes(idx(array))
        refused(["train", "--data", str(tmp_path), "--out", str(tmp_path)], said, capsys)


def test_resume_on_other_data(
    tmp_path: Path,
    idx_folder: Path,
    after_step: AfterStep,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after_step(1, interrupt)
    out = tmp_path / "out"
    assert main(["train", "--data", str(idx_folder), "--eager", "--out", str(out)]) == 130
    path = idx_folder / FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused(["train", "--resume", str(out)], "is not the data that .* was trained on", capsys)
