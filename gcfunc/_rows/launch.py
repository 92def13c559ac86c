"""Launches of a program, with the addresses of the tensors in a table on the device.

Handing hundreds of tensors to each launch would cost more than the launch. So kernels get one
table of addresses, which is made anew only when a tensor has moved; gradients mostly come back to
where the last ones were.
"""

from __future__ import annotations

import contextlib
import linecache
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcfunc._rows.layout import BYTES, Launch, Problem, Shape, launches, shapes

Addresses = tuple[tuple[int, ...], ...]
"""Of each problem's tensors, in columns: those read, then those written."""
MOST_TABLES = 16


class LaunchError(RuntimeError):
    """Triton cannot compile or start a kernel here; nothing was written."""


class _Run(NamedTuple):
    kernel: Any
    grid: tuple[int]
    programs: Tensor
    shapes: Tensor
    constants: dict[str, int]


class Launcher:
    """A program for problems of given sizes on one device."""

    def __init__(
        self,
        source: str,
        problems: Sequence[Problem],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.source, self.problems = source, problems
        self.dtype, self.device = dtype, device
        self._runs: dict[tuple[bool, ...], list[_Run]] = {}
        self._tables: OrderedDict[Addresses, _Table] = OrderedDict()
        self._spare: Tensor | None = None
        self._has_run = False
        self._uploaded: tuple[Any, Any] | None = None

    def prepared(self, columns: Addresses, scalars: Sequence[Tensor]) -> Callable[[], None]:
        """What runs the program, all of it compiled; ``scalars`` are 0-d tensors anywhere."""
        scalars = near(scalars, self.device)
        with on_device(self.device):
            capturing = _capturing(self.device)
            table = None if capturing else self._tables.get(columns)
            if table is None:
                table = self._table(columns, scalars)
                self._note_upload(capturing)
            elif self._uploaded is not None:
                self._wait_for_upload(table)
        return partial(self._launch, *table, scalars)

    def _note_upload(self, capturing: bool) -> None:
        if self.device.type == "cuda" and not capturing:
            stream = torch.cuda.current_stream(self.device)
            if self._uploaded is not None and self._uploaded[0] != stream:
                stream.wait_event(self._uploaded[1])
            self._uploaded = stream, stream.record_event()

    def _wait_for_upload(self, table: _Table) -> None:
        """Another stream than the one that made the tables has to be told, the device alone waits.

        While a CUDA graph is captured nobody waits: what comes before has ended by then.
        """
        uploaded, stream = self._uploaded, torch.cuda.current_stream(self.device)
        if uploaded is not None and uploaded[0] != stream:
            stream.wait_event(uploaded[1])
            addresses, runs = table
            for t in (addresses, *(t for run in runs for t in (run.programs, run.shapes))):
                t.record_stream(stream)

    def _launch(self, addresses: Tensor, runs: Sequence[_Run], scalars: Sequence[Tensor]) -> None:
        with on_device(self.device):
            for kernel, grid, programs, shapes, constants in runs:
                with contextlib.nullcontext() if self._has_run else _first(kernel):
                    kernel[grid](programs, shapes, addresses, *scalars, **constants)
                self._has_run = True

    def launches(self, aligned: bool = True) -> list[Launch]:
        """What is launched where addresses are multiples of 16 bytes, or none is."""
        each = [aligned] * len(self.problems)
        return launches(self.problems, each, self.dtype.itemsize)

    def _table(self, columns: Addresses, scalars: Sequence[Tensor]) -> _Table:
        """The table on the device, and what to run with it."""
        aligned = tuple(all(a % BYTES == 0 for a in own) for own in zip(*columns, strict=True))
        host = torch.tensor(columns, dtype=torch.int64).T.contiguous()
        if _capturing(self.device):
            # A CUDA graph reads all this whenever it is replayed, so that none of it may ever be
            # given back; and memory cannot be pinned meanwhile.
            pinned = host.pin_memory() if self._spare is None else self._spare.copy_(host)
            self._spare = None
            addresses = pinned.to(self.device, non_blocking=True)
        else:
            if self._spare is None and self.device.type == "cuda":
                self._spare = torch.empty_like(host).pin_memory()
            addresses = _on(self.device, host)
        if aligned not in self._runs:
            sizes = _on(self.device, shapes(self.problems))
            own = launches(self.problems, aligned, self.dtype.itemsize)
            self._runs[aligned] = [self._run(launch, sizes, addresses, scalars) for launch in own]
        found = addresses, self._runs[aligned]
        if _capturing(self.device):
            _CAPTURED.append((pinned, *found))
            return found
        self._tables[columns] = found
        if len(self._tables) > MOST_TABLES:
            self._tables.popitem(last=False)
        return found

    def _run(
        self, launch: Launch, sizes: Tensor, addresses: Tensor, scalars: Sequence[Tensor]
    ) -> _Run:
        whole, long = kernels_of(self.source)
        shape = launch.shape
        kernel, grid = long if shape.long else whole, (len(launch.programs),)
        constants = compiled_in(shape, self.dtype)
        programs = _on(self.device, launch.programs)
        if self.device.type != "cpu":
            # Compiled now: nothing is written if that fails.
            with _first(kernel):
                kernel.warmup(programs, sizes, addresses, *scalars, grid=grid, **constants)
        return _Run(kernel, grid, programs, sizes, constants)


_Table = tuple[Tensor, list[_Run]]
_CAPTURED: list[Any] = []


@contextlib.contextmanager
def _first(kernel: Any) -> Iterator[None]:
    """What goes wrong here is Triton's: it needs a compiler for C too, at its first launch."""
    try:
        yield
    except Exception as error:
        raise LaunchError(f"the kernel {kernel.__name__} does not start: {error}") from error


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def compiled_in(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """What is compiled into a launch of that shape, and in how many warps it runs."""
    return {
        "VECTOR": shape.vector,
        "ALIGNED": BYTES if shape.vector > 1 else dtype.itemsize,
        "ROWS": shape.rows,
        "BLOCK": shape.block,
        "num_warps": shape.warps,
    }


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def near(scalars: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """0-d tensors of 8 bytes on a device: in one copy, for which nobody waits."""
    if all(scalar.device == device for scalar in scalars):
        return scalars
    moved = _on(device, torch.stack([scalar.view(torch.int64) for scalar in scalars]))
    return [m.view(scalar.dtype) for m, scalar in zip(moved, scalars, strict=True)]


def _on(device: torch.device, host: Tensor) -> Tensor:
    """A table on the device, without waiting for it."""
    if host.device.type == "cpu" and device.type != "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@lru_cache(maxsize=256)
def kernels_of(source: str) -> tuple[Any, Any]:
    """The kernels of a program."""
    # Triton reads the text of a function, which Python finds for a file of any name here.
    name = f"<gcfunc rows {zlib.crc32(source.encode()):08x}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    scope: dict[str, Any] = {"__name__": "gcfunc._rows.generated"}
    exec(compile(source, name, "exec"), scope)
    return scope["whole_rows"], scope["long_rows"]
