"""Processes that run a function together, over gloo on the loopback interface.

They live as long as a test module, since each takes seconds to start. One that dies, raises or
takes too long ends them all, and the next call starts others.
"""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

TIMEOUT = 120.0


class Processes:
    """``size`` processes in one process group."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size = size
        self._timeout = timeout
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` in every process, and what each returned, in the order of ranks."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        pipes = [pipe for _, pipe in self._workers]
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self._timeout
        try:
            while len(results) < self.size:
                missing = [rank for rank in range(self.size) if rank not in results]
                left = max(0.0, deadline - time.monotonic())
                ready = wait([pipes[rank] for rank in missing], left)
                if not ready:
                    raise TimeoutError(f"{function.__name__}: ranks {missing} did not answer")
                for rank in (rank for rank in missing if pipes[rank] in ready):
                    try:
                        error, results[rank] = pipes[rank].recv()
                    except EOFError:
                        raise RuntimeError(f"rank {rank} died in {function.__name__}") from None
                    if error is not None:
                        raise AssertionError(f"rank {rank} in {function.__name__}:\n{error}")
        except BaseException:
            self.stop()
            raise
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def stop(self) -> None:
        """Kill the processes, and wait until they are gone."""
        for process, pipe in self._workers:
            process.kill()
            pipe.close()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    # The loopback interface: lo on Linux, lo0 on macOS.
    interfaces = [name for _, name in socket.if_nameindex()]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if "lo" in interfaces else "lo0"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the test process is gone, or done
            os._exit(0)
        try:
            torch.manual_seed(0)
            pipe.send((None, function(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
