"""The time of a step, ours and others', as a ratio to torch.optim's fused step without GC.

A peer that cannot be built or stepped, or not within a time limit, gets a row that says so.

    python -m benchmarks.peers.speed --models resnet50 --algorithms sgd adamw
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness import attempts, measure
from benchmarks.harness.shapes import MODELS, tensors
from benchmarks.peers.algorithms import COMPARED
from benchmarks.peers.candidates import CANDIDATES, FUSED
from benchmarks.peers.steps import Peer, fastest_torch

LIMIT = 300.0
"""Seconds for a peer to be built, compiled and measured; compiling takes up to a minute."""

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=list(COMPARED), choices=COMPARED)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--device", default=measure.device())
    parser.add_argument("--seconds", type=float, help="for each figure")
    parser.add_argument("--output", help="another name for the file of results")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each peer")
    args = parser.parse_args()
    rows: list[Row] = []
    for model in args.models:
        params, grads = tensors(MODELS[model](), args.device)
        for algorithm in args.algorithms:
            for candidate in args.candidates:
                baseline = fastest_torch(algorithm, params, grads)
                make = partial(CANDIDATES[candidate], algorithm, params, grads)
                row = {"model": model, "algorithm": algorithm, "candidate": candidate}
                row |= measured(make, baseline, args.device, args.seconds, args.limit)
                rows.append(row)
                print(f"{model} {algorithm} {candidate}: {outcome(row)}", flush=True)
                del baseline
                torch.compiler.reset()
                gc.collect()
    by = {(r["model"], r["algorithm"], r["candidate"]): r for r in rows}
    lines: list[list[object]] = []
    for model in args.models:
        for algorithm in args.algorithms:
            own = [by[model, algorithm, candidate] for candidate in args.candidates]
            fused = [1e3 * r["baseline"] for r in own if "error" not in r]
            time = f"{statistics.median(fused):.2f} ms" if fused else ""
            lines.append([model, algorithm, time, *map(short, own)])
    head = ["model", "algorithm", FUSED, *args.candidates]
    measure.report("peers.speed", measure.table(head, lines), rows, args.device, args.output)
    if failed := [row for row in rows if "error" in row and row["candidate"].startswith("gcfunc")]:
        sys.exit(f"of gcfunc itself, {len(failed)} failed")


def measured(
    make: Callable[[], Peer],
    baseline: Peer,
    device: str,
    seconds: float | None,
    limit: float,
) -> Row:
    """A peer's ratio, or why there is none."""
    try:
        with attempts.limit(limit):
            return measure.against(make().step, baseline.step, device, seconds)._asdict()
    except (Exception, attempts.TookTooLong) as error:
        return {"error": attempts.described(error)}


def outcome(row: Row) -> str:
    """In a line."""
    if "error" in row:
        return f"failed: {row['error']}"
    return (
        f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}], {1e3 * row['seconds']:.2f} ms"
    )


def short(row: Row) -> str:
    """In a table."""
    return outcome(row).replace("|", r"\|") if "error" in row else f"{row['ratio']:.2f}"


if __name__ == "__main__":
    main()
