"""Times as ratios within one run, and how they are reported."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
BUDGET = 4.0
"""Seconds for each figure."""

Call = TypeVar("Call")


class Ratio(NamedTuple):
    """A time against a baseline's.

    Attributes:
        ratio: Of the two medians.
        low: The lower quartile of the rounds' own ratios.
        high: The upper one.
        seconds: The median time.
        baseline: The baseline's.
    """

    ratio: float
    low: float
    high: float
    seconds: float
    baseline: float


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait for what was launched."""
    if device != "cpu":
        torch.accelerator.synchronize()


def against(
    call: Call,
    baseline: Call,
    device: str = "cpu",
    budget: float | None = None,
    *,
    timer: Callable[[Call, str], float] = seconds,  # type: ignore[assignment]
    agree: Callable[[bool], bool] = bool,
) -> Ratio:
    """Time two calls in turn, in alternating order, for about ``budget`` seconds.

    Processes that measure together ``agree`` on whether to go on.
    """
    budget = BUDGET if budget is None else budget
    for warm in (call, baseline) * 2:
        timer(warm, device)
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + budget
    while agree(len(pairs) < 11 or (time.perf_counter() < end and len(pairs) < 2000)):
        if len(pairs) % 2:
            pairs.append((timer(call, device), timer(baseline, device)))
        else:
            pairs.append((timer(baseline, device), timer(call, device))[::-1])
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    low, _, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return Ratio(ours / theirs, low, high, ours, theirs)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures hold for."""
    name = "unknown"
    if device != "cpu":
        name = torch.cuda.get_device_name()
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if "model name" in line]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(
    name: str,
    markdown: str,
    rows: Sequence[dict[str, Any]],
    device: str = "cpu",
    output: str | None = None,
) -> None:
    """Print a table, and write it as JSON with the machine and the command that made it."""
    print(markdown, flush=True)
    kind = "" if device == "cpu" else f"-{device}"
    path = RESULTS / f"{output or name}{kind}.json"
    path.parent.mkdir(exist_ok=True)
    command = "python -m benchmarks." + " ".join([name, *sys.argv[1:]])
    content = {"command": command, "machine": machine(device), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
