"""CIFAR-100's archives, the one of pickles for Python and the one of plain bytes."""

from pathlib import Path
from typing import Any

import numpy as np

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers import pickles
from gcfunc.recipes.readers.index import Found, Pixels, Split
from gcfunc.recipes.readers.sources import members

_PIXELS = 3 * 32 * 32
_RECORD = 2 + _PIXELS
"""Coarse label, fine label, pixels."""


def python(folder: Path) -> Found | None:
    """``cifar-100-python``, unpacked or as ``.tar.gz``."""
    stem = "cifar-100-python"
    files = ("meta", "train", "test")
    found = members(folder, stem, files)
    if found is None:
        return None
    where, raw = found
    meta, train, test = (
        _dict(pickles.load(content, where / name), where / name)
        for name, content in zip(files, raw, strict=True)
    )
    names = _value(meta, "fine_label_names", list, where / "meta")
    return Found(
        where,
        [str(name) for name in names],
        _pickled(train, "train", where / "train"),
        _pickled(test, "test", where / "test"),
    )


def binary(folder: Path) -> Found | None:
    """``cifar-100-binary``, unpacked or as ``.tar.gz``."""
    files = ("fine_label_names.txt", "train.bin", "test.bin")
    found = members(folder, "cifar-100-binary", files)
    if found is None:
        return None
    where, (names, train, test) = found
    return Found(
        where,
        names.decode("utf-8", "replace").split(),
        _records(train, where / "train.bin"),
        _records(test, where / "test.bin"),
    )


def _dict(value: Any, where: Path) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} holds a {type(value).__name__} and no dict")
    return value


def _value(content: dict[Any, Any], key: str, kind: type, where: Path) -> Any:
    value = content.get(key)
    if not isinstance(value, kind):
        has = ", ".join(sorted(map(str, content)))
        raise UsageError(f"{where} should have a {kind.__name__} {key!r}; it has {has}")
    return value


def _pickled(content: dict[Any, Any], split: str, where: Path) -> Split:
    data = _value(content, "data", np.ndarray, where)
    labels = _value(content, "fine_labels", list, where)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise UsageError(
            f"{where}: data is {data.dtype} {data.shape}, not uint8 (images, {_PIXELS})"
        )
    if not all(isinstance(label, int) for label in labels):
        raise UsageError(f"{where}: not all fine_labels are whole numbers")
    # The two files look alike, and a test set to train on would go unnoticed.
    written = str(content.get("batch_label", split))
    if not written.startswith(split):
        raise UsageError(f"{where} calls itself {written!r}")
    return Split(_upright(data), np.array(labels, np.int64))


def _records(raw: bytes, where: Path) -> Split:
    if len(raw) % _RECORD:
        raise UsageError(
            f"{where} is cut off: {len(raw):,} bytes are not a multiple of the {_RECORD:,} that "
            "an image has"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, _RECORD)
    return Split(_upright(records[:, 2:]), records[:, 1].astype(np.int64))


def _upright(planes: Pixels) -> Pixels:
    """Rows of pixels with their colors, from one plane a color."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
