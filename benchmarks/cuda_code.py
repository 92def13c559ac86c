"""Count what a compiled step launches and moves on a GPU, without one.

    python -m benchmarks.cuda_code --model resnet50 --algorithm adamw --packed
    python -m benchmarks.cuda_code --update                      # a part of make counts

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

With --eager, of the functional step that is not compiled, the launches and passes alone, and
centralizing: those launches of which each centralizes one gradient, by one read and one write, as
hooks do too.

--update counts all steps that make test expects the counts of, and records them, and the table in
docs/cuda.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.fake import why_not
from benchmarks.cuda.roofline import estimate, fused_launches
from benchmarks.cuda.steps import Step, eager_step, machine_code, optimizer_step
from benchmarks.harness.shapes import MODELS
from benchmarks.peers.algorithms import COMPARED, OURS
from gcfunc import GC

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EXPECTED = Path(__file__).parent / "expected" / "cuda.json"
"""The same for every version of torch."""
PAGE = Path(__file__).parents[1] / "docs" / "cuda.md"
BEGIN, END = "<!-- counts -->\n", "<!-- /counts -->\n"
COUNTED = ("launches", "scalar_launches", "passes", "temporaries", "torch_fused_launches")
"""What is expected there."""

_OTHERWISE: dict[str, dict[str, Any]] = {
    "update": {"gc": GC(at="update")},
    "plain": {"gc": None},
    "gcc": {"gc": GC(where="gcc")},
    "gcc-packed": {"gc": GC(where="gcc"), "packed": True},
    "bfloat16": {"gc": GC(), "dtype": torch.bfloat16},
}
CASES: dict[str, dict[str, Any]] = {
    f"{model}-{algorithm}{'-packed' * packed}": {
        "model": model,
        "algorithm": algorithm,
        "packed": packed,
        "gc": GC(),
    }
    for model, algorithm, packed in itertools.product(MODELS, COMPARED, (False, True))
}
CASES |= {
    f"resnet50-{algorithm}": {"model": "resnet50", "algorithm": algorithm, "gc": GC()}
    for algorithm in OURS
    if algorithm not in COMPARED
}
CASES |= {
    f"resnet50-{algorithm}-{name}": {"model": "resnet50", "algorithm": algorithm, **options}
    for algorithm, (name, options) in itertools.product(COMPARED, _OTHERWISE.items())
}
"""The donated steps that make test counts."""


Figures = dict[str, int | float]


def counted(
    model: str,
    algorithm: str,
    *,
    packed: bool = False,
    pure: bool = False,
    gc: GC | None = None,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Figures:
    """What a step of a model of :mod:`benchmarks.harness.shapes` is made of.

    With ``compiled``, the machine's code is made too.
    """
    opt = OURS[algorithm](gc)
    shapes = MODELS[model]()
    step = optimizer_step(opt, shapes, packed=packed, donate=not pure, dtype=dtype)
    slots = sum(len(own.slots) for own in opt.algorithms.values())
    found: Figures = {
        "launches": step.launches,
        "scalar_launches": len(step.scalars),
        "passes": round(step.passes, 3),
        "least_passes": 3 + 2 * slots,
        "temporaries": step.temporaries,
    }
    if compiled:
        seconds, code = machine_code(step.graphs, step.rows)
        found |= {
            "seconds": round(step.seconds + seconds, 1),
            "registers": max(kernel.registers for kernel in code),
            "spilled": max(kernel.spilled for kernel in code),
        }
    found["estimate_us"] = round(1e6 * estimate(step.moved, step.launches), 1)
    return found | _fused(step, [prod(s) for s in shapes.values()], slots)


def eager(model: str, algorithm: str, gc: GC | None) -> Figures:
    """What a step is made of that is not compiled."""
    step = eager_step(OURS[algorithm](gc), MODELS[model]())
    return {
        "launches": step.launches,
        "centralizing": step.rows,
        "passes": round(step.passes, 3),
    }


def expected() -> dict[str, Figures]:
    """What is recorded."""
    found: dict[str, Figures] = json.loads(EXPECTED.read_text("utf-8"))
    return found


def record() -> None:
    """Count all cases and record them."""
    found = {}
    for name, case in CASES.items():
        figures = counted(**case)
        found[name] = {key: figures[key] for key in COUNTED}
        print(name, found[name])
    EXPECTED.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    page = PAGE.read_text("utf-8")
    before, _, after = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + after.partition(END)[2], "utf-8")


def table() -> str:
    """What is recorded of the models, in Markdown: launches and passes, the least in brackets."""
    found = expected()
    lines = [["model", *(f"{a}{' packed' * p}" for a in COMPARED for p in (False, True))]]
    lines.append(["---"] * len(lines[0]))
    for model in MODELS:
        cells = []
        for algorithm, packed in itertools.product(COMPARED, (False, True)):
            own = found[f"{model}-{algorithm}{'-packed' * packed}"]
            cells.append(f"{own['launches']}, {own['passes']:g}")
        lines.append([model, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _fused(step: Step, numels: list[int], slots: int) -> Figures:
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
    parser.add_argument("--eager", action="store_true", help="not compiled")
    parser.add_argument("--no-gc", action="store_true")
    parser.add_argument("--at", choices=("gradient", "update"), default="gradient")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--update", action="store_true", help="record what make test expects")
    args = parser.parse_args()
    if reason := why_not():
        parser.exit(1, f"nothing can be counted here: {reason}\n")
    if args.update:
        record()
        return
    gc = None if args.no_gc else GC(at=args.at)
    if args.eager:
        found = eager(args.model, args.algorithm, gc)
    else:
        found = counted(
            args.model,
            args.algorithm,
            packed=args.packed,
            pure=args.pure,
            gc=gc,
            dtype=DTYPES[args.dtype],
            compiled=True,
        )
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<24} {value}")


if __name__ == "__main__":
    main()
