"""A whole compiled training step with GC, against the ordinary compiled loop without.

The ordinary loop is ``torch.compile(model)``, ``loss.backward()`` and torch.optim's fused step.

    python -m benchmarks.peers.train_step --models cnn
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch

import gcfunc
from benchmarks.harness import measure
from benchmarks.peers.algorithms import COMPARED, OURS, TORCH
from benchmarks.peers.tasks import Step, Task, cnn, loss_fn, transformer

MODELS: dict[str, Callable[[], Task]] = {"cnn": cnn, "transformer": transformer}


def ordinary(task: Task, algorithm: str, *, compiled: bool) -> Step:
    """Module, autograd and torch.optim."""
    model = copy.deepcopy(task.model)
    forward: Any = torch.compile(model) if compiled else model
    opt = TORCH[algorithm](model.parameters(), fused=True)

    def step() -> None:
        opt.zero_grad()
        torch.autograd.backward(loss_fn(forward(task.inputs), task.targets))
        opt.step()

    return step


def ours(task: Task, algorithm: str, *, gc: str | None, donate: bool, **how: Any) -> Step:
    """gcfunc's one graph; ``how`` is for torch.compile."""
    opt = OURS[algorithm](gc)
    step = gcfunc.compile(gcfunc.train_step(task.model, loss_fn, opt), donate=donate, **how)
    train = step.init()

    def again() -> None:
        nonlocal train
        train, _ = step(train, task.inputs, task.targets)

    return again


CANDIDATES: dict[str, Callable[[Task, str], Step]] = {
    "gcfunc": lambda task, algorithm: ours(task, algorithm, gc="gc", donate=True),
    "gcfunc, no GC": lambda task, algorithm: ours(task, algorithm, gc=None, donate=True),
    "gcfunc, pure": lambda task, algorithm: ours(task, algorithm, gc="gc", donate=False),
    "not compiled, no GC": lambda task, algorithm: ordinary(task, algorithm, compiled=False),
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--algorithms", nargs="+", default=["sgd", "adamw"], choices=COMPARED)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--device", default=measure.device())
    args = parser.parse_args()
    rows = []
    lines: list[list[object]] = []
    for model in args.models:
        for algorithm in args.algorithms:
            lines.append([model, algorithm, ""])
            for candidate in args.candidates:
                torch.manual_seed(0)
                task = MODELS[model]().to(args.device)
                baseline = ordinary(task, algorithm, compiled=True)
                step = CANDIDATES[candidate](task, algorithm)
                result = measure.against(step, baseline, args.device)
                rows.append(
                    {"model": model, "algorithm": algorithm, "candidate": candidate}
                    | result._asdict()
                )
                lines[-1][2] = f"{1e3 * result.baseline:.1f} ms"
                lines[-1].append(f"{result.ratio:.2f}")
                print(
                    f"{model} {algorithm} {candidate}: {result.ratio:.2f} "
                    f"[{result.low:.2f}, {result.high:.2f}], {1e3 * result.seconds:.1f} ms",
                    flush=True,
                )
                torch.compiler.reset()
    head = ["model", "algorithm", "compiled model, fused, no GC", *args.candidates]
    measure.report("peers.train_step", measure.table(head, lines), rows, args.device)


if __name__ == "__main__":
    main()
