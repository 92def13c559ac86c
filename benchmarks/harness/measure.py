"""Times as ratios within one run, and how they are reported."""

from __future__ import annotations

import functools
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

RESULTS = Path(__file__).parents[1] / "results"
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


def device() -> str:
    """Where to measure unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def clock(device: str) -> Callable[[], float]:
    """What tells the time in seconds, on an accelerator once all that was launched is done."""
    return time.perf_counter if device == "cpu" else EventClock(device)


class EventClock:
    """Time by events of the device itself."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seconds = 0.0
        self._last = self._event()

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        event = self._event()
        self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds

    def _event(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        event.synchronize()
        return event


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes."""
    now = clock(device)
    start = now()
    call()
    return now() - start


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
    return ratio(*zip(*pairs, strict=True))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of the times of two calls that took turns."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(each, method="inclusive") if len(each) > 1 else each * 3
    call, baseline = statistics.median(ours), statistics.median(theirs)
    return Ratio(call / baseline, low, high, call, baseline)


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


def results(name: str, device: str = "cpu") -> Path:
    """Where they are kept."""
    return RESULTS / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")


def report(
    name: str,
    markdown: str,
    rows: Sequence[dict[str, Any]],
    device: str = "cpu",
    output: str | None = None,
) -> None:
    """Print a table, and write it as JSON with the machine and the command that made it.

    Args:
        name: The command's module within ``benchmarks``.
        markdown: The table.
        rows: What it was made of.
        device: Where that was measured.
        output: Another name for the file than the module's last.
    """
    print(markdown, flush=True)
    path = results(output or name.rpartition(".")[2], device)
    write(path, name, rows, device)
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def write(path: Path, name: str, rows: Sequence[dict[str, Any]], device: str = "cpu") -> None:
    """Keep rows with the machine and the command that made them."""
    path.parent.mkdir(exist_ok=True)
    command = "python -m benchmarks." + " ".join([name, *sys.argv[1:]])
    content = {"command": command, "machine": machine(device), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
