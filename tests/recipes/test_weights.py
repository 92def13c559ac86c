"""Pretrained weights: files that fit, files that do not, files that are something else."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models as torchvision

from gcfunc.recipes.applications import RECIPES
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.networks.models import build
from gcfunc.recipes.networks.weights import load_weights

FIRST, CLASSIFIER = "conv1.weight", ["fc.bias", "fc.weight"]


def model(classes: int = 3, name: str = "cub-resnet50") -> nn.Module:
    return build(RECIPES[name], width=4, classes=classes)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names under which two states hold the same."""
    assert a.keys() == b.keys()
    return [name for name in a if torch.equal(a[name], b[name])]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def test_all_of_it(path: Path) -> None:
    source, target = model(), model()
    torch.save(source.state_dict(), path)
    assert CLASSIFIER[1] not in equal(state(target), state(source))
    assert load_weights(target, path) == []
    assert equal(state(target), state(source)) == [*state(source)]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("cub-resnet50", CLASSIFIER),
        ("cifar100-resnext29", CLASSIFIER),
        ("cifar100-vgg11", ["classifier.bias", "classifier.weight"]),
        ("cifar100-densenet121", ["classifier.bias", "classifier.weight"]),
    ],
)
def test_a_classifier_for_other_classes_stays_fresh(path: Path, name: str, head: list[str]) -> None:
    source, target = model(5, name), model(3, name)
    torch.save(source.state_dict(), path)
    before = state(target)
    assert load_weights(target, path) == head
    after = state(target)
    assert all(torch.equal(after[name], before[name]) for name in head)
    rest = [name for name in after if name not in head]
    assert all(torch.equal(after[name], source.state_dict()[name]) for name in rest)


def test_torchvisions_files_fit_and_those_of_before_batches_were_counted() -> None:
    with torch.device("meta"):
        own, theirs = build(RECIPES["cars-resnet50"]), torchvision.resnet50()
    shapes = {name: t.shape for name, t in theirs.state_dict().items()}
    assert own.state_dict().keys() == shapes.keys()
    assert {n for n, t in own.state_dict().items() if t.shape != shapes[n]} == {*CLASSIFIER}


def test_files_from_before_batches_were_counted(path: Path) -> None:
    source, target = model(), model()
    torch.save({n: t for n, t in source.state_dict().items() if "num_batches" not in n}, path)
    assert load_weights(target, path) == []
    assert equal(state(target), state(source)) == [*state(source)]


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(name)


def reshape(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update((name, torch.zeros(2, 7)) for name in names)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without(FIRST), r"does not fit the network: 1 missing: conv1\.weight$"),
        (without("fc.bias"), r"1 missing: fc\.bias$"),
        (without("bn1.running_mean"), r"1 missing: bn1\.running_mean$"),
        (
            lambda content: content.update({f"module.{n}": content.pop(n) for n in [*content]}),
            r"267 missing: \S+, \S+, \S+ and 264 more; 320 unexpected: module\.\S+, .* 317 more$",
        ),
        (reshape("head.weight"), r"1 unexpected: head\.weight$"),
        (reshape(FIRST), r"1 of another shape: conv1\.weight \(2x7, not 4x3x7x7\)$"),
        (reshape(FIRST, "fc.weight"), r": 1 of another shape: conv1\.weight \(2x7, not 4x3x7x7\)$"),
        (
            lambda content: content.update({"bn1.num_batches_tracked": torch.zeros(2)}),
            r"bn1\.num_batches_tracked \(2, not scalar\)$",
        ),
        (lambda content: content.update(epoch=3), "is not a state dict: names with a tensor each"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    path: Path, damage: Callable[[dict[str, Any]], object], said: str
) -> None:
    content = state(model())
    damage(content)
    torch.save(content, path)
    refused(path, said)


class Harmful:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def cut(path: Path) -> None:
    torch.save(model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "cannot read .*weights.pth: No such file"),
        (Path.mkdir, "cannot read .*weights.pth: Is a directory"),
        (lambda path: path.write_bytes(b""), "is not a file of weights"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n"), "is not a file of weights"),
        (lambda path: path.write_text("weights"), "is not a file of weights"),
        (cut, "is not a file of weights"),
        (lambda path: torch.save(model(), path), "is not a file of weights"),
        (lambda path: torch.save([torch.zeros(2)], path), "is not a state dict"),
        (lambda path: torch.save({"state_dict": model().state_dict()}, path), "is not a state"),
    ],
)
def test_other_files(path: Path, write: Callable[[Path], object], said: str) -> None:
    write(path)
    refused(path, said)


@pytest.mark.parametrize("save", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x, 2))])
def test_nothing_in_a_file_is_executed(path: Path, save: Callable[[Any, Path], None]) -> None:
    made = path.parent / "made"
    save({FIRST: Harmful(made)}, path)
    refused(path, "is not a file of weights")
    assert not made.exists()


def refused(path: Path, said: str) -> None:
    target = model()
    before = state(target)
    with pytest.raises(UsageError, match=said) as error:
        load_weights(target, path)
    assert str(path) in str(error.value)
    assert equal(state(target), before) == [*before]
