"""A CUDA device that is not there, as far as Inductor asks about it."""

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

KNOWN = ((2, 11), (2, 14))
"""The first and the last version of torch whose private names stand below."""

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    is_integrated=0,
    gcnArchName="",  # of AMD's, and asked for all the same
)
"""What CUDA says of an H100, under the names of ``torch.cuda.get_device_properties``."""


def why_not() -> str | None:
    """Why there can be no fake device here, if so."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not KNOWN[0] <= version <= KNOWN[1]:
        first, last = (".".join(map(str, known)) for known in KNOWN)
        return f"torch is {torch.__version__}, and the private names are of {first} to {last}"
    if torch.cuda.is_available():
        return "there is a CUDA device"
    if find_spec("triton") is None:
        return "triton is missing"
    if not _C10.exists():
        return f"{_C10.name} is missing: device guards are known on Linux alone"
    return None


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inductor generates code for an H100, from FakeTensors on ``"cuda"``.

    Nothing can run. Afterwards torch is as it was, and its compiler reset; FakeTensors on the
    device must not be used any more. While it is there all threads see it, and what modules of
    torch ask when they are imported they ask once, so a process of its own is the place for it.
    """
    if reason := why_not():
        raise RuntimeError(f"no fake CUDA device: {reason}")
    with ExitStack() as stack:
        stack.enter_context(_lent_guard())
        stack.enter_context(_constants_on_cpu())
        for patch in _answers():
            stack.enter_context(patch)
        # It would time products of matrices on the device, padded and not.
        stack.enter_context(torch._inductor.config.patch(shape_padding=False))
        with _nothing_remembered():
            yield


def _answers() -> list[Any]:
    """Patches of all that is asked while tensors are traced and code is generated."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.async_compile import AsyncCompile
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    def always(value: object) -> Any:
        return staticmethod(lambda *args, **kwargs: value)

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    answers: list[tuple[Any, dict[str, Any]]] = [
        (
            torch.cuda,
            {
                "is_available": always(True),
                # FakeTensors of torch 2.11 start the device otherwise.
                "is_initialized": always(True),
                "current_device": always(0),
                "get_device_properties": always(H100),
                # Dynamo keeps the state of random numbers, of the device too.
                "get_rng_state": always(torch.zeros(16, dtype=torch.uint8)),
                "set_rng_state": always(None),
                "is_current_stream_capturing": always(False),
                "_exchange_device": always(0),
                "_maybe_exchange_device": always(0),
            },
        ),
        # These have torch.cuda's functions as they were when they were imported.
        (CudaInterface, {"current_device": always(0), "get_device_properties": always(H100)}),
        (
            CudaInterface.Worker,
            {"current_device": always(0), "get_device_properties": always(H100)},
        ),
        # Dynamo would ask it for the streams of the device.
        (torch.accelerator, {"is_available": always(False)}),
        # It compiles kernels while the rest is being generated, once its workers have started.
        (AsyncCompile, {"triton": always(None)}),
        # Of Triton's driver only the target is asked.
        (type(driver), {"active": target}),
    ]
    return [
        mock.patch.object(owner, name, value)
        for owner, values in answers
        for name, value in values.items()
    ]


@contextmanager
def _nothing_remembered() -> Iterator[None]:
    """Answers about the device are cached neither from before nor for afterwards."""
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    def forget() -> None:
        torch.compiler.reset()
        for cached in (DeviceProperties.create, _triton.has_triton):
            cached.cache_clear()

    forget()
    try:
        yield
    finally:
        forget()


_C10 = Path(torch.__file__).parent / "lib" / "libc10.so"
_CUDA, _META = 1, 14  # c10::DeviceType


@contextmanager
def _lent_guard() -> Iterator[None]:
    """CUDA has the device guard of the meta device.

    A guard chooses the device before each operation, of FakeTensors too. CUDA's own looks for the
    driver, and a CPU build has none at all; that of the meta device does nothing.
    """
    name = "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * (_META + 1)).in_dll(ctypes.CDLL(str(_C10)), name)
    if not registry[_META]:
        raise RuntimeError("no fake CUDA device: the meta device has no guard to lend")
    own = registry[_CUDA]
    registry[_CUDA] = registry[_META]
    try:
        yield
    finally:
        registry[_CUDA] = own


@contextmanager
def _constants_on_cpu() -> Iterator[None]:
    """Inductor folds constants by making them, of one element each: they are made on the CPU."""

    def empty(size: list[int], *, dtype: torch.dtype | None = None, **_: object) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def strided(
        size: list[int], stride: list[int], *, dtype: torch.dtype | None = None, **_: object
    ) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        # CUDA's own, which come back afterwards.
        warnings.filterwarnings("ignore", "(?s).*previously registered kernel", UserWarning)
        library.impl("empty.memory_format", empty, "CUDA")
        library.impl("empty_strided", strided, "CUDA")
        yield
