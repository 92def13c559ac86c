"""The time of a step, GC on, as a ratio to torch.optim's fused step without GC.

python -m benchmarks.speed --models resnet50 --algorithms sgd adamw
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import measure, peers
from benchmarks.shapes import MODELS

CANDIDATES: dict[str, Callable[..., peers.Peer]] = {
    "gcfunc packed": partial(peers.ours, gc="gc", packed=True, donate=True),
    "gcfunc": partial(peers.ours, gc="gc", packed=False, donate=True),
    "gcfunc drop-in": peers.drop_in,
    "gcfunc packed, and packing": partial(
        peers.ours, gc="gc", packed=True, donate=True, packing=True
    ),
    "gcfunc packed, no GC": partial(peers.ours, gc=None, packed=True, donate=True),
    "torch fused + loop": partial(peers.torch_optim, fused=True, loop=True),
    "torch foreach, no GC": partial(peers.torch_optim, foreach=True, loop=False),
    "reference loop": peers.reference,
}


def tensors(model: str, device: str) -> tuple[peers.Params, peers.Params]:
    """Parameters of the size of trained ones, and gradients."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = MODELS[model]()
    params, grads = (
        {n: scale * torch.randn(s, generator=generator, device=device) for n, s in shapes.items()}
        for scale in (0.02, 0.01)
    )
    return params, grads


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=list(peers.OURS), choices=peers.OURS)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, help="for each figure")
    parser.add_argument("--output", help="another name for the file of results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in args.models:
        params, grads = tensors(model, args.device)
        for algorithm in args.algorithms:
            for candidate in args.candidates:
                baseline = peers.torch_optim(algorithm, params, grads, fused=True, loop=False)
                peer = CANDIDATES[candidate](algorithm, params, grads)
                result = measure.against(peer.step, baseline.step, args.device, args.seconds)
                rows.append(
                    {"model": model, "algorithm": algorithm, "candidate": candidate}
                    | result._asdict()
                )
                print(
                    f"{model} {algorithm} {candidate}: {result.ratio:.2f} "
                    f"[{result.low:.2f}, {result.high:.2f}], {1e3 * result.seconds:.2f} ms",
                    flush=True,
                )
                del baseline, peer
                torch.compiler.reset()
                gc.collect()
    by = {(r["model"], r["algorithm"], r["candidate"]): r for r in rows}
    lines: list[list[object]] = []
    for model in args.models:
        for algorithm in args.algorithms:
            own = [by[model, algorithm, candidate] for candidate in args.candidates]
            fused = sorted(1e3 * r["baseline"] for r in own)[len(own) // 2]
            lines.append([model, algorithm, f"{fused:.2f} ms", *(f"{r['ratio']:.2f}" for r in own)])
    head = ["model", "algorithm", "torch fused, no GC", *args.candidates]
    measure.report("speed", measure.table(head, lines), rows, args.device, args.output)


if __name__ == "__main__":
    main()
