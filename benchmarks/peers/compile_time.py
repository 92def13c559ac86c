"""How long the first step takes, beyond what a trivial compiled function costs.

Each figure is a process of its own: cold with Inductor's cache empty, then warm with it filled.

    python -m benchmarks.peers.compile_time --models resnet50
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch

from benchmarks.harness import measure, processes
from benchmarks.harness.shapes import MODELS, Shapes, gpt2
from benchmarks.peers.algorithms import COMPARED
from benchmarks.peers.steps import ours

SIZES = MODELS | {"gpt2_48_blocks": lambda: gpt2(48)}
FORMS = ("packed", "unpacked", "pure")


def first_step(shapes: Shapes, algorithm: str, form: str, device: str = "cpu") -> dict[str, float]:
    """Seconds of a trivial compilation, and of the first step less one more."""
    seconds = trivial(device)
    params, grads = (
        {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        for _ in range(2)
    )
    step = ours(
        algorithm, params, grads, gc="gc", packed=form == "packed", donate=form != "pure"
    ).step
    first, second = measure.seconds(step, device), measure.seconds(step, device)
    return {"trivial": seconds, "first_step": first - second}


def trivial(device: str = "cpu") -> float:
    """Seconds to compile next to nothing."""
    x = torch.ones(3, device=device)
    return measure.seconds(lambda: torch.compile(lambda x: x + 1)(x), device)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "adamw"], choices=COMPARED)
    parser.add_argument("--forms", nargs="+", default=["packed", "unpacked"], choices=FORMS)
    parser.add_argument("--device", default=measure.device())
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "ALGORITHM", "FORM"))
    args = parser.parse_args()
    if args.one:
        model, algorithm, form = args.one
        print(json.dumps(first_step(SIZES[model](), algorithm, form, args.device)))
        return
    rows: list[dict[str, Any]] = []
    lines: list[list[object]] = []
    for model in args.models:
        for algorithm in args.algorithms:
            for form in args.forms:
                found = {}
                with tempfile.TemporaryDirectory() as cache:
                    for start in ("cold", "warm"):
                        own = (f"--device={args.device}", "--one", model, algorithm, form)
                        (found[start],) = processes.run(
                            "benchmarks.peers.compile_time", *own, cache=cache
                        )
                row = {"model": model, "algorithm": algorithm, "form": form} | found
                rows.append(row)
                cold, warm = found["cold"], found["warm"]
                times = [cold["first_step"], warm["first_step"], cold["trivial"]]
                lines.append([model, algorithm, form, *(f"{t:.1f} s" for t in times)])
                print(*lines[-1], flush=True)
    head = ["model", "algorithm", "form", "cold", "warm", "trivial function, cold"]
    measure.report("peers.compile_time", measure.table(head, lines), rows, args.device)


if __name__ == "__main__":
    main()
