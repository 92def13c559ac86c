"""The peak memory of a step, against torch.optim's fused one.

Each figure is a process of its own, which reads the high-water mark of the kernel (Linux, glibc),
or of torch's allocator on an accelerator.

    python -m benchmarks.memory --models gpt2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, peers, processes
from benchmarks.bandwidth import held
from benchmarks.shapes import MODELS, tensors
from benchmarks.speed import CANDIDATES

HOW = {"torch fused, no GC": None} | {
    name: CANDIDATES[name] for name in ("gcfunc packed", "gcfunc", "reference loop")
}


def status(field: str, of: str = "self/status") -> int:
    """A field of this process's memory status, or of another file in /proc, in bytes."""
    text = (Path("/proc") / of).read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found
    return 1024 * int(found[1])


def during_a_step(
    model: str, algorithm: str, candidate: str, device: str = "cpu"
) -> dict[str, float]:
    """Bytes that a step must hold, and what it takes beyond all that lives between steps."""
    shapes = MODELS[model]()
    params, grads = tensors(shapes, device)
    make = HOW[candidate]
    if make is None:
        peer = peers.torch_optim(algorithm, params, grads, fused=True, loop=False)
    else:
        peer = make(algorithm, params, grads)
    del params, grads
    for _ in range(3):
        peer.step()
    return {
        "held": held(algorithm, shapes),
        "extra": statistics.median(beyond(peer.step, device) for _ in range(5)),
    }


def beyond(step: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a step takes at its peak beyond what is held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    # Or the temporaries of the steps before would count as held.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "gpt2"], choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "adamw"], choices=peers.COMPARED)
    parser.add_argument("--device", default=measure.device())
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "ALGORITHM", "CANDIDATE"))
    args = parser.parse_args()
    if args.one:
        model, algorithm, candidate = args.one
        print(json.dumps(during_a_step(model, algorithm, candidate, args.device)))
        return
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    for model in args.models:
        for algorithm in args.algorithms:
            peaks = {}
            for candidate in HOW:
                own = (f"--device={args.device}", "--one", model, algorithm, candidate)
                (found,) = processes.run("benchmarks.memory", *own)
                peaks[candidate] = found["held"] + found["extra"]
                ratio = peaks[candidate] / peaks["torch fused, no GC"]
                rows.append(
                    {"model": model, "algorithm": algorithm, "candidate": candidate}
                    | found
                    | {"ratio": ratio}
                )
                sizes = f"{found['held'] / 1e6:.0f} MB", f"{found['extra'] / 1e6:.1f} MB"
                lines.append([model, algorithm, candidate, *sizes, f"{ratio:.3f}"])
                print(*lines[-1], flush=True)
    head = ["model", "algorithm", "step", "held", "beyond it", "peak, to torch fused"]
    measure.report("memory", measure.table(head, lines), rows, args.device)


if __name__ == "__main__":
    main()
