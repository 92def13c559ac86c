"""The time of a step, ours and others', as a ratio to torch.optim's fused step without GC.

A peer that cannot be built or stepped, or not within a time limit, gets a row that says so.

    python -m benchmarks.speed --models resnet50 --algorithms sgd adamw
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

from benchmarks import attempts, measure, peers, third_party
from benchmarks.shapes import MODELS, tensors

CANDIDATES: dict[str, Callable[..., peers.Peer]] = {
    "gcfunc packed": partial(peers.ours, gc="gc", packed=True, donate=True),
    "gcfunc": partial(peers.ours, gc="gc", packed=False, donate=True),
    "gcfunc drop-in": peers.drop_in,
    "gcfunc packed, and packing": partial(
        peers.ours, gc="gc", packed=True, donate=True, packing=True
    ),
    "gcfunc packed, no GC": partial(peers.ours, gc=None, packed=True, donate=True),
    "torch fused + loop": partial(peers.torch_optim, fused=True, loop=True),
    "torch foreach + loop": partial(peers.torch_optim, foreach=True, loop=True),
    "torch for-loop + loop": partial(peers.torch_optim, foreach=False, loop=True),
    "torch foreach, no GC": partial(peers.torch_optim, foreach=True, loop=False),
    "torch for-loop, no GC": partial(peers.torch_optim, foreach=False, loop=False),
    "torch compiled, no GC": partial(peers.compiled_torch, loop=False),
    "torch compiled + loop": partial(peers.compiled_torch, loop=True),
    "pytorch_optimizer GC + torch fused": third_party.pytorch_optimizer_gc,
    "pytorch_optimizer": third_party.pytorch_optimizer,
    "optax": third_party.optax,
    "optimi, no GC": third_party.optimi,
    "reference loop": peers.reference,
}
LIMIT = 300.0
"""Seconds for a peer to be built, compiled and measured; compiling takes up to a minute."""

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--algorithms", nargs="+", default=list(peers.COMPARED), choices=peers.COMPARED
    )
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
                baseline = peers.torch_optim(algorithm, params, grads, fused=True, loop=False)
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
    head = ["model", "algorithm", "torch fused, no GC", *args.candidates]
    measure.report("speed", measure.table(head, lines), rows, args.device, args.output)
    if failed := [row for row in rows if "error" in row and row["candidate"].startswith("gcfunc")]:
        sys.exit(f"of gcfunc itself, {len(failed)} failed")


def measured(
    make: Callable[[], peers.Peer],
    baseline: peers.Peer,
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
