"""Run what Inductor generated for CUDA, on the CPU, in Triton's interpreter.

It finds wrong values. It does not see races, misaligned or wild accesses, or speed.
"""

import ast
import os
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cuda import fake
from benchmarks.cuda.generated import Generated
from benchmarks.cuda.kernels import BLOCK, imported, parsed

SWITCH = "TRITON_INTERPRET"
"""Set to 1 before Triton is imported, as its own functions are made for one or the other."""


def why_not() -> str | None:
    """Why nothing can be interpreted here, if so."""
    if reason := fake.why_not():
        return reason
    if find_spec("numpy") is None:
        return "numpy is missing, in which Triton interprets"
    old, new = version("triton"), version("numpy")
    if _minor(old) < (3, 7) and _minor(new) >= (2, 4):
        return f"the loops of triton {old} do not run on numpy {new}"
    return None


def _minor(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in number.split(".")[:2])


def run(generated: Generated, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The graph's results on CPU tensors; those that it writes in place are written.

    Operators of ``torch.ops`` run for real. Memory that is allocated is full of NaN.

    Args:
        generated: What was generated, sources edited or not.
        pairs: Each FakeTensor that the function was called with, and the tensor on the CPU that
            stands for it.
    """
    if reason := why_not():
        raise RuntimeError(f"no interpreter: {reason}")
    if os.environ.get(SWITCH) != "1":
        raise RuntimeError(f"set {SWITCH}=1 before triton is imported")
    by_fake = {id(its_fake): real for its_fake, real in pairs}
    missing = [tensor for tensor in generated.inputs if id(tensor) not in by_fake]
    if missing:
        raise ValueError(f"no tensors stand for {missing}, which the graph is called with")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        call = _wrapper(generated, Path(folder))["call"]
        results: list[Tensor] = [*call([by_fake[id(tensor)] for tensor in generated.inputs])]
        return results


def _wrapper(generated: Generated, folder: Path) -> dict[str, Any]:
    """The names of the wrapper's module, with kernels that are interpreted."""
    from torch._inductor.async_compile import AsyncCompile

    tree = ast.parse(generated.source)
    # The stream's number comes from there, of which a CPU build knows nothing.
    tree.body = [
        n for n in tree.body if not isinstance(n, ast.ImportFrom) or n.module != "torch._C"
    ]
    names: dict[str, Any] = {"__name__": "wrapper"}
    nothing = mock.patch.multiple(AsyncCompile, triton=mock.DEFAULT, wait=mock.DEFAULT)
    with nothing:  # each kernel would be compiled
        exec(compile(tree, "wrapper", "exec"), names)
    names["torch"] = _TorchOfCpu()
    names["empty_strided_cuda"] = _full_of_nan
    names["get_raw_stream"] = lambda index: 0
    for name, source in generated.kernels.items():
        names[name] = _Interpreted(source, folder)
    return names


class _TorchOfCpu:
    """``torch`` for a wrapper, which must not choose a CUDA device."""

    cuda = SimpleNamespace(_DeviceGuard=lambda index: nullcontext(), set_device=lambda index: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _full_of_nan(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Inductor's ``empty_strided``, so that what is read before it was written is seen."""
    made = torch.empty_strided(size, stride, dtype=dtype)
    return made.fill_(float("nan")) if dtype.is_floating_point else made


class _Interpreted:
    """A kernel that is launched as Inductor's wrapper does it."""

    def __init__(self, source: str, folder: Path) -> None:
        self._kernel = parsed(source)
        self._function = getattr(imported(self._kernel.plain, folder), self._kernel.name)

    def run(self, *args: Any, stream: object) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        names = self._kernel.parameters
        reduces = any(name.upper().startswith("R0_") for name in names)
        sizes = {"XBLOCK": 8 if reduces else 1024, "R0_BLOCK": 512}
        blocks = {name: sizes.get(name, 8) for name in names if BLOCK.match(name)}
        given = dict(zip([name for name in names if name not in blocks], args, strict=True))
        numbers = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        grid = GridExpr.from_meta(self._kernel.meta, blocks)  # type: ignore[arg-type]
        self._function[grid.eval_slow(numbers | blocks)](**given, **blocks)
