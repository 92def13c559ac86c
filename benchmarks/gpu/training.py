"""Whole training steps as CUDA graphs: whether torch recorded them, and what a replay takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Private, as no others say how often and why torch left a graph unrecorded.
from torch._dynamo.utils import counters
from torch._logging._internal import set_logs

from benchmarks.gpu import launches
from benchmarks.gpu.steps import Row
from benchmarks.harness import measure
from benchmarks.peers.tasks import Step, Task, cnn
from benchmarks.peers.train_step import ordinary, ours

CANDIDATES: dict[str, Callable[..., Step]] = {
    "train_step, CUDA graphs": lambda task, name: ours(
        task, name, gc="gc", donate=True, mode="reduce-overhead"
    ),
    "train_step": lambda task, name: ours(task, name, gc="gc", donate=True),
    "train_step, no GC": lambda task, name: ours(task, name, gc=None, donate=True),
}
BASELINE = "compiled model, torch fused, no GC"


def task_for(*, rehearse: bool) -> Task:
    """Small enough that launches cost more than arithmetic, or smaller."""
    torch.manual_seed(0)
    if rehearse:
        return Task(nn.Linear(8, 8), torch.randn(4, 8), torch.randint(8, (4,)))
    return cnn()


def measured(candidate: str, algorithm: str, task: Task, device: str, seconds: float) -> Row:
    """Its figures, times in seconds for one step."""
    counters.clear()
    set_logs(perf_hints=True)  # says why
    task = task.to(device)
    started = time.perf_counter()
    stepped: Any = CANDIDATES[candidate](task, algorithm)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        stepped()

    step()
    measure.clock(device)()
    row: Row = {"first_step": time.perf_counter() - started, "against": BASELINE}
    for _ in range(3):  # torch warms up, and then records
        step()
    skips = counters["inductor"]["cudagraph_skips"]
    row |= launches.of(step, device) | {"skips": skips}
    baseline = ordinary(task, algorithm, compiled=True)
    return row | measure.against(step, baseline, device, seconds)._asdict()
