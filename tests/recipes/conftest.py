"""What the tests of the command run under."""

import signal
import socket
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from gcfunc.recipes.train import Run, Trainer
from tests.recipes.command import AfterStep


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell that starts the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> AfterStep:
    """Have something happen after the nth training step from now."""

    def arrange(n: int, happen: Callable[[], None]) -> None:
        advance, count = Trainer.advance, iter(range(1, n + 1))

        def counted(self: Trainer, run: Run) -> None:
            advance(self, run)
            if next(count, None) == n:
                happen()

        monkeypatch.setattr(Trainer, "advance", counted)

    return arrange


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As torchrun starts a process that is on its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    address = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in address.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():  # a test that failed
        dist.destroy_process_group()
