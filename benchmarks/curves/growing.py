"""Resident memory and time of a step while a model grows, as in Gaussian splatting.

Each candidate has a process of its own, in which it takes turns at each size with torch's foreach
step, without GC, and with gcfunc's eager one. Sizes are new each time, so that a graph is compiled
for each of the first.

    python -m benchmarks.curves.growing --sizes 200
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gcfunc
from benchmarks.harness import measure, processes
from benchmarks.harness.footprint import status

WIDTHS = (3, 4, 3, 1, 48)
"""Of what each point of a splat has: place, rotation, scale, opacity, color."""
Step = Callable[[], Any]


def by_class(of: Any, **options: Any) -> Callable[[list[Tensor]], Step]:
    """A drop-in or torch's own class."""

    def make(params: list[Tensor]) -> Step:
        step: Step = of(params, lr=1e-3, **options).step
        return step

    return make


def donated() -> Callable[[list[Tensor]], Step]:
    """One compiled optimizer for all sizes."""
    opt = gcfunc.compile(gcfunc.adam(1e-3, gc="gc"))

    def make(params: list[Tensor]) -> Step:
        tree = {f"{i}": p.detach() for i, p in enumerate(params)}
        grads = {f"{i}": p.grad for i, p in enumerate(params)}
        state = opt.init(tree)
        return lambda: opt.step(tree, grads, state)

    return make


def eager() -> Callable[[list[Tensor]], Step]:
    """The drop-in, never compiled."""
    return by_class(gcfunc.optim.Adam, gc="gc", compile=False)


def drop_in() -> Callable[[list[Tensor]], Step]:
    """One drop-in for all sizes, whose group gets other parameters."""
    optimizer: list[Any] = []

    def make(params: list[Tensor]) -> Step:
        if not optimizer:
            optimizer.append(gcfunc.optim.Adam(params, lr=1e-3, gc="gc", compile=True))
        (own,) = optimizer
        own.state.clear()
        own.param_groups[0]["params"] = params
        step: Step = own.step
        return step

    return make


def torch_foreach() -> Callable[[list[Tensor]], Step]:
    """torch's own, for comparison with itself."""
    return by_class(torch.optim.Adam, foreach=True)


CANDIDATES = {"drop-in": drop_in, "donated": donated, "eager": eager, "torch": torch_foreach}


def parameters(points: int) -> list[Tensor]:
    """A splat's, with gradients."""
    made = [torch.zeros(points, width, requires_grad=True) for width in WIDTHS]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


def curve(candidate: str, sizes: int, points: int, steps: int) -> list[dict[str, float]]:
    """For each size, resident bytes, seconds of its first step and of later ones, and ratios."""
    make, others = CANDIDATES[candidate](), {"torch": torch_foreach(), "eager": eager()}
    rows = []
    for i in range(sizes):
        n = points + 7 * i
        step = make(parameters(n))
        taken = {name: other(parameters(n)) for name, other in others.items()}
        first = measured(step)
        for other in taken.values():
            other()
        times = [[measured(step), *map(measured, taken.values())] for _ in range(steps)]
        del step, taken, other
        gc.collect()
        own, *theirs = (statistics.median(each) for each in zip(*times, strict=True))
        ratios = {f"to {name}": own / t for name, t in zip(others, theirs, strict=True)}
        rows.append({"resident": status("VmRSS"), "first": first, "step": own, **ratios})
    return rows


def measured(step: Step) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=200)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--one", choices=CANDIDATES)
    args = parser.parse_args()
    sizes = f"--sizes={args.sizes}", f"--points={args.points}", f"--steps={args.steps}"
    if args.one:
        warnings.simplefilter("ignore")
        print(json.dumps({"curve": curve(args.one, args.sizes, args.points, args.steps)}))
        return
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    marks = sorted({0, args.sizes // 6, args.sizes // 5, args.sizes // 2, args.sizes - 1})
    for candidate in args.candidates:
        (found,) = processes.run("benchmarks.curves.growing", *sizes, "--one", candidate)
        found = found["curve"]
        rows.append({"candidate": candidate, "curve": found})
        for i in marks:
            near = found[max(0, i - 5) : i + 6]
            resident = f"{found[i]['resident'] / 1e6:.0f} MB"
            first, own, *ratios = (
                statistics.median(row[what] for row in near)
                for what in ("first", "step", "to torch", "to eager")
            )
            line = [candidate, i + 1, resident, f"{first * 1e3:.0f} ms", f"{own * 1e3:.2f} ms"]
            lines.append([*line, *(f"{ratio:.2f}" for ratio in ratios)])
            print(*lines[-1], flush=True)
    head = ["step", "sizes", "resident", "first step", "step", "to torch foreach", "to eager"]
    measure.report("curves.growing", measure.table(head, lines), rows, "cpu")


if __name__ == "__main__":
    main()
