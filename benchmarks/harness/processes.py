"""Figures that need a process of their own, or several."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


class UnfinishedError(Exception):
    """A process that was stopped after its time, or failed, or was killed.

    Attributes:
        printed: What it had printed before, parsed.
        late: Whether it was stopped after its time.
    """

    def __init__(self, why: str, printed: list[Any], *, late: bool = False) -> None:
        super().__init__(why)
        self.printed = printed
        self.late = late


def run(module: str, *args: str, limit: float | None = None, cache: str | None = None) -> list[Any]:
    """The JSON objects that ``python -m module`` prints, one a line.

    Args:
        module: Run with ``args``.
        args: Its arguments.
        limit: Seconds after which it and all that it started are stopped.
        cache: Inductor's cache, instead of this process's own.

    Raises:
        UnfinishedError: If it was stopped, failed, or was killed.
    """
    environment = {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": cache}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *args],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = False
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    whole = [line for line in output.splitlines(keepends=True) if line.endswith("\n")]
    printed = [json.loads(line) for line in whole if line.startswith("{")]
    if late:
        raise UnfinishedError(f"took more than {limit:g} s", printed, late=True)
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise UnfinishedError(f"was killed by {name}", printed)
    if process.returncode:
        raise UnfinishedError(f"failed with {process.returncode}", printed)
    return printed


def together(size: int, limit: float, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns, as JSON has it, in each of the processes that talk to each other.

    Each has one thread. They are gone when this returns, or raises.

    Args:
        size: How many.
        limit: Seconds for all that they do.
        function: Importable.
        args: For it.

    Raises:
        TimeoutError: If they took longer.
        ProcessRaisedException: If one raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = (size, limit, folder, function, args)
        context: Any = spawn(_member, own, nprocs=size, join=False)  # type: ignore[no-untyped-call]
        deadline = time.monotonic() + limit
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{args}: {size} processes took more than {limit:g} s")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(size)]


def _member(
    rank: int,
    size: int,
    limit: float,
    folder: str,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    # The loopback interface: lo on Linux, lo0 on macOS.
    interfaces = [name for _, name in socket.if_nameindex()]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if "lo" in interfaces else "lo0"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=limit),
    )
    (Path(folder) / str(rank)).write_text(json.dumps(function(*args)))
    dist.destroy_process_group()
