"""Images as a network sees them: decoded, cut, flipped, normalized."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, float32
from torchvision.transforms import v2

from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers.index import Files, Index, Pixels

Transform = Callable[[Image.Image], Tensor]

CIFAR100 = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of each color, of values from 0 to 1."""


@dataclass(frozen=True)
class Views:
    """What becomes of an image.

    Attributes:
        size: Height and width of what both transforms give.
        train: For images to learn from. What it draws is drawn from torch's generator.
        test: For images to be judged on. It draws nothing.
    """

    size: int
    train: Transform
    test: Transform


def cifar(size: int = 32, padding: int = 4) -> Views:
    """Cut out of the image with zeros around it, and flipped or not; in testing as it is."""
    return _views(
        size,
        CIFAR100,
        train=[v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip()],
        test=[],
    )


def imagenet(size: int = 224, resize: int = 256) -> Views:
    """A part of the image, 8 to 100 % of it, flipped or not; in testing its middle."""
    return _views(
        size,
        IMAGENET,
        train=[v2.RandomResizedCrop(size, scale=(0.08, 1)), v2.RandomHorizontalFlip()],
        test=[v2.Resize(resize), v2.CenterCrop(size)],
    )


def fine_grained(size: int = 448, resize: int = 512) -> Views:
    """Its middle; in training flipped or not."""
    return _views(
        size,
        IMAGENET,
        train=[v2.Resize(resize), v2.RandomHorizontalFlip(), v2.CenterCrop(size)],
        test=[v2.Resize(resize), v2.CenterCrop(size)],
    )


VIEWS: dict[str, Callable[..., Views]] = {
    "cifar": cifar,
    "imagenet": imagenet,
    "fine-grained": fine_grained,
}


def _views(size: int, normal: Any, train: list[Any], test: list[Any]) -> Views:
    end = [v2.ToImage(), v2.ToDtype(float32, scale=True), v2.Normalize(*normal), v2.ToPureTensor()]
    return Views(size, v2.Compose([*train, *end]), v2.Compose([*test, *end]))


def decode(images: Files | Pixels, i: int) -> Image.Image:
    """An image in red, green and blue, whatever its file has: gray, CMYK, a palette.

    Raises:
        UsageError: its file is no whole image.
    """
    if isinstance(images, np.ndarray):
        return Image.fromarray(images[i])
    path = images.path(i)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises whatever the bytes it trips over make it raise
        raise UsageError(f"{path} is not a whole image: {error}") from error


def verify(index: Index) -> None:
    """Decode every image once, rather than find out in the middle of training.

    Small ones, as far as their format allows: a JPEG is read to its end all the same.

    Raises:
        UsageError: some are no whole images; it names the first and says how many there are.
    """

    def fault(images: Files, i: int) -> list[str]:
        path = images.path(i)
        try:
            with Image.open(path) as image:
                image.draft("RGB", (1, 1))
                image.load()
        except Exception as error:
            return [f"{path} is not a whole image: {error}"]
        return []

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [
            *chain.from_iterable(
                chain.from_iterable(pool.map(fault, [s.images] * len(s), range(len(s))))
                for s in (index.train, index.test)
                if isinstance(s.images, Files)
            )
        ]
    if faults:
        more = f"; {len(faults) - 1:,} more are not either" if len(faults) > 1 else ""
        raise UsageError(faults[0] + more)
