"""What ptxas says of a generated kernel for sm_90: registers, spills, and how wide it loads."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cuda.kernels import imported, parsed


@dataclass(frozen=True)
class Compiled:
    """A kernel in the machine's code.

    Attributes:
        registers: Of a thread.
        spilled: Bytes that a thread stores to memory for want of registers.
        loads: Load instructions of global memory.
        vector_loads: Those of them that load 128 bits.
        blocks: How much one program does, as it was compiled.
        warps: Of one program.
    """

    registers: int
    spilled: int
    loads: int
    vector_loads: int
    blocks: dict[str, int]
    warps: int


def compiled(source: str) -> Compiled:
    """A kernel compiled for an H100, in the first of the forms that the autotuner would try.

    This needs :func:`~benchmarks.cuda.fake.fake_cuda`, as Inductor makes these forms for the device
    at hand.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = parsed(source)
    with tempfile.TemporaryDirectory() as folder:
        tuned: Any = getattr(imported(kernel.source, Path(folder)), kernel.name)
        config = tuned.configs[0]
        constants = {**tuned.triton_meta["constants"], **config.kwargs}
        constants = {n: constants[n] for n in kernel.parameters if n in constants}
        signature = {n: kernel.signature.get(n, "constexpr") for n in kernel.parameters}
        binary: Any = triton.compile(
            ASTSource(
                tuned.fn,
                signature | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                attrs=tuned.triton_meta["configs"][0],
            ),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
    return assembled(binary.asm["ptx"], dict(config.kwargs), config.num_warps)


def assembled(ptx: str, blocks: dict[str, int], warps: int) -> Compiled:
    """What ptxas tells of Triton's code. Triton itself asks only for the binary."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        said = subprocess.run(
            [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", path, "-o", path.with_suffix(".cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    loads = re.findall(r"ld\.global\S*", ptx)
    wide = [load for load in loads if re.search(r"\.v4\.[bfus]32|\.v2\.[bfus]64", load)]
    return Compiled(int(registers), int(spilled), len(loads), len(wide), blocks, warps)
