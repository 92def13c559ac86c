"""Count what a compiled step launches and moves on a GPU, without one.

    python -m benchmarks.cuda_code --model resnet50 --algorithm adamw --packed

Inductor generates code for an H100 that is not there, and the row kernel says what it would launch;
all of it is compiled to machine code, and none of it runs. These are printed, or written by --json:

- launches: in a step, scalars and counter included. scalar_launches: those of them that are neither
  in a graph nor of the row kernel.
- passes: bytes that are read and written, as a multiple of those of all parameters. least_passes:
  to read params, gradients and slots once, and to write params and slots once.
- temporaries: buffers in device memory that are not results.
- seconds: from the call of the first step until the machine's code was there.
- registers, spilled: the most of any kernel, in registers and bytes of a thread.
- torch_fused_launches: of torch's fused optimizer, by the rules of its source.
- estimate_us, torch_fused_estimate_us: bytes over an H100's bandwidth, and 2 us for each launch. An
  estimate and no measurement.
"""

from __future__ import annotations

import argparse
import json
from math import prod

import torch

from benchmarks.cuda.fake import why_not
from benchmarks.cuda.roofline import estimate, fused_launches
from benchmarks.cuda.steps import Step, machine_code, optimizer_step
from benchmarks.harness.shapes import MODELS
from benchmarks.peers.algorithms import OURS
from gcfunc import GC

LOOKAHEAD = "lookahead"
"""Lookahead around SGD, which is no algorithm by itself."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def counted(
    model: str,
    algorithm: str,
    *,
    packed: bool = False,
    pure: bool = False,
    gc: GC | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, int | float]:
    """What a step of a model of :mod:`benchmarks.harness.shapes` is made of."""
    opt = OURS[algorithm](gc)
    shapes = MODELS[model]()
    step = optimizer_step(opt, shapes, packed=packed, donate=not pure, dtype=dtype)
    slots = sum(len(own.slots) for own in opt.algorithms.values())
    return figures(step, slots) | _fused(step, [prod(s) for s in shapes.values()], slots)


def figures(step: Step, slots: int) -> dict[str, int | float]:
    """The figures of a step of any kind."""
    compiled = machine_code(step.graphs, step.rows)
    return {
        "launches": step.launches,
        "scalar_launches": len(step.scalars),
        "passes": round(step.passes, 3),
        "least_passes": 3 + 2 * slots,
        "temporaries": step.temporaries,
        "seconds": round(step.seconds, 1),
        "registers": max(kernel.registers for kernel in compiled),
        "spilled": max(kernel.spilled for kernel in compiled),
        "estimate_us": round(1e6 * estimate(step.moved, step.launches), 1),
    }


def _fused(step: Step, numels: list[int], slots: int) -> dict[str, int | float]:
    """Of torch's fused optimizer, which reads and writes the same without GC."""
    launches = fused_launches(numels, 2 + slots)
    if slots > 1:
        launches += fused_launches([1] * len(numels), 1)  # counters, a tensor for each parameter
    nbytes = (3 + 2 * slots) * step.numel * step.itemsize
    return {
        "torch_fused_launches": launches,
        "torch_fused_estimate_us": round(1e6 * estimate(nbytes, launches), 1),
    }


def main() -> None:
    """Print the counts of one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--algorithm", choices=OURS, default="adamw")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--pure", action="store_true", help="donate=False")
    parser.add_argument("--no-gc", action="store_true")
    parser.add_argument("--at", choices=("gradient", "update"), default="gradient")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if reason := why_not():
        parser.exit(1, f"nothing can be counted here: {reason}\n")
    found = counted(
        args.model,
        args.algorithm,
        packed=args.packed,
        pure=args.pure,
        gc=None if args.no_gc else GC(at=args.at),
        dtype=DTYPES[args.dtype],
    )
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<24} {value}")


if __name__ == "__main__":
    main()
