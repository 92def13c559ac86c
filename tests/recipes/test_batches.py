"""Batches: the same wherever they are taken up, however many load them or share them."""

import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from gcfunc.recipes import batches, images
from gcfunc.recipes.batches import Batch, Loader, loader
from gcfunc.recipes.distributed import Group
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.readers import read
from gcfunc.recipes.readers.index import Files, Index, Split
from tests.recipes import made

pytestmark = [
    # Said from Python 3.12 on of every worker of a DataLoader.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    # Where there are fewer cores.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

VIEWS = images.imagenet(size=8, resize=10)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("cub")
    made.cub(folder)
    return read("cub", folder, strict=False)


def train(index: Index, batch_size: int = 4, **options: Any) -> Loader:
    return loader(index, "train", VIEWS, batch_size, **{"seed": 3, **options})


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert torch.equal(batch[0], other[0])
        assert torch.equal(batch[1], other[1])


def test_an_epoch_has_each_image_once(index: Index) -> None:
    given = [*train(index).epoch(0)]
    assert [len(labels) for _, labels in given] == [4, 4, 1]
    assert train(index).batches == 3
    assert (
        sorted(torch.cat([labels for _, labels in given]).tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    )
    numbers = batches.order(3, 0, 9)
    assert sorted(numbers.tolist()) == [*range(9)]
    expected = torch.from_numpy(index.train.labels[numbers])
    assert torch.equal(torch.cat([labels for _, labels in given]), expected)


def test_the_last_batch_can_be_left_out(index: Index) -> None:
    short = train(index, drop_last=True)
    assert short.batches == 2
    assert_same([*short.epoch(1)], [*train(index).epoch(1)][:2])
    with pytest.raises(UsageError, match="a batch of 10 is more than the 9 train images"):
        train(index, 10, drop_last=True)


def test_seeds_and_epochs_differ(index: Index) -> None:
    orders = {tuple(batches.order(seed, epoch, 9)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    # The same image looks otherwise, too.
    views = [sorted_images(index, seed, epoch) for seed, epoch in ((3, 0), (3, 1), (4, 0))]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def sorted_images(index: Index, seed: int, epoch: int) -> torch.Tensor:
    given = torch.cat([x for x, _ in train(index, seed=seed).epoch(epoch)])
    return given[torch.from_numpy(np.argsort(batches.order(seed, epoch, 9)))]


def test_images_of_an_epoch_are_not_augmented_alike(index: Index) -> None:
    """Of one image listed nine times all views differ."""
    assert isinstance(index.train.images, Files)
    one = index.train.images.names[[0] * 9]
    split = Split(Files(index.train.images.root, one), index.train.labels)
    again = Index("one", index.classes, split, index.test, "")
    given = torch.cat([x for x, _ in train(again).epoch(0)])
    assert len({tuple(view.flatten().tolist()) for view in given}) == 9


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_an_epoch_is_taken_up_at_any_batch(index: Index, first: int) -> None:
    assert_same([*train(index).epoch(5, first)], [*train(index).epoch(5)][first:])


def test_nothing_before_is_decoded(index: Index) -> None:
    with mock.patch.object(batches, "decode", wraps=images.decode) as decode:
        given = [*train(index).epoch(5, 2)]
    assert [len(labels) for _, labels in given] == [1]
    assert decode.call_count == 1
    assert decode.call_args.args[1] == batches.order(3, 5, 9)[-1]


def test_workers_change_nothing(index: Index) -> None:
    one = train(index)
    two = train(index, workers=2)
    assert_same([*two.epoch(0)], [*one.epoch(0)])
    # The workers are those of the epoch before; and one is left in the middle.
    next(two.epoch(1))
    assert_same([*two.epoch(2, 1)], [*one.epoch(2, 1)])
    assert_same([*train(index, workers=3).epoch(2)], [*one.epoch(2)])


def test_workers_can_be_started_anew(index: Index) -> None:
    """As on macOS and Windows, where they get a copy of the dataset."""
    ours = batches._Images(index.train, VIEWS.train, VIEWS.size, 3)
    copy = pickle.loads(pickle.dumps(ours))
    assert_same([copy.__getitems__([(1, 4)])], [ours.__getitems__([(1, 4)])])  # type: ignore[list-item]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_see_what_one_sees(index: Index, size: int) -> None:
    alone = [*train(index).epoch(1)]
    shares = [[*train(index, group=Group(rank, size)).epoch(1)] for rank in range(size)]
    for batch, parts in zip(alone, zip(*shares, strict=True), strict=True):
        for whole, k in zip(batch, (0, 1), strict=True):
            together = torch.empty_like(whole)
            for rank, part in enumerate(parts):
                together[rank::size] = part[k]
            assert torch.equal(together, whole)
    # Of the last batch, of one image, all but the first have none.
    assert shares[1][-1][0].shape == (0, 3, 8, 8)
    assert shares[1][-1][1].dtype == torch.int64


def test_testing_goes_through_the_list(index: Index) -> None:
    given = [*loader(index, "test", VIEWS, 4, seed=9).epoch()]
    assert torch.cat([labels for _, labels in given]).tolist() == index.test.labels.tolist()
    expected = torch.stack([VIEWS.test(images.decode(index.test.images, i)) for i in range(6)])
    assert torch.equal(torch.cat([x for x, _ in given]), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_generator_is_left_as_it_was(index: Index, workers: int) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    for _ in train(index, workers=workers).epoch(0):
        assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    here = [*train(index).epoch(0)]
    torch.manual_seed(13)
    assert_same([*train(index).epoch(0)], here)


def test_no_more_than_a_batch_is_in_memory(index: Index) -> None:
    """One image is open at a time, and none of the batch after is loaded before it is asked for."""
    open_now: set[int] = set()
    most = 0

    def decode(files: Any, i: int) -> Image.Image:
        nonlocal most
        image = images.decode(files, i)
        open_now.add(id(image))
        weakref.finalize(image, open_now.discard, id(image))
        most = max(most, len(open_now))
        return image

    with mock.patch.object(batches, "decode", side_effect=decode) as counted:
        seen: Iterator[Batch] = train(index).epoch(0)
        assert counted.call_count == 0
        for expected in (4, 8, 9):
            next(seen)
            assert counted.call_count == expected
    assert most == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_breaks_is_named_in_one_line(workers: int, tmp_path: Path) -> None:
    made.cub(tmp_path)
    index = read("cub", tmp_path, strict=False)
    assert isinstance(index.train.images, Files)
    path = index.train.images.path(int(batches.order(3, 0, 9)[5]))
    path.write_bytes(path.read_bytes()[:300])
    seen = train(index, workers=workers).epoch(0)
    next(seen)
    with pytest.raises(UsageError, match=f"{path.name} is not a whole image") as raised:
        next(seen)
    assert "\n" not in str(raised.value)


def test_arrays_are_loaded_too(tmp_path: Path) -> None:
    made.cifar_binary(tmp_path)
    index = read("cifar100", tmp_path, strict=False)
    (given,) = loader(index, "test", images.cifar(), 6).epoch()
    data, labels = made.cifar_arrays("test", 6)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in images.CIFAR100)
    expected = (torch.from_numpy(data.reshape(-1, 3, 32, 32)) / 255 - mean) / std
    torch.testing.assert_close(given[0], expected)
    assert given[1].tolist() == labels
