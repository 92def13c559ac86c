"""Processes that train one network together, and what becomes of them when one is lost."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gcfunc.recipes.errors import UsageError, complain

T = TypeVar("T")

TIMEOUT = timedelta(seconds=60)
"""How long the others wait for a process that gives no sign of life."""


@dataclass(frozen=True)
class Group:
    """The processes, seen from one of them; by default it is the only one.

    What is called here, every process must call.

    Attributes:
        rank: The number of this process. The first, 0, reads, writes and prints for all.
        size: How many they are.
        launched: Whether a launcher such as torchrun started them.
    """

    rank: int = 0
    size: int = 1
    launched: bool = False

    def share(self, rows: Tensor) -> Tensor:
        """What this process gets of the rows, none perhaps where they are few."""
        return rows[self.rank :: self.size]

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over the processes."""
        if not self.launched:
            return [*values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, received: signal.Signals | None) -> signal.Signals | None:
        """A signal that any of the processes received.

        Each may learn of it at another step, and must not leave the others waiting in theirs.
        """
        if not self.launched:
            return received
        number = torch.tensor(received or 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)) if number else None

    def first(self, do: Callable[[], T]) -> T:
        """What ``do`` returns in the first process, where alone it is called.

        Raises:
            UsageError, OSError: ``do`` raised it; then every process does.
        """
        if not self.launched:
            return do()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = do()
            except (UsageError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    @contextmanager
    def watched(self, advice: Callable[[], str]) -> Iterator[None]:
        """While entered, the loss of another process ends this one too, with ``advice``."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            complain(
                f"process {self.rank} of {self.size} stops, as another one died or gave no sign "
                f"of life for {TIMEOUT.seconds} s; {advice()}"
            )
            sys.stdout.flush()
            # Gloo's threads may go on waiting for what never comes, and keep this one from exiting.
            os._exit(1)


@contextmanager
def join() -> Iterator[Group]:
    """While entered, this process is one of those that a launcher such as torchrun started.

    Without a launcher it is on its own.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield Group()
        return
    group = Group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), launched=True)
    with group.watched(lambda: "training had not begun"):
        dist.init_process_group("gloo", timeout=TIMEOUT)
        yield group
        # FSDP2's groups are cyclic. Left to the end of the interpreter, while gloo's threads still
        # run, they now and then abort it, see https://github.com/pytorch/pytorch/pull/179291.
        gc.collect()
        # Not after an exception: as soon as connections close the launcher ends all processes,
        # and this one has yet to say what happened.
        dist.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    # Gloo has no exception of its own; its messages begin with the file in gloo that they are from.
    return isinstance(error, dist.DistError) or "gloo" in str(error)
