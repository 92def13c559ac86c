"""Getting at what datasets are described by: text, MATLAB's files, members of archives.

Nothing is unpacked and nothing is written.
"""

import csv
import gzip
import io
import tarfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gcfunc.recipes.errors import UsageError

_MOST = 2**29
"""More than any member that is read has. An archive of zeros can promise far more than it is."""


def holding(marker: str, places: Sequence[Path]) -> Path | None:
    """The first of the places where there is a file or folder ``marker``."""
    return next((place for place in places if (place / marker).exists()), None)


def require_inside(name: str, where: Path) -> str:
    """``name``, of which ``where`` says that it is in the folder.

    Raises:
        UsageError: it leads out of it.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(f"{where} names {name}, which is outside of its folder")
    return name


def number(text: object, most: int, where: Path) -> int:
    """The class or other number from 1 to ``most`` that ``where`` has, counted from 0.

    Raises:
        UsageError: it is no such number.
    """
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = 0.0
    if not (1 <= value <= most and value.is_integer()):
        raise UsageError(f"{where} has {str(text)!r} where a number from 1 to {most} should be")
    return int(value) - 1


def content(path: Path) -> bytes:
    """What is in the file.

    Raises:
        UsageError: it is missing, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path} is missing") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def lines(path: Path) -> list[str]:
    """The lines of a text that are not blank."""
    return [line for line in _text(content(path), path).splitlines() if line.strip()]


def pairs(path: Path) -> list[tuple[str, str]]:
    """Both parts of each line, which end and begin at the first space."""
    found = []
    for number_, line in enumerate(lines(path), 1):
        first, _, second = line.strip().partition(" ")
        if not second:
            raise UsageError(f"{path}, line {number_}: {line!r} should be two words or more")
        found.append((first, second.strip()))
    return found


def table(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The columns of a CSV file with a header, row by row."""
    rows = csv.DictReader(io.StringIO(_text(content(path), path), newline=""))
    missing = {*columns}.difference(rows.fieldnames or ())
    if missing:
        raise UsageError(f"{path} has no column {', '.join(sorted(missing))}")
    found = []
    for row in rows:
        values = [row[column] for column in columns]
        if not all(values):
            raise UsageError(f"{path}, line {rows.line_num} is cut off")
        found.append(values)
    return found


def _text(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error}") from error


def matlab(raw: bytes, where: Path, variables: Collection[str]) -> list[Any]:
    """These variables of a .mat file, as arrays of one dimension."""
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(raw), squeeze_me=True, variable_names=[*variables])
    except Exception as error:  # loadmat raises whatever the bytes it trips over make it raise
        raise UsageError(f"{where} is not a whole MATLAB file: {error}") from error
    missing = [name for name in variables if name not in found]
    if missing:
        raise UsageError(f"{where} has no variable {', '.join(missing)}")
    return [np.atleast_1d(found[name]) for name in variables]


def fields(struct: Any, names: Sequence[str], where: Path) -> list[tuple[Any, ...]]:
    """These fields of MATLAB's array of structs, struct by struct."""
    missing = [name for name in names if name not in (struct.dtype.names or ())]
    if missing:
        raise UsageError(f"{where} has no field {', '.join(missing)}")
    return [*zip(*(struct[name] for name in names), strict=True)]


def members(folder: Path, stem: str, wanted: Sequence[str]) -> tuple[Path, list[bytes]] | None:
    """These files of an archive, unpacked or not: ``stem`` is the one folder in it.

    Args:
        folder: Has the archive ``stem.tar.gz`` or what it unpacks to, or is one of the two.
        stem: The archive's name.
        wanted: Names in it.

    Returns:
        Where they are and what is in them; ``None`` if there is neither.

    Raises:
        UsageError: some are missing or cannot be read, or the archive is not whole or not safe.
    """
    for place in (folder / stem, folder):
        if (place / wanted[0]).is_file() or (place.is_dir() and place.name == stem):
            return place, [content(place / name) for name in wanted]
    archive = folder if folder.is_file() else folder / f"{stem}.tar.gz"
    if archive.is_file() and archive.name.startswith(stem):
        return archive, _unpacked(archive, stem, wanted)
    return None


def _unpacked(archive: Path, stem: str, wanted: Sequence[str]) -> list[bytes]:
    found: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                require_inside(member.name, archive)
                name = member.name.removeprefix("./").removeprefix(f"{stem}/")
                if not (member.isfile() or member.isdir()):
                    raise UsageError(f"{archive} has {member.name}, which is a link or a device")
                if name in wanted and member.isfile():
                    if member.size > _MOST:
                        raise UsageError(f"{archive}: {member.name} has {member.size:,} bytes")
                    stream = tar.extractfile(member)
                    assert stream is not None, "it is a file"
                    found[name] = stream.read()
            # gzip compares its checksum at the end, where tar's own end may come before it.
            while raw.read(2**20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{archive} is not a whole .tar.gz: {error}") from error
    except OSError as error:
        raise UsageError(f"cannot read {archive}: {error.strerror}") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UsageError(f"{archive} has no {stem}/{missing[0]}")
    return [found[name] for name in wanted]
