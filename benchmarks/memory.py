"""The peak memory of a step, against torch.optim's fused one.

Each figure is a process of its own, which reads the kernel's high-water mark (Linux, glibc).

    python -m benchmarks.memory --models gpt2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import measure, peers
from benchmarks.shapes import MODELS
from benchmarks.speed import CANDIDATES, tensors

HOW = {"torch fused, no GC": None} | {
    name: CANDIDATES[name] for name in ("gcfunc packed", "gcfunc", "reference loop")
}
SLOTS = {"sgd": 1, "adamw": 2, "adagrad": 1}


def status(field: str) -> int:
    """A field of this process's memory status, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found
    return 1024 * int(found[1])


def during_a_step(model: str, algorithm: str, candidate: str) -> dict[str, float]:
    """Bytes that a step must hold, and what it takes beyond all that lives between steps."""
    params, grads = tensors(model, "cpu")
    held = (2 + SLOTS[algorithm]) * sum(p.nbytes for p in params.values())
    make = HOW[candidate]
    if make is None:
        peer = peers.torch_optim(algorithm, params, grads, fused=True, loop=False)
    else:
        peer = make(algorithm, params, grads)
    del params, grads
    for _ in range(3):
        peer.step()
    libc = ctypes.CDLL(None)
    extra = []
    for _ in range(5):
        libc.malloc_trim(0)  # or the temporaries of the steps before would count as held
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
        peer.step()
        extra.append(status("VmHWM") - before)
    return {"held": held, "extra": sorted(extra)[2]}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "gpt2"], choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "adamw"], choices=peers.OURS)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "ALGORITHM", "CANDIDATE"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(during_a_step(*args.one)))
        return
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    for model in args.models:
        for algorithm in args.algorithms:
            peaks = {}
            for candidate in HOW:
                own = [sys.executable, "-m", "benchmarks.memory", "--one"]
                printed = subprocess.run(
                    [*own, model, algorithm, candidate],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                found = json.loads(printed.stdout.splitlines()[-1])
                peaks[candidate] = found["held"] + found["extra"]
                ratio = peaks[candidate] / peaks["torch fused, no GC"]
                rows.append(
                    {"model": model, "algorithm": algorithm, "candidate": candidate}
                    | found
                    | {"ratio": ratio}
                )
                held, extra = f"{found['held'] / 1e6:.0f} MB", f"{found['extra'] / 1e6:.1f} MB"
                lines.append([model, algorithm, candidate, held, extra, f"{ratio:.3f}"])
                print(*lines[-1], flush=True)
    head = ["model", "algorithm", "step", "held", "beyond it", "peak, to torch fused"]
    measure.report("memory", measure.table(head, lines), rows)


if __name__ == "__main__":
    main()
