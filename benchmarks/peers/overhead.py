"""What a call costs beyond its kernels: a step on 161 tensors of one element each.

python -m benchmarks.peers.overhead
"""

from __future__ import annotations

import argparse

from benchmarks.harness import measure
from benchmarks.harness.shapes import Shapes, tensors
from benchmarks.peers import candidates
from benchmarks.peers.algorithms import COMPARED
from benchmarks.peers.steps import fastest_torch

SHOWN = ("gcfunc packed", "gcfunc", "gcfunc drop-in", "torch foreach, no GC", "reference loop")
CANDIDATES = {name: candidates.CANDIDATES[name] for name in SHOWN}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=161)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "adamw"], choices=COMPARED)
    parser.add_argument("--device", default=measure.device())
    args = parser.parse_args()
    shapes: Shapes = {f"layer{i}.weight": (1, 1) for i in range(args.tensors)}
    params, grads = tensors(shapes, args.device)
    rows = []
    lines: list[list[object]] = []
    for algorithm in args.algorithms:
        for name, make in CANDIDATES.items():
            baseline = fastest_torch(algorithm, params, grads)
            result = measure.against(
                make(algorithm, params, grads).step, baseline.step, args.device
            )
            rows.append({"algorithm": algorithm, "candidate": name} | result._asdict())
            times = [result.seconds, result.baseline]
            lines.append([algorithm, name, *(f"{1e6 * t:.0f} us" for t in times)])
            lines[-1].append(f"{result.ratio:.2f}")
            print(*lines[-1], flush=True)
    head = ["algorithm", "step", "time", candidates.FUSED, "ratio"]
    measure.report("peers.overhead", measure.table(head, lines), rows, args.device)


if __name__ == "__main__":
    main()
