"""Batches of images in an order that can be taken up anywhere, by any number of processes.

What a batch holds depends on the seed, the epoch and the batch's number alone: not on which batches
were loaded before, how many workers load them, or how many processes share them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from gcfunc.recipes.distributed import Group
from gcfunc.recipes.errors import UsageError
from gcfunc.recipes.images import Transform, Views, decode
from gcfunc.recipes.readers.index import Index, Labels, Split

Batch = tuple[Tensor, Tensor]
_Key = tuple[int, int]
"""An epoch and an image's number. The epoch goes along, so that workers outlive it."""


def order(seed: int, epoch: int, images: int) -> Labels:
    """The numbers of all images, as an epoch goes through them."""
    return np.random.default_rng([seed, epoch]).permutation(images)


@dataclass
class _Keys(data.Sampler[list[_Key]]):
    """What this process loads, batch by batch, of the epoch that is set."""

    images: int
    batch_size: int
    seed: int
    shuffled: bool
    drop_last: bool
    group: Group
    epoch: int = 0
    first: int = 0

    @property
    def batches(self) -> int:
        """How many an epoch has."""
        whole, rest = divmod(self.images, self.batch_size)
        return whole if self.drop_last else whole + bool(rest)

    def __iter__(self) -> Iterator[list[_Key]]:
        # A snapshot, as the next epoch can be set before this one has been gone through.
        epoch, size = self.epoch, self.batch_size
        numbers = order(self.seed, epoch, self.images) if self.shuffled else np.arange(self.images)
        for k in range(self.first, self.batches):
            batch = torch.from_numpy(numbers[k * size : (k + 1) * size])
            yield [(epoch, i) for i in self.group.share(batch).tolist()]

    def __len__(self) -> int:
        return self.batches - self.first


@dataclass(frozen=True)
class _Images(data.Dataset[Batch]):
    """A split, loaded a batch at a time."""

    split: Split
    transform: Transform
    size: int
    seed: int

    def __getitems__(self, keys: list[_Key]) -> Batch | UsageError:
        # An error comes back as a value, since a DataLoader makes text of those in its workers.
        try:
            # A process has no share of a batch of fewer images than there are processes.
            images = torch.empty(len(keys), 3, self.size, self.size)
            for row, key in zip(images, keys, strict=True):
                row.copy_(self._image(*key))
        except UsageError as error:
            return error
        return images, torch.from_numpy(self.split.labels[[i for _, i in keys]])

    def _image(self, epoch: int, i: int) -> Tensor:
        (seed,) = np.random.SeedSequence([self.seed, epoch, i]).generate_state(1, np.uint64)
        # The generator of the CPU alone is set, and set back: training may draw from it.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            return self.transform(decode(self.split.images, i))


def _as_it_is(batch: Any) -> Any:
    return batch


class Loader:
    """Gives the batches of any epoch; see :func:`loader`.

    Attributes:
        batches: How many an epoch has.
    """

    def __init__(self, images: _Images, keys: _Keys, workers: int, *, pin_memory: bool) -> None:
        self._keys = keys
        self.batches = keys.batches
        self._loader = data.DataLoader(
            images,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_as_it_is,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # From torch's own it would draw a number for each epoch, and a run that is resumed
            # would draw other ones after it.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """This process's share of the batches of an epoch, from batch ``first`` on.

        Those before are not loaded. With workers it ends the epoch that was begun before.

        Raises:
            UsageError: a file is no whole image.
        """
        self._keys.epoch, self._keys.first = epoch, first
        for batch in self._loader:
            if isinstance(batch, UsageError):
                raise batch
            yield batch


def loader(
    index: Index,
    split: Literal["train", "test"],
    views: Views,
    batch_size: int,
    *,
    workers: int = 0,
    seed: int = 0,
    drop_last: bool = False,
    group: Group | None = None,
    pin_memory: bool = False,
) -> Loader:
    """Loads a split: that to train on in a new order each epoch, that to test on as it is listed.

    Args:
        index: The dataset.
        split: Which half of it.
        views: What becomes of its images.
        batch_size: How many images a batch has over all processes together.
        workers: Processes that load ahead, each two batches. With none a batch is loaded when it is
            asked for, and no other is in memory.
        seed: Of the order and of what the transforms draw.
        drop_last: Whether to leave out a last batch that is smaller.
        group: The processes that share each batch.
        pin_memory: Whether batches are put where a GPU can fetch them from while it computes.

    Raises:
        UsageError: there is not one whole batch, and ``drop_last`` leaves out the others.
    """
    training = split == "train"
    part = index.train if training else index.test
    images = _Images(part, views.train if training else views.test, views.size, seed)
    keys = _Keys(len(part), batch_size, seed, training, drop_last, group or Group())
    if not keys.batches:
        raise UsageError(
            f"{index.name}: a batch of {batch_size:,} is more than the {len(part):,} {split} images"
        )
    return Loader(images, keys, workers, pin_memory=pin_memory)
