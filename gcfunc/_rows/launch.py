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


class _Table(NamedTuple):
    addresses: Tensor
    runs: list[_Run]

    def tensors(self) -> Iterator[Tensor]:
        """All that kernels read of it on the device."""
        yield self.addresses
        for run in self.runs:
            yield from (run.programs, run.shapes)


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
        self._streams = _Streams()
        self._spare: Tensor | None = None

    def prepared(self, columns: Addresses, scalars: Sequence[Tensor]) -> Callable[[], None]:
        """What runs the program, whose kernels have started once; ``scalars`` are 0-d tensors.

        Raises:
            LaunchError: a kernel does not start.
            RuntimeError: a CUDA graph is captured, and there has been no step like this before.
        """
        with on_device(self.device):
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return partial(self._launch, self._captured(columns, scalars), scalars)
            scalars = near(scalars, self.device)
            table = self._tables.get(columns)
            is_new = table is None
            if table is None:
                table = self._tables[columns] = self._table(columns, scalars)
                if len(self._tables) > MOST_TABLES:
                    self._tables.popitem(last=False)
            if self.device.type == "cuda":
                if self._spare is None:
                    self._spare = torch.empty(table.addresses.shape, dtype=torch.int64).pin_memory()
                self._streams.meet(table, is_new=is_new)
        return partial(self._launch, table, scalars)

    def _launch(self, table: _Table, scalars: Sequence[Tensor]) -> None:
        with on_device(self.device):
            for kernel, grid, programs, shapes, constants in table.runs:
                kernel[grid](programs, shapes, table.addresses, *scalars, **constants)

    def _table(self, columns: Addresses, scalars: Sequence[Tensor]) -> _Table:
        """The table on the device, and what to run with it."""
        addresses, aligned = _on(self.device, _rows_of(columns)), _aligned(columns)
        if aligned not in self._runs:
            sizes = _on(self.device, shapes([*self.problems, _NOTHING]))
            own = launches(self.problems, aligned, self.dtype.itemsize)
            self._runs[aligned] = [self._started(one, sizes, addresses, scalars) for one in own]
        return _Table(addresses, self._runs[aligned])

    def _started(
        self, launch: Launch, sizes: Tensor, addresses: Tensor, scalars: Sequence[Tensor]
    ) -> _Run:
        """A launch whose kernel was compiled, loaded and started, on nothing."""
        whole, long = kernels_of(self.source)
        kernel = long if launch.shape.long else whole
        constants = compiled_in(launch.shape, self.dtype)
        nothing = torch.tensor([[len(self.problems), 0]], dtype=torch.int32)
        try:
            kernel[(1,)](_on(self.device, nothing), sizes, addresses, *scalars, **constants)
        except Exception as error:
            # Triton needs a compiler for C, too.
            raise LaunchError(f"the kernel {kernel.__name__} does not start: {error}") from error
        programs = _on(self.device, launch.programs)
        return _Run(kernel, (len(programs),), programs, sizes, constants)

    def _captured(self, columns: Addresses, scalars: Sequence[Tensor]) -> _Table:
        """A table that a CUDA graph reads whenever it is replayed, and that is kept for ever."""
        aligned, host = _aligned(columns), self._spare
        if aligned not in self._runs or host is None:
            raise RuntimeError(
                "take a step before a CUDA graph is captured, and one between two captures: "
                "meanwhile no kernel can be loaded and no memory be pinned"
            )
        if any(scalar.device != self.device for scalar in scalars):
            raise RuntimeError("a CUDA graph needs the state's scalars on the parameters' device")
        self._spare = None
        found = _Table(
            host.copy_(_rows_of(columns)).to(self.device, non_blocking=True), self._runs[aligned]
        )
        _CAPTURED.append((host, found))
        return found


_CAPTURED: list[Any] = []


class _Streams:
    """Streams that use tables which another one may have made."""

    def __init__(self) -> None:
        self._last: tuple[Any, Any] | None = None
        self._several = False

    def meet(self, table: _Table, *, is_new: bool) -> None:
        """Have the current stream wait for the tables, if it did not make them all.

        The device waits, the host does not.
        """
        stream = torch.cuda.current_stream(table.addresses.device)
        if self._last is not None and (self._several or self._last[0] != stream):
            self._several = True
            stream.wait_event(self._last[1])
            for t in table.tensors():
                t.record_stream(stream)
        if is_new:
            self._last = stream, stream.record_event()


def _aligned(columns: Addresses) -> tuple[bool, ...]:
    """Whose addresses are all multiples of 16 bytes."""
    return tuple(all(a % BYTES == 0 for a in own) for own in zip(*columns, strict=True))


def _rows_of(columns: Addresses) -> Tensor:
    """A row of addresses for each problem, and one for :data:`_NOTHING`."""
    addresses = torch.tensor(columns, dtype=torch.int64).T
    return torch.cat([addresses, addresses.new_zeros(1, len(columns))])


_NOTHING = Problem(0, 16)
"""What each kernel is started with before it writes anything."""


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
    """0-d tensors on a device: in one copy, for which nobody waits, if they are on one together."""
    if all(scalar.device == device for scalar in scalars):
        return scalars
    if len({scalar.device for scalar in scalars}) > 1:
        return [near([scalar], device)[0] for scalar in scalars]
    wide = [s.to(torch.float64 if s.is_floating_point() else torch.int64) for s in scalars]
    moved = _on(device, torch.stack([scalar.view(torch.int64) for scalar in wide]))
    return [m.view(scalar.dtype) for m, scalar in zip(moved, wide, strict=True)]


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
