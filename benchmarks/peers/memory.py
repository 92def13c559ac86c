"""The peak memory of a step, against torch.optim's fused one.

Each figure is a process of its own, which reads the high-water mark of the kernel (Linux, glibc),
or of torch's allocator on an accelerator.

    python -m benchmarks.peers.memory --models gpt2
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.harness import measure, processes
from benchmarks.harness.bandwidth import held
from benchmarks.harness.footprint import beyond
from benchmarks.harness.shapes import MODELS, tensors
from benchmarks.peers.algorithms import COMPARED
from benchmarks.peers.candidates import CANDIDATES, FUSED
from benchmarks.peers.steps import Peer, fastest_torch

HOW: dict[str, Callable[..., Peer]] = {FUSED: fastest_torch} | {
    name: CANDIDATES[name] for name in ("gcfunc packed", "gcfunc", "reference loop")
}


def during_a_step(
    model: str, algorithm: str, candidate: str, device: str = "cpu"
) -> dict[str, float]:
    """Bytes that a step must hold, and what it takes beyond all that lives between steps."""
    shapes = MODELS[model]()
    params, grads = tensors(shapes, device)
    peer = HOW[candidate](algorithm, params, grads)
    del params, grads
    for _ in range(3):
        peer.step()
    return {
        "held": held(algorithm, shapes),
        "extra": statistics.median(beyond(peer.step, device) for _ in range(5)),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet50", "gpt2"], choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "adamw"], choices=COMPARED)
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
                (found,) = processes.run("benchmarks.peers.memory", *own)
                peaks[candidate] = found["held"] + found["extra"]
                ratio = peaks[candidate] / peaks[FUSED]
                rows.append(
                    {"model": model, "algorithm": algorithm, "candidate": candidate}
                    | found
                    | {"ratio": ratio}
                )
                sizes = f"{found['held'] / 1e6:.0f} MB", f"{found['extra'] / 1e6:.1f} MB"
                lines.append([model, algorithm, candidate, *sizes, f"{ratio:.3f}"])
                print(*lines[-1], flush=True)
    head = ["model", "algorithm", "step", "held", "beyond it", "peak, to torch fused"]
    measure.report("peers.memory", measure.table(head, lines), rows, args.device)


if __name__ == "__main__":
    main()
