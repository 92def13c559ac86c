"""What is made of images: of all kinds of files, by the reference's transforms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from gcfunc.recipes import images
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.images import VIEWS, Views, decode, verify
from gcfunc.recipes.readers import read
from gcfunc.recipes.readers.index import Files, Split
from tests.recipes import made

TRUE_SIZES = {"cifar": 32, "imagenet": 224, "fine-grained": 448}


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("name", VIEWS)
def test_sizes(name: str) -> None:
    views = VIEWS[name]()
    given = noise(32, 32) if name == "cifar" else noise(90, 70)
    for transform in (views.train, views.test):
        out = transform(given)
        assert type(out) is torch.Tensor
        assert (out.shape, out.dtype) == ((3, views.size, views.size), torch.float32)
    assert views.size == TRUE_SIZES[name]


def plain(*steps: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Of torchvision's first transforms, which the reference's recipes were written in."""
    return transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(mean=mean, std=std)]
    )


OF_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
REFERENCE = {
    "cifar": plain(mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276)),
    "imagenet": plain(transforms.Resize(20), transforms.CenterCrop(16), **OF_IMAGENET),
    "fine-grained": plain(transforms.Resize(20), transforms.CenterCrop(16), **OF_IMAGENET),
}


def small(name: str) -> tuple[Views, Image.Image]:
    if name == "cifar":
        return VIEWS[name](), noise(32, 32)
    # Even margins: an odd one is rounded, and a flipped image's middle is then another one.
    return VIEWS[name](size=16, resize=20), noise(48, 32)


@pytest.mark.parametrize("name", VIEWS)
def test_testing_draws_nothing_and_is_the_references(name: str) -> None:
    views, given = small(name)
    before = torch.get_rng_state()
    torch.testing.assert_close(views.test(given), REFERENCE[name](given), atol=1e-6, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["cifar", "fine-grained"])
def test_what_training_can_make_of_an_image(name: str) -> None:
    """The reference has 81 crops of a padded image, or one, each flipped or not."""
    views, given = small(name)
    middle = REFERENCE[name](given)
    if name == "cifar":
        zero = -torch.tensor(images.CIFAR100[0]) / torch.tensor(images.CIFAR100[1])
        padded = zero.view(3, 1, 1).expand(3, 40, 40).clone()
        padded[:, 4:36, 4:36] = middle
        crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    else:
        crops = [middle]
    possible = torch.stack([view for crop in crops for view in (crop, crop.flip(2))])
    torch.manual_seed(0)
    met = set()
    for _ in range(40):
        distance = (possible - views.train(given)).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        met.add(int(distance.argmin()))
    assert {i % 2 for i in met} == {0, 1}, "flipped and not"
    assert len(met) > 25 if name == "cifar" else len(met) == 2


def test_training_on_imagenet_sees_parts_of_an_image() -> None:
    """A ramp of colors tells where a crop was, and whether it was flipped."""
    ramp = np.tile(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (100, 1, 3))
    train = VIEWS["imagenet"](size=16).train
    torch.manual_seed(0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in images.IMAGENET)
    areas, flipped = [], 0
    for _ in range(200):
        row = ((train(Image.fromarray(ramp)) * std + mean) * 255 / 2)[0].mean(0)
        flipped += bool(row[0] > row[-1])
        areas.append(float((row[0] - row[-1]).abs()) / 100)
    assert 60 < flipped < 140
    # Widths: from the root of 8 % at the least favorable aspect on.
    assert 0.15 < min(areas) < 0.4 < 0.8 < max(areas) <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "1", "LA"])
def test_files_of_all_modes_come_in_three_colors(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{'png' if mode in ('P', 'RGBA', '1', 'LA') else 'jpg'}"
    made.image(path, mode=mode)
    with Image.open(path) as file:
        assert file.mode == mode
        expected = np.asarray(file.convert("RGB"))
    found = decode(Split.of(tmp_path, [(path.name, 0)]).images, 0)
    assert (found.mode, found.size) == ("RGB", (40, 30))
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_a_png_that_is_called_jpeg(tmp_path: Path) -> None:
    made.image(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.JPEG")
    assert decode(Split.of(tmp_path, [("x.JPEG", 0)]).images, 0).size == (40, 30)


def test_arrays_are_images_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(decode(pixels, 1)), pixels[1])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_files_that_are_cut_off_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    made.image(path)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], whole[:10], b"<html>not found</html>"):
        path.write_bytes(raw)
        with pytest.raises(UsageError, match=rf"x\.{suffix} is not a whole image: "):
            decode(Split.of(tmp_path, [(path.name, 0)]).images, 0)


def test_verifying_all(tmp_path: Path) -> None:
    made.cub(tmp_path)
    index = read("cub", tmp_path, strict=False)
    verify(index)
    for split, i in ((index.train, 4), (index.test, 2)):
        assert isinstance(split.images, Files)
        path = split.images.path(i)
        path.write_bytes(path.read_bytes()[:-200])
    assert isinstance(index.train.images, Files)
    name = index.train.images.path(4).name
    with pytest.raises(UsageError, match=f"{name} is not a whole image: .*; 1 more are not either"):
        verify(index)


def test_verifying_arrays(tmp_path: Path) -> None:
    made.cifar_python(tmp_path)
    verify(read("cifar100", tmp_path, strict=False))
